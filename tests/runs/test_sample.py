"""eval.sample, eval.reconstruct and llamagen generate: the same bytes on any number of ranks and after any cut."""

import contextlib
import io
import json
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import save_file

import eval.reconstruct as reconstruct
import eval.sample as program
from llamagen_dist import cli
from llamagen_dist.build import build_vq
from llamagen_dist.checkpoint import checkpoint
from llamagen_dist.config import GPTConfigFile, dump
from llamagen_dist.config.section import build
from llamagen_dist.data import images
from llamagen_dist.data.manifest import read_manifest, write_manifest
from llamagen_dist.data.shards import open_shards
from llamagen_dist.data.tokens import TokenReader
from llamagen_dist.errors import UserError
from llamagen_dist.evaluation.image_quality import psnr
from llamagen_dist.models.gpt import GPT, GPTConfig
from llamagen_dist.models.vq import to_uint8
from llamagen_dist.parallel.entries import replicated
from llamagen_dist.parallel.topology import Topology, start
from llamagen_dist.sampling import load
from llamagen_dist.sampling.pictures import code_counts
from llamagen_dist.sampling.sampler import generate
from tests import checkpoints as store
from tests.image_shards import write_images
from tests.ranks.forked import run_ranks
from tests.runs.token_shards import CLASSES, VOCABULARY, write_tokens
from tests.tokenizer_run import random_tokenizer

ROOT = Path(__file__).parent.parent.parent
SIZE, COUNT, BATCH = 16, 22, 6
SMALL = ("config.yaml", "index.json", "state.json")  # what is read of every checkpoint beside the weights
SIZES = {"n_layer": 2, "n_head": 2, "dim": 32, "multiple_of": 16}
TOKENIZER = {
    "channels": 8,
    "channel_multipliers": [1, 1, 1],
    "res_blocks": 1,
    "z_channels": 8,
    "codebook_size": VOCABULARY,
    "codebook_dim": 4,
}


def tokenizer_run(folder: Path, seed: int, **changes: object) -> Path:
    return random_tokenizer(folder, TOKENIZER | changes, seed, SIZE)


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """Random tiny tokenizers and a GPT with a head of its own, as run directories and as bare files."""
    folder = tmp_path_factory.mktemp("sample")
    tokenizer_run(folder / "tokenizer", 0)
    tokenizer_run(folder / "tokenizer2", 1)
    tokenizer_run(folder / "tokenizer65", 2, codebook_size=VOCABULARY + 1)
    tokens = write_tokens(folder / "tokens", 40, 0)
    named = {"tokenizer_sha256": store.identity(folder / "tokenizer"), "tokenizer_path": str(folder / "tokenizer")}
    write_manifest(tokens, replace(read_manifest(tokens), **named))
    trained = {
        "kind": "gpt",
        "run_dir": "x",
        "model": SIZES,
        "data": {"train": str(tokens), "validation": str(tokens)},
        "train": {"images": 256},
    }
    config = build(GPTConfigFile, trained, "test")
    model = GPT(GPTConfig(**SIZES, vocab_size=VOCABULARY, image_tokens=16, num_classes=CLASSES)).initialize(0)
    with torch.no_grad():
        model.output.weight.normal_(std=0.2, generator=torch.Generator().manual_seed(0))
    entries = [replicated("weights", name, tensor) for name, tensor in model.state_dict().items()]
    entries += [replicated("ema", name, tensor * 0.9) for name, tensor in model.state_dict().items()]
    entries += [replicated("optimizer", f"exp_avg/{name}", tensor) for name, tensor in model.state_dict().items()]
    (folder / "gpt").mkdir()
    classes = [f"class {c}" for c in range(CLASSES)]
    store.save(folder / "gpt", 1, entries, {}, Topology(), config_text=dump(config), classes=classes)
    save_file({k: v.contiguous() for k, v in model.state_dict().items()}, folder / "gpt.safetensors")
    write_images(folder / "images", 20, SIZE, padding=(2, 2, 2, 2))
    settings = {
        "kind": "sample",
        "checkpoint": str(folder / "gpt"),
        "tokenizer": str(folder / "tokenizer"),
        "out": str(folder / "unused"),
        "images": COUNT,
        "sets": ["model", "untrained", "unigram"],
        "batch": BATCH,
        "top_k": 40,
    }
    (folder / "sample.yaml").write_text(yaml.safe_dump(settings))
    settings = {
        "kind": "reconstruct",
        "tokenizer": str(folder / "tokenizer"),
        "images": str(folder / "images"),
        "out": str(folder / "unused"),
        "batch": BATCH,
    }
    (folder / "reconstruct.yaml").write_text(yaml.safe_dump(settings))
    return folder


def words(work: Path, out: Path, *settings: str, kind: str = "sample") -> list[str]:
    return [str(work / f"{kind}.yaml"), f"out={out}", *settings]


def quietly(main, arguments: list[str]) -> str:
    heard = io.StringIO()
    with contextlib.redirect_stdout(heard):
        main(arguments)
    return heard.getvalue()


def contents(folder: Path) -> dict[str, bytes]:
    """Everything but the record, which also says how many ranks and seconds it took."""
    files = {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}
    assert "record.json" in files
    return {name: data for name, data in files.items() if name != "record.json"}


@pytest.fixture(scope="module")
def alone(work):
    quietly(program.main, words(work, work / "alone"))
    return work / "alone"


def test_the_files_are_what_evaluation_reads(work, alone):
    assert sorted(contents(alone)) == ["grid.png", "model.npz", "unigram.npz", "untrained.npz"]
    loaded = {name: np.load(alone / f"{name}.npz", allow_pickle=False) for name in ("model", "untrained", "unigram")}
    for file in loaded.values():
        assert (file["arr_0"].dtype, file["arr_0"].shape) == (np.uint8, (COUNT, SIZE, SIZE, 3))
        assert (file["labels"].dtype, file["labels"].tolist()) == (np.int64, [i % CLASSES for i in range(COUNT)])
    assert not np.array_equal(loaded["model"]["arr_0"], loaded["untrained"]["arr_0"])
    assert not np.array_equal(loaded["unigram"]["arr_0"], loaded["untrained"]["arr_0"])
    record = json.loads((alone / "record.json").read_text())
    wanted = {"cfg_scale": 2.0, "cfg_interval": -1, "temperature": 1.0, "top_k": 40, "top_p": 1.0, "seed": 0}
    assert {key: record[key] for key in wanted} == wanted
    assert (record["n"], record["batch"], record["image_size"]) == (COUNT, BATCH, SIZE)
    assert record["checkpoint_sha256"] == store.identity(work / "gpt")
    assert record["tokenizer_sha256"] == store.identity(work / "tokenizer")
    assert "head is zero" in record["meaning"]["untrained"]
    assert Image.open(alone / "grid.png").height > CLASSES * 72


def test_the_pictures_are_the_models_own(work, alone):
    model = GPT(GPTConfig(**SIZES, vocab_size=VOCABULARY, image_tokens=16, num_classes=CLASSES)).eval()
    model.load_state_dict(store.read_weights(work / "gpt"))
    tokenizer = build_vq(build_section(TOKENIZER)).eval()
    tokenizer.load_state_dict(store.read_weights(work / "tokenizer"))
    numbers = torch.arange(COUNT)
    codes = generate(model, numbers % CLASSES, cfg_scale=2.0, top_k=40, seeds=numbers)
    expected = to_uint8(tokenizer.decode(codes.view(-1, 4, 4))).permute(0, 2, 3, 1).numpy()
    found = np.load(alone / "model.npz")["arr_0"]
    assert (np.abs(found.astype(int) - expected) <= 1).mean() > 0.999  # the batch shape may move a rounding
    assert (np.abs(found.astype(int) - np.roll(expected, 1, axis=0)) <= 1).mean() < 0.5


def build_section(values: dict):
    from llamagen_dist.config import TokenizerModelSection

    return TokenizerModelSection(**values)


@pytest.mark.parametrize("ranks", [2, 3])
def test_any_number_of_ranks_writes_the_same_bytes(work, alone, tmp_path, ranks):
    run_ranks(program.main, ranks, words(work, tmp_path / "out"))
    assert contents(tmp_path / "out") == contents(alone)


def test_more_pictures_begin_with_the_same_ones(work, alone, tmp_path):
    quietly(program.main, words(work, tmp_path / "out", "images=31", "sets=[model]"))
    more = np.load(tmp_path / "out" / "model.npz")["arr_0"]
    assert np.array_equal(more[:COUNT], np.load(alone / "model.npz")["arr_0"])


@pytest.mark.parametrize(
    "setting", ["seed=1", "cfg_scale=3", "temperature=0.9", "top_k=3", "cfg_interval=2", "weights=ema"]
)
def test_every_option_reaches_the_pictures(work, alone, tmp_path, setting):
    """Sabotage twin of the equalities: the comparison sees one changed number."""
    quietly(program.main, words(work, tmp_path / "out", "sets=[model]", setting))
    assert contents(tmp_path / "out")["model.npz"] != contents(alone)["model.npz"]


SLOWLY = """
import runpy, sys, time
import llamagen_dist.sampling.pictures as pictures
decode = pictures.decode_tokens
def slow(*arguments):
    time.sleep(0.15)
    return decode(*arguments)
pictures.decode_tokens = slow
sys.argv = sys.argv[1:]
runpy.run_module(sys.argv[0], run_name="__main__")
"""


def test_killed_and_taken_up_by_two_ranks(work, alone, tmp_path):
    """A real process; SIGKILL after some chunks; a finished chunk that is damaged since is made again."""
    out = tmp_path / "out"
    command = [sys.executable, "-c", SLOWLY, "eval.sample", *words(work, out)]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 180
    while len(list(out.glob(".parts/model-*.npz"))) < 3 and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert process.returncode == -signal.SIGKILL
    done = {path: path.stat().st_mtime_ns for path in out.glob(".parts/model-*.npz")}
    assert 3 <= len(done) <= 4
    assert not (out / "record.json").exists()
    torn = sorted(done)[1]
    torn.write_bytes(torn.read_bytes()[:-200] + b"\0" * 200)
    before = {path: path.read_bytes() for path in done if path != torn}

    with pytest.raises(UserError, match=r"holds an unfinished job of another config \(seed: 0 -> 1\)"):
        quietly(program.main, words(work, out, "seed=1"))
    assert {path: path.read_bytes() for path in before} == before
    run_ranks(program.main, 2, words(work, out))
    assert contents(out) == contents(alone)


def test_cut_off_while_the_results_were_being_written(work, alone, tmp_path, monkeypatch):
    def fails(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(program, "save", fails)
        with pytest.raises(OSError, match="No space"):
            quietly(program.main, words(work, tmp_path / "out"))
    assert (tmp_path / "out" / "model.npz").exists()
    stamps = {p: p.stat().st_mtime_ns for p in tmp_path.glob("out/.parts/*.npz")}
    assert len(stamps) == 12
    assert "0/0" in quietly(program.main, words(work, tmp_path / "out")), "no chunk is computed again"
    assert contents(tmp_path / "out") == contents(alone)


def test_finished_results_are_left_alone_and_another_config_refused(work, alone):
    before = {path: path.stat().st_mtime_ns for path in alone.rglob("*")}
    assert "complete already" in quietly(program.main, words(work, alone))
    sentence = r"holds results of another config \(cfg_scale: 2.0 -> 3.0; top_k: 40 -> 0\); choose another folder"
    with pytest.raises(UserError, match=sentence):
        quietly(program.main, words(work, alone, "cfg_scale=3", "top_k=0"))
    assert {path: path.stat().st_mtime_ns for path in alone.rglob("*")} == before


def test_a_lost_result_is_made_again(work, alone, tmp_path):
    shutil.copytree(alone, tmp_path / "out")
    (tmp_path / "out" / "untrained.npz").unlink()
    quietly(program.main, words(work, tmp_path / "out"))
    assert contents(tmp_path / "out") == contents(alone)


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        (["checkpoint={work}/nowhere"], "checkpoint: {work}/nowhere does not exist; give a run directory"),
        (["checkpoint={work}/images"], "checkpoint: {work}/images: no complete checkpoint there"),
        (["checkpoint={work}/tokenizer"], "is not a GPT's run"),
        (["tokenizer={work}/gpt"], "is not a tokenizer's run"),
        (["tokenizer={work}/tokenizer65"], "has 65 codes, but {work}/gpt was trained on 64"),
        (["tokenizer={work}/tokenizer2"], "is not the one whose tokens {work}/gpt was trained on"),
        (["checkpoint={work}/gpt.safetensors"], "is a bare weights file; say what it is, as in model.size=GPT-B"),
        (["image_size=18"], "18 is not a multiple of 4, the pixels per token"),
        (["out={work}/sample.yaml/x"], "cannot be written"),
        (["out={work}/images", "tokens={work}/images"], "holds images, but tokens are needed"),
        (["sets=[model,model]"], "names a set twice"),
        (["cfg_scale=0.5"], "cfg_scale"),
    ],
)
def test_bad_inputs_are_one_sentence_and_write_nothing(work, tmp_path, settings, sentence):
    filled = [setting.format(work=work) for setting in settings]
    before = sorted(work.rglob("*"))
    with pytest.raises(UserError) as refusal:
        quietly(program.main, words(work, tmp_path / "out", *filled))
    assert sentence.format(work=work) in str(refusal.value)
    assert "\n" not in str(refusal.value)
    assert not (tmp_path / "out").exists()
    assert sorted(work.rglob("*")) == before


def test_without_the_token_shards_the_sizes_come_from_weights_and_tokenizer(work, alone, tmp_path):
    """The data folder is gone: as before for the model, and unigram says what it needs."""
    moved = tmp_path / "gpt"
    shutil.copytree(work / "gpt", moved)
    hidden = work / "tokens"
    hidden.rename(tmp_path / "tokens")
    try:
        with pytest.raises(UserError, match="unigram needs the training token shards"):
            quietly(program.main, words(work, tmp_path / "out", f"checkpoint={moved}"))
        quietly(program.main, words(work, tmp_path / "out", f"checkpoint={moved}", "sets=[model]"))
        bare = [f"checkpoint={work / 'gpt.safetensors'}", *(f"model.{key}={value}" for key, value in SIZES.items())]
        quietly(program.main, words(work, tmp_path / "bare", "sets=[model]", *bare))
        with pytest.raises(UserError, match="say where it is with --tokenizer PATH"):
            cli.main(["generate", str(moved), "--class", "0", "--out", str(tmp_path / "x.png")])
    finally:
        (tmp_path / "tokens").rename(hidden)
    for out in ("out", "bare"):
        assert contents(tmp_path / out)["model.npz"] == contents(alone)["model.npz"]


def test_the_histogram_counts_every_crop(work):
    shards = open_shards(work / "tokens")
    counts = code_counts(TokenReader(shards), range(2))
    assert int(counts.sum()) == 40 * 2 * 16
    parts = [code_counts(TokenReader(shards), [shard]) for shard in (0, 1)]
    assert torch.equal(parts[0] + parts[1], counts)
    assert not torch.equal(parts[0], counts)


def refused_rank(arguments: list[str]) -> str:
    try:
        program.main(arguments)
    except UserError as error:
        return str(error)
    return ""


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


def test_a_training_file_with_an_average_is_sampled_as_is_said(work, tmp_path, capsys):
    trained = store.read_weights(work / "gpt")
    torch.save({"model": trained, "ema": {name: 0.9 * t for name, t in trained.items()}}, tmp_path / "train.pt")
    bare = [
        f"checkpoint={tmp_path}/train.pt",
        *(f"model.{key}={value}" for key, value in SIZES.items()),
        "sets=[model]",
    ]
    found = {}
    for name, settings, taken in (
        ("default", [], "ema"),
        ("ema", ["weights=ema"], "ema"),
        ("m", ["weights=trained"], "model"),
    ):
        said = quietly(program.main, words(work, tmp_path / name, *bare, *settings))
        assert f"train.pt: took `{taken}` and not `{'model' if taken == 'ema' else 'ema'}`" in said
        found[name] = np.load(tmp_path / name / "model.npz")["arr_0"]
    assert np.array_equal(found["default"], found["ema"])
    assert not np.array_equal(found["default"], found["m"])


def test_every_rank_gets_the_main_ranks_sentence(work, alone):
    sentences = run_ranks(refused_rank, 2, words(work, alone, "seed=5"))
    assert sentences[0] == sentences[1]
    assert "seed: 0 -> 5" in sentences[0]


def test_reconstructions_and_their_scores(work, tmp_path):
    out = tmp_path / "one"
    said = quietly(reconstruct.main, words(work, out, kind="reconstruct"))
    assert "20 images, psnr" in said
    shards = open_shards(work / "images")
    originals = images.load_images(shards, range(20), SIZE)
    tokenizer = build_vq(build_section(TOKENIZER)).eval()
    tokenizer.load_state_dict(store.read_weights(work / "tokenizer"))
    codes = tokenizer.encode(images.to_floats(originals))
    expected = to_uint8(tokenizer.decode(codes))
    found = np.load(out / "reconstruction.npz")["arr_0"]
    assert (np.abs(found.astype(int) - expected.permute(0, 2, 3, 1).numpy()) <= 1).mean() > 0.99
    record = json.loads((out / "record.json").read_text())
    truth = torch.from_numpy(originals).permute(0, 3, 1, 2)
    assert abs(record["psnr"] - float(psnr(expected, truth, (2, 2, 14, 14)).mean())) < 0.01
    assert abs(record["psnr"] - float(psnr(expected, truth).mean())) > 0.01, "the padding would be noticed"
    assert record["codebook_usage"] == len(codes.unique()) / VOCABULARY
    assert 0 <= record["ssim"] < record["ssim_llamagen"] <= 1
    run_ranks(reconstruct.main, 3, words(work, tmp_path / "three", kind="reconstruct"))
    assert contents(tmp_path / "three") == contents(out)
    scores = ("psnr", "ssim", "ssim_llamagen", "codebook_usage")
    again = json.loads((tmp_path / "three" / "record.json").read_text())
    assert [again[key] for key in scores] == [record[key] for key in scores]
    with pytest.raises(UserError, match=r"of another config \(tokenizer_sha256"):
        quietly(reconstruct.main, words(work, out, f"tokenizer={work / 'tokenizer2'}", kind="reconstruct"))
    with pytest.raises(UserError, match="image_size: 6 must be a multiple of 4"):
        quietly(reconstruct.main, words(work, tmp_path / "six", "image_size=6", kind="reconstruct"))


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
        (["--class", "0", "--out", "x.png", "--top-p", "0"], "--top-p 0.0: must be above 0"),
        (["--class", "0", "--out", "x.png", "--tokenizer", "nowhere"], "--tokenizer: nowhere does not exist"),
    ],
)
def test_generate_refuses_in_one_sentence(work, tmp_path, monkeypatch, arguments, sentence):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as refusal:
        cli.main(["generate", str(work / "gpt"), *arguments])
    assert sentence in str(refusal.value)
    assert list(tmp_path.iterdir()) == []
