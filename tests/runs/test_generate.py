"""llamagen generate, and how it and eval.sample open what they draw from."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from eval import sample
from llamagen_dist import cli
from llamagen_dist.checkpoint import checkpoint
from llamagen_dist.errors import UserError
from llamagen_dist.models.sizes import TARGET_POSITIONS
from llamagen_dist.parallel.topology import start
from llamagen_dist.sampling import load
from llamagen_dist.sampling.grid import tile_side
from tests.ranks.forked import run_ranks
from tests.runs.sampling_work import gpt_run, make_work, words

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
        (["--class", "klass 1", "--out", "x.png"], "did you mean 'class 1' or 'class"),
        (["--class", "9", "--out", "x.png"], "there are 4 classes, 0 to 3"),
        (["--class", "0", "--out", "x.txt"], "ends in .png or .jpg"),
        (["--class", "0", "--out", "x.png", "--top-p", "0"], "--top-p 0: give more than 0, at most 1"),
        (["--class", "0", "--out", "x.png", "--tokenizer", "nowhere"], "--tokenizer: nowhere does not exist"),
        (["--class", "0", "--out", "x.png", "--cfg", "-1"], "--cfg -1: give 1 or more"),
        (["--class", "0", "--out", "x.png", "--cfg-scale", "nan"], "--cfg nan: give 1 or more"),
        (["--class", "0", "--out", "x.png", "--cfg-interval", "-2"], "--cfg-interval -2: give -1 or more"),
        (["--class", "0", "--out", "x.png", "--cfg-interval", "3", "--guidance", "step"], "to --guidance constant"),
        (["--class", "0", "--out", "x.png", "--guidance-power", "3"], "belongs to --guidance power-cosine; leave it"),
        (
            ["--class", "0", "--out", "x.png", "--guidance-start", "1.5"],
            "--guidance-start 1.5: give 0 or more, at most 1",
        ),
        (["--class", "0", "--out", "x.png", "--beta", "0"], "--beta 0: give more than 0, at most 1"),
        (["--class", "0", "--out", "x.png", "--beta", "0.5", "--cfg", "1"], "set cfg_scale, such as 2 for guidance"),
        (["--class", "0", "--out", "x.png", "--window", "0"], "--window 0: give 1 or more"),
        (["--class", "0"], "--out: name the .png or .jpg to write"),
        (["--class", "0", "--out", "x.png", "--seeds", "0-2", "--per-class", "4"], "3 seeds for the 4 pictures of"),
        (["--class", "0", "--out", "x.png", "--seeds", "0-2,1"], "1 is there twice"),
        (["--class", "0", "--out", "x.png", "--seeds", "7-0"], "'7-0' is neither a seed nor a range"),
        (["--class", "0", "--out", "x.png", "--seeds", "0-9999999"], "too many seeds: give 0 or more, at most 65535"),
        (["--class", "0", "--out", "x.png", "--seeds", "2147483648"], "at most 2147483647"),
        (["--class", "0", "1", "--out", "x.png", "--grid-over", "cfg=1,2"], "shows one class or caption, and 2 are"),
        (["--class", "0", "--out", "x.png", "--grid-over", "cfg=0,2"], "--grid-over cfg=0: give 1 or more"),
        (["--class", "0", "--out", "x.png", "--grid-over", "size=1"], "give one of cfg, beta, temperature, top-k,"),
        (["--class", "0", "--out", "x.png", "--grid-over", "top-k=1,x"], "write numbers with commas between them"),
        (["--class", "0", "--out", "x.png", "--grid-over", "cfg=1", "cfg=2"], "one or two different options"),
        (["--class", "0", "--out", "x.png", "--grid-over", "cfg=1", "--film", "f.png"], "leave out --grid-over"),
    ],
)
def test_generate_refuses_in_one_sentence(work, tmp_path, monkeypatch, arguments, sentence):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as refusal:
        cli.main(["generate", str(work / "gpt"), *arguments])
    assert sentence in str(refusal.value)
    assert list(tmp_path.iterdir()) == []


def drawn(run: Path, out: Path, *more: str) -> np.ndarray:
    cli.main(["generate", str(run), "--class", "0", "--per-class", "2", "--out", str(out), *more])
    return np.asarray(Image.open(out))


def test_a_guidance_free_gpt_is_drawn_with_a_beta(work, tmp_path):
    gpt_run(work, "free", guidance="free")
    run, out = work / "free", tmp_path / "x.png"
    plain, guided = drawn(run, out), drawn(run, tmp_path / "g.png", "--beta", "0.5")
    assert np.array_equal(drawn(run, out, "--beta", "1"), plain), "the default"
    assert not np.array_equal(guided, plain)
    cli.main(["generate", "--again", str(tmp_path / "g.png")])
    assert np.array_equal(np.asarray(Image.open(tmp_path / "g-again.png")), guided)
    drawn(run, out, "--grid-over", "beta=0.5,1")
    with pytest.raises(UserError, match="has no guidance scale: instead of cfg_scale 2 set cfg_scale 1 and beta"):
        drawn(run, out, "--cfg", "2")
    to, settings = tmp_path / "set", [f"checkpoint={run}", "sets=[model]", "images=6"]
    with pytest.raises(UserError, match=r"checkpoint: .*free.* has no guidance scale"):
        sample.main(words(work, to, *settings))
    sample.main(words(work, to, *settings, "cfg_scale=1", "beta=0.5"))
    assert json.loads((to / "record.json").read_text())["beta"] == 0.5


def test_past_its_annealing_a_gpt_of_random_orders_is_a_plain_one(work, tmp_path):
    """Twin: before that its table makes other pictures."""
    gpt_run(work, "late", order="rar", without=TARGET_POSITIONS)
    gpt_run(work, "early", order="rar")
    plain = drawn(work / "gpt", tmp_path / "x.png")
    assert np.array_equal(drawn(work / "late", tmp_path / "y.png"), plain)
    assert not np.array_equal(drawn(work / "early", tmp_path / "z.png"), plain)


def test_other_checkpoints_and_tokenizers_are_refused(work, tmp_path):
    """A tokenizer's run in place of the GPT's, other codes, other codes of the same number, another grid of tokens."""
    out = ["--class", "0", "--out", str(tmp_path / "x.png")]
    for arguments, sentence in (
        ([work / "tokenizer", *out], r"tokenizer is not a GPT's run"),
        ([work / "gpt", "--tokenizer", work / "gpt", *out], r"gpt is not a tokenizer's run"),
        ([work / "gpt", "--tokenizer", work / "tokenizer65", *out], r"has 65 codes, but .*gpt was trained on 64"),
        ([work / "gpt", "--tokenizer", work / "tokenizer2", *out], r"is not the one whose tokens .*gpt was trained on"),
    ):
        with pytest.raises(UserError, match=sentence):
            cli.main(["generate", *map(str, arguments)])
    for noted, sentence in (
        ({"grid": [8, 8]}, r"gpt draws 8 x 8 tokens, but .*tokenizer makes 4 x 4 of 16 pixels \(4 pixels per token\)"),
        ({"tokenizer": {"path": "then", "sha256": "0" * 64}}, None),
    ):
        run = shutil.copytree(work / "gpt", tmp_path / next(iter(noted)) / "gpt")
        (folder,) = run.glob("checkpoints/*")
        rewrite_state(folder, noted)
        if sentence is None:  # the shards, which are there, are asked first
            cli.main(["generate", str(run), *out])
            continue
        with pytest.raises(UserError, match=sentence):
            cli.main(["generate", str(run), *out])
    hidden = work / "tokens"
    hidden.rename(tmp_path / "tokens")
    try:
        with pytest.raises(UserError, match=r"is not the one whose tokens .* was trained on \(then, sha256 0000"):
            cli.main(["generate", str(run), "--tokenizer", str(work / "tokenizer"), *out])
    finally:
        (tmp_path / "tokens").rename(hidden)


def rewrite_state(folder: Path, more: dict[str, object]) -> None:
    """Put more into a checkpoint's state.json, with the hashes that index.json has of it and COMPLETE of that."""
    state, index, complete = (folder / name for name in ("state.json", "index.json", "COMPLETE"))
    was = checkpoint.sha256_file(state), checkpoint.sha256_file(index)
    state.write_text(json.dumps(json.loads(state.read_text()) | more))
    for file, old, new in ((index, was[0], state), (complete, was[1], index)):
        assert old in file.read_text()
        file.write_text(file.read_text().replace(old, checkpoint.sha256_file(new)))


def test_a_name_may_be_one_of_several_that_a_class_has():
    classes = ["tench, Tinca tinca", "tabby, tabby cat", "tabbed cat", "crane", "crane, machine"]
    assert [load.class_number(name, classes) for name in ("tabby", "Tinca tinca", "TABBY CAT")] == [1, 0, 1]
    assert load.class_number("crane", classes) == 3, "a name that is the whole of it comes first"
    assert load.class_number("machine", classes) == 4
    with pytest.raises(UserError, match=r"did you mean 'tabby, tabby cat' or 'tabbed cat'\?"):
        load.class_number("tably cat", classes)
    with pytest.raises(UserError, match=r"is the name of 2 classes: 0 \(a, b\), 1 \(b, c\); give the number"):
        load.class_number("b", ["a, b", "b, c"])


def test_the_same_seed_is_the_same_picture_alone_or_in_a_list(work, tmp_path, capsys):
    def pictures(*words: str) -> np.ndarray:
        cli.main(["generate", str(work / "gpt"), "--class", "1", *words, "--out", f"{tmp_path}/x.png"])
        return np.asarray(Image.open(tmp_path / "x.png"))

    several, one = pictures("--seeds", "3,5-6"), pictures("--seed", "5", "--per-class", "1")
    tile = tile_side(16)  # and a gap of 4 pixels, and a margin of 10
    left = one.shape[1] - 10 - tile
    assert np.array_equal(several[:, left + tile + 4 : left + 2 * tile + 4], one[:, left : left + tile])
    assert not np.array_equal(several[:, left : left + tile], one[:, left : left + tile])


def test_more_rows_than_a_page_shows_are_not_drawn_and_that_is_said(work, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr("llamagen_dist.sampling.grid.MOST_CLASSES", 3)
    cli.main(["generate", str(work / "gpt"), "--class", "all", "--per-class", "2", "--out", f"{tmp_path}/x.png"])
    said = capsys.readouterr().out
    assert "3 of the 4 rows are drawn" in said
    assert "pictures: 6/6 (100 %)" in said


def tile_at(page: Path, row: int, column: int) -> np.ndarray:
    """A picture of 16 pixels out of a page's lower right, counted from there: (0, 0) is the last of the last row."""
    pixels, tile = np.asarray(Image.open(page)), tile_side(16)
    bottom, right = (
        length - 10 - number * (tile + 4) for length, number in zip(pixels.shape[:2], (row, column), strict=True)
    )
    return pixels[bottom - tile : bottom, right - tile : right]


def test_a_grid_over_settings_has_the_same_noise_in_every_cell(work, tmp_path):
    words = ["generate", str(work / "gpt"), "--class", "1", "--seeds", "3,8"]
    cli.main([*words, "--grid-over", "top-k=1,9", "cfg=1,3", "--out", f"{tmp_path}/table.png"])
    cli.main([*words, "--grid-over", "top-k=1,9", "--cfg", "3", "--out", f"{tmp_path}/column.png"])
    cells = []
    for row, top_k in enumerate(("9", "1")):
        for cfg in ("3", "1"):
            cli.main([*words, "--cfg", cfg, "--top-k", top_k, "--out", f"{tmp_path}/single.png"])
            cells.append((row, cfg, tile_at(tmp_path / "single.png", 0, 0)))
    for row, cfg, single in cells:
        if cfg == "3":
            assert np.array_equal(tile_at(tmp_path / "table.png", row, 0), single)
            assert np.array_equal(tile_at(tmp_path / "column.png", row, 0), single)
    assert len({single.tobytes() for *_, single in cells}) == 4, "the twin: other settings give other pictures"


def test_a_film_ends_with_the_picture_and_is_grey_where_nothing_is_drawn_yet(work, tmp_path):
    words = ["generate", str(work / "gpt"), "--class", "1", "--seeds", "3", "--film", f"{tmp_path}/film.png"]
    cli.main([*words, "--out", f"{tmp_path}/whole.png"])
    film, tile = np.asarray(Image.open(tmp_path / "film.png")), tile_side(16)
    whole = tile_at(tmp_path / "whole.png", 0, 0)
    (left,) = [
        x for x in range(film.shape[1] - tile + 1) if np.array_equal(film[:, x : x + tile][corner(film, tile)], whole)
    ]
    stages = [film[corner(film, tile), x : x + tile] for x in range(10, left + 1, (left - 10) // 3)]
    assert len(stages) == 4  # 4 x 4 tokens
    for number, stage in enumerate(stages, 1):
        grey = (stage == 160).all(axis=(1, 2))
        assert grey.tolist() == [y >= number * tile // 4 for y in range(tile)]


def corner(film: np.ndarray, tile: int) -> slice:
    """The rows of a film's pictures: those where grey begins first lie under the title."""
    grey = np.flatnonzero((film[:, 10 : 10 + tile] == 160).all(axis=(1, 2)))
    return slice(grey[-1] + 1 - tile, grey[-1] + 1)
