"""llamagen generate, and how it and eval.sample open what they draw from."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from llamagen_dist import cli
from llamagen_dist.checkpoint import checkpoint
from llamagen_dist.errors import UserError
from llamagen_dist.parallel.topology import start
from llamagen_dist.sampling import load
from tests.ranks.forked import run_ranks
from tests.runs.sampling_work import make_work

SMALL = ("config.yaml", "index.json", "state.json")  # what is read of every checkpoint beside the weights


@pytest.fixture(scope="module")
def work(tmp_path_factory) -> Path:
    return make_work(tmp_path_factory.mktemp("sample"))


def files_read(work: Path) -> tuple[list[str], list[str], int]:
    """(files hashed, files opened, times that weights were hashed for their identity) on this rank."""
    topology = start()
    hashed: list[Path] = []
    mapped: list[Path] = []
    identified: list[int] = []
    hash_file, map_file, identify = checkpoint.sha256_file, checkpoint.opened, checkpoint.identity_of
    checkpoint.sha256_file = lambda path: hashed.append(path) or hash_file(path)
    checkpoint.opened = lambda path: mapped.append(path) or map_file(path)
    checkpoint.identity_of = lambda weights: identified.append(len(weights)) or identify(weights)
    source = load.open_checkpoint(work / "gpt", "checkpoint", topology)
    tokenizer = load.load_tokenizer(load.tokenizer_of(source), topology=topology)
    gpt = load.load_gpt(source, tokenizer)
    assert (gpt.checkpoint.identity, tokenizer.sha256) == (source.identity, tokenizer.sha256)
    names = [[f"{path.parts[-4]}/{path.name}" for path in paths] for paths in (hashed, mapped)]
    return sorted(names[0]), sorted(names[1]), len(identified)


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_checkpoint_is_hashed_once_by_one_rank_and_only_what_is_read_of_it(work, ranks):
    """Twin: the files of the optimizer and of the average are there and would be seen."""
    weights = ["gpt/weights-00000-000.safetensors", "tokenizer/weights-00000-000.safetensors"]
    texts = ["gpt/classes.json", *(f"{run}/{name}" for run in ("gpt", "tokenizer") for name in SMALL)]
    folder = work / "gpt" / "checkpoints" / "step_00000001"
    assert {path.name.split("-")[0] for path in folder.glob("*.safetensors")} == {"weights", "ema", "optimizer"}
    for rank, (hashed, mapped, identified) in enumerate(run_ranks(files_read, ranks, work)):
        assert mapped == weights, "each weights file is mapped once on every rank"
        assert hashed == (sorted([*weights, *texts]) if rank == 0 else [])
        assert identified == (2 if rank == 0 else 0)


def test_a_damaged_optimizer_does_not_keep_a_run_from_being_sampled_and_damaged_weights_do(work, tmp_path):
    for group in ("optimizer", "weights"):
        run = shutil.copytree(work / "gpt", tmp_path / group)
        victim = next(run.glob(f"checkpoints/*/{group}-*"))
        content = bytearray(victim.read_bytes())
        content[-1] ^= 1
        victim.write_bytes(content)
    assert load.open_checkpoint(tmp_path / "optimizer", "checkpoint").folder is not None
    with pytest.raises(UserError, match="no complete checkpoint"):
        load.open_checkpoint(tmp_path / "weights", "checkpoint")


def test_generate_finds_its_tokenizer_and_names_classes(work, tmp_path, capsys):
    cli.main(
        ["generate", str(work / "gpt"), "--class", "Class 2", "0", "--per-class", "3", "--out", f"{tmp_path}/a.png"]
    )
    assert str(tmp_path / "a.png") in capsys.readouterr().out
    both = np.asarray(Image.open(tmp_path / "a.png"))
    cli.main(["generate", str(work / "gpt"), "--class", "0", "--per-class", "3", "--out", f"{tmp_path}/b.png"])
    single = np.asarray(Image.open(tmp_path / "b.png"))
    row = 80  # 16 pixels enlarged to at least 72; rows come in the order asked for
    assert np.array_equal(both[14 + row : 14 + 2 * row], single[10 : 10 + row]), (
        "a class looks the same beside any other"
    )
    cli.main(
        ["generate", str(work / "gpt"), "--class", "0", "--seed", "1", "--per-class", "3", "--out", f"{tmp_path}/c.png"]
    )
    assert not np.array_equal(np.asarray(Image.open(tmp_path / "c.png")), single)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--class", "klass 1", "--out", "x.png"], "did you mean 'class 1'?"),
        (["--class", "9", "--out", "x.png"], "there are 4 classes, 0 to 3"),
        (["--class", "0", "--out", "x.txt"], "ends in .png or .jpg"),
        (["--class", "0", "--out", "x.png", "--top-p", "0"], "--top-p 0: give more than 0, at most 1"),
        (["--class", "0", "--out", "x.png", "--tokenizer", "nowhere"], "--tokenizer: nowhere does not exist"),
    ],
)
def test_generate_refuses_in_one_sentence(work, tmp_path, monkeypatch, arguments, sentence):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as refusal:
        cli.main(["generate", str(work / "gpt"), *arguments])
    assert sentence in str(refusal.value)
    assert list(tmp_path.iterdir()) == []
