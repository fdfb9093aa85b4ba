"""Pictures from captions: held-out token shards, a text file, the command line; the wrong encoder is refused."""

import io
import json
from contextlib import redirect_stdout
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

import eval.evaluate as evaluate
import eval.sample as program
from eval import search
from llamagen_dist import cli
from llamagen_dist.config import GPTConfigFile, dump
from llamagen_dist.config.section import build
from llamagen_dist.data.manifest import CaptionEncoding, read_manifest, write_manifest
from llamagen_dist.data.text_encoder import CaptionEncoder
from llamagen_dist.errors import UserError
from llamagen_dist.evaluation import inception_weights
from llamagen_dist.evaluation.features import Extraction, Selection
from llamagen_dist.evaluation.image_sets import open_images
from llamagen_dist.evaluation.inception_weights import Extractor
from llamagen_dist.models.gpt import GPT, GPTConfig
from llamagen_dist.parallel.entries import replicated
from llamagen_dist.parallel.topology import Topology
from llamagen_dist.sampling.demo import Studio
from llamagen_dist.sampling.drawing import open_source
from llamagen_dist.sampling.pictures import Settings
from llamagen_dist.sampling.png_record import read_record, record_text
from tests import checkpoints as store
from tests.ranks.forked import run_ranks
from tests.runs.caption_shards import DIM, PLACES, write_captions
from tests.runs.sampling_work import SIZES, tokenizer_run
from tests.runs.test_search import RECORD, Quick
from tests.runs.token_shards import VOCABULARY
from tests.tiny_encoders import write_clip
from tests.tiny_t5 import write_t5

COUNT, BATCH, HELD_OUT = 14, 4, 5
WORDS = ["red green blue grey cup hat old shoe"]


@pytest.fixture(scope="module")
def work(tmp_path_factory) -> Path:
    """A tiny text GPT with a head of its own, its tokenizer, its text encoder, and held-out captions."""
    folder = tmp_path_factory.mktemp("sample-text")
    tokenizer_run(folder / "tokenizer", 0)
    write_t5(folder / "t5", WORDS, DIM, 0)
    write_t5(folder / "t5-other", WORDS, DIM, 1)
    encoder = CaptionEncoder(folder / "t5", torch.device("cpu"), PLACES)
    encoding = CaptionEncoding(str(folder / "t5"), encoder.sha256, DIM, PLACES, "test", short=True)
    for name, count, seed in (("train", 24, 0), ("held_out", HELD_OUT, 1)):
        shards = write_captions(folder / name, count, seed)
        found = replace(read_manifest(shards), captions=encoding, tokenizer_sha256=store.identity(folder / "tokenizer"))
        write_manifest(shards, found)
    trained = {
        "kind": "gpt",
        "run_dir": "x",
        "model": SIZES | {"condition": "text", "caption_dim": DIM, "prefix_tokens": PLACES},
        "data": {"train": str(folder / "train"), "validation": str(folder / "held_out")},
        "train": {"images": 256},
    }
    config = build(GPTConfigFile, trained, "test")
    sizes = {"condition": "text", "caption_dim": DIM, "prefix_tokens": PLACES}
    model = GPT(GPTConfig(**SIZES, **sizes, vocab_size=VOCABULARY, image_tokens=16, num_classes=0)).initialize(0)
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(std=0.2, generator=torch.Generator().manual_seed(p.numel()))
    entries = [replicated("weights", name, tensor) for name, tensor in model.state_dict().items()]
    (folder / "gpt").mkdir()
    store.save(folder / "gpt", 1, entries, {"captions": asdict(encoding)}, Topology(), config_text=dump(config))
    settings = {
        "kind": "sample",
        "checkpoint": str(folder / "gpt"),
        "tokenizer": str(folder / "tokenizer"),
        "captions": str(folder / "held_out"),
        "out": str(folder / "unused"),
        "images": COUNT,
        "batch": BATCH,
    }
    (folder / "sample.yaml").write_text(yaml.safe_dump(settings))
    return folder


def sample(work: Path, out: str, *words: str, ranks: int = 1) -> dict[str, bytes]:
    """The results' bytes."""
    argv = [str(work / "sample.yaml"), f"out={work / out}", *words]
    run_ranks(program.main, ranks, argv) if ranks > 1 else program.main(argv)
    return {name: (work / out / name).read_bytes() for name in ("model.npz", "grid.png", "captions.json")}


def pictures(results: dict[str, bytes]) -> np.ndarray:
    return np.load(io.BytesIO(results["model.npz"]))["arr_0"]


@pytest.fixture(scope="module")
def once(work) -> dict[str, bytes]:
    return sample(work, "once")


def test_sample_i_has_caption_i_whatever_the_number_of_ranks(work, once):
    assert json.loads(once["captions.json"])[:2] == ["red cup", "green hat"]
    labels = np.load(io.BytesIO(once["model.npz"]))["labels"]
    assert labels.tolist() == [number % HELD_OUT for number in range(COUNT)]
    assert sample(work, "twice", ranks=2) == once
    images = pictures(once)
    assert len({image.tobytes() for image in images}) == COUNT  # one noise stream each
    record = json.loads((work / "once" / "record.json").read_text())
    assert record["captions"] == read_manifest(work / "held_out").fingerprint()


def test_what_is_drawn_follows_from_the_caption(work, once):
    """The same captions from a text file are encoded to other features than the shards': other pictures. Written twice,
    in another order, they give the pictures of their own numbers."""
    greedy = ("temperature=0", "images=4", f"text_encoder={work / 't5'}")
    (work / "one.txt").write_text("red cup\ngreen old shoe\nred cup\n\ngreen old shoe\n")
    one = pictures(sample(work, "greedy", f"captions={work / 'one.txt'}", *greedy))
    assert np.array_equal(one[0], one[2])
    assert np.array_equal(one[1], one[3])
    assert not np.array_equal(one[0], one[1])
    (work / "other.txt").write_text("green old shoe\nred cup\nblue cup\nred cup\n")
    other = pictures(sample(work, "greedy2", f"captions={work / 'other.txt'}", *greedy))
    assert np.array_equal(other[1], one[0])
    assert np.array_equal(other[0], one[1])
    assert not np.array_equal(other[2], one[0])


def test_pictures_are_scored_by_their_captions_from_files_and_while_they_are_drawn(work, once, tmp_path):
    """The held-out captions stand in captions.json, and the sampler knows them itself."""
    np.savez(tmp_path / "real.npz", arr_0=pictures(once)[::-1])
    drawn = {key: str(work / name) for key, name in (("checkpoint", "gpt"), ("tokenizer", "tokenizer"))}
    drawn |= {"captions": str(work / "held_out"), "images": COUNT, "batch": BATCH}
    scores = []
    for source in ({"generated": str(work / "once" / "model.npz")}, {"sample": drawn}):
        common = {"kind": "evaluate", "metrics": ["clip_score"], "limit": None, "batch": BATCH}
        paths = {"reference": str(tmp_path / "real.npz"), "clip": str(write_clip(tmp_path / "clip"))}
        (tmp_path / "e.yaml").write_text(yaml.safe_dump({**common, **paths, **source}))
        evaluate.main([str(tmp_path / "e.yaml"), f"out={tmp_path / 'e.json'}"])
        result = json.loads((tmp_path / "e.json").read_text())
        captions = result["record"]["sets"]["generated"]["images"]["captions"]
        scores.append((result["sets"]["generated"]["clip_score"], captions["sha256"], captions["n"]))
    assert scores[0] == scores[1]
    assert scores[0][0] > 0
    assert scores[0][2] == COUNT


def test_the_grid_shows_each_caption_beside_its_original(work, once):
    grid = Image.open(io.BytesIO(once["grid.png"]))
    (work / "five.txt").write_text("\n".join(json.loads(once["captions.json"])))
    plain = Image.open(io.BytesIO(sample(work, "plain", f"captions={work / 'five.txt'}")["grid.png"]))
    assert grid.width > plain.width + 70  # a column more
    assert grid.height > plain.height  # and a line of headings


def test_the_command_line_draws_captions(work, tmp_path):
    out = tmp_path / "grid.png"
    words = ["generate", str(work / "gpt"), "--tokenizer", str(work / "tokenizer"), "--out", str(out)]
    with redirect_stdout(io.StringIO()) as said:
        cli.main([*words, "--caption", "red cup", "a very long caption " * 12, "--per-class", "2"])
    tokens = len(["a", "very", "long", "caption"]) * 12 + 1  # words and what closes the caption
    assert "caption 2 (a very long caption" in said.getvalue()
    assert f"has {tokens} tokens, the GPT takes {PLACES}: its end is cut off" in said.getvalue()
    assert "caption 1" not in said.getvalue(), "the twin: a short one is not cut"
    record, _ = read_record(out)
    assert (record["captions"][0], record["cut"]) == ("red cup", {"1": tokens})
    with redirect_stdout(io.StringIO()) as said:
        cli.main(["generate", "--again", str(out)])
    assert "pixel by pixel" in said.getvalue()
    forged = out.with_name("forged.png")
    changed = record_text(record | {"captions": ["red hat", *record["captions"][1:]]})
    Image.open(out).save(forged, pnginfo=changed)
    with pytest.raises(UserError, match="was drawn by the text encoder"):
        cli.main(["generate", "--again", str(forged)])
    grid = Image.open(out)
    assert grid.width < 700  # the long caption is broken into lines
    with pytest.raises(UserError, match=r"--class: .* is conditioned on text; use --caption"):
        cli.main([*words, "--class", "0"])


def test_a_caption_on_the_page_is_drawn_as_on_the_command_line(work, tmp_path):
    opened = open_source(work / "gpt", None, work / "tokenizer", None, None, either=True)
    studio = Studio(opened, None, None, tmp_path)
    found = [studio.draw(caption, Settings(cfg_scale=2.0), 3, 2) for caption in ("red cup", "green old shoe")]
    words = ["generate", str(work / "gpt"), "--tokenizer", str(work / "tokenizer"), "--seeds", "3-4"]
    with redirect_stdout(io.StringIO()):
        cli.main([*words, "--caption", "red cup", "--out", str(tmp_path / "line.png")])
    line, red, green = (np.asarray(Image.open(path)) for path in (tmp_path / "line.png", *found))
    assert np.array_equal(line, red)
    assert not np.array_equal(red[:, -90:], green[:, -90:])
    assert read_record(found[1])[0]["captions"] == ["green old shoe"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("captions=",), "name token shards with caption features, or a text file"),
        (("captions=nowhere.txt",), "nowhere.txt cannot be read"),
        (("captions={work}/empty.txt",), "holds no captions; write one a line"),
        (("captions={work}/one.txt", "text_encoder={work}/t5-other"), "is not the one that .* was trained with"),
        (("captions={work}/another",), "was encoded by .* which is not the text encoder"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_wrong_captions_are_refused(work, tmp_path, words, message):
    (work / "empty.txt").write_text("\n \n")
    (work / "one.txt").write_text("red cup\n")
    if not (work / "another").exists():
        write_captions(work / "another", 4, 0)
    said = [word.format(work=work) for word in words]
    if said == ["captions="]:
        said = ["captions=null"]
    with pytest.raises(UserError, match=message):
        program.main([str(work / "sample.yaml"), f"out={tmp_path / 'out'}", *said])
    assert not (tmp_path / "out").exists()


def test_a_search_draws_from_captions(work, once, tmp_path, monkeypatch):
    """The pixels of a point are eval.sample's; the twin has other settings."""
    extractor = Extractor(Quick(), RECORD)
    monkeypatch.setattr(inception_weights, "open_extractor", lambda *arguments, **options: extractor)
    np.savez(tmp_path / "real.npz", arr_0=255 - pictures(once))
    given = yaml.safe_load((work / "sample.yaml").read_text())
    grid = {"cfg_scale": [2, 3]}
    given |= {"kind": "search", "grid": grid, "finer": 0, "reference": str(tmp_path / "real.npz"), "bootstrap": 2}
    (tmp_path / "search.yaml").write_text(yaml.safe_dump(given))
    search.main([str(tmp_path / "search.yaml"), f"out={tmp_path / 'out'}"])
    results = [json.loads(file.read_text()) for file in sorted((tmp_path / "out" / "points").iterdir())]
    found = [result["record"]["sets"]["generated"]["images"]["sha256"] for result in results]
    np.savez(tmp_path / "drawn.npz", arr_0=pictures(once))
    images = open_images(tmp_path / "drawn.npz")
    every = np.arange(COUNT)
    (expected,) = Extraction([Selection(images, every, every)], None, None, Topology(), BATCH).run()
    assert found[0] == expected.sha256 != found[1]
