"""A tokenizer's page: which codes are in use, where they lie, how training went; and runs that did not record it."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from llamagen_dist.errors import UserError
from llamagen_dist.models.fixed_codebooks import FSQ
from llamagen_dist.report import codebook
from llamagen_dist.report.collect import collect
from tests.unit.quickstart_folder import lines_of, write_lines, write_tokenizer
from tests.unit.report_pages import described, inside, section, series, table, text_of

COUNTS = np.array([40, 0, 10, 2, 0, 12], np.int64)
FLAT = np.array([[0, 0], [1, 0], [0, 1], [-1, 0], [0, -1], [0.5, 0.5]], np.float32)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    write_tokenizer(tmp_path / "run")
    return tmp_path / "run"


def look(run: Path, **arrays: object) -> None:
    """The codebook.npz of a validation after 6,400 images."""
    known = {"counts": COUNTS, "step": 200, "images_seen": 6400, **arrays}
    np.savez(run / "codebook.npz", **known)  # type: ignore[arg-type]


def words(run: Path) -> str:
    return text_of(section(run, "The tokenizer"))


def figures(run: Path) -> dict[str, dict]:
    """By the title of their first panel."""
    return {f["panels"][0]["title"]: f for f in inside(section(run, "The tokenizer"), "figure")}


def test_an_older_run_has_its_page_without_them(run):
    shown = figures(run)
    assert list(shown) == ["squared error of pixels in [−1, 1]", "share of the codes in use"]
    assert series(shown["share of the codes in use"])["held out"]["y"] == [0.875] * 4
    assert "dead" not in words(run)
    write_lines(run / "metrics.jsonl", [line for line in lines_of(run / "metrics.jsonl") if "val_loss" not in line])
    assert "Is the codebook in use?" not in words(run), "nothing at all was recorded"


def test_the_page_begins_with_what_a_tokenizer_is_for(run):
    page = described(run)
    (first,) = [b["text"] for b in page["blocks"] if b["block"] == "markdown"]
    assert "come back from their tokens with a PSNR of **25.5 dB**; 88% of the codes are in use." in first
    (numbers,) = [
        dict((label, value) for label, value, _ in b["rows"]) for b in page["blocks"] if b["block"] == "numbers"
    ]
    assert (numbers["Held-out PSNR"], numbers["Codes in use"]) == ("25.5 dB", "88%")
    assert "Held-out loss" not in numbers, "a squared error says little to a reader"


def test_usage_is_sorted_and_dead_codes_are_counted(run):
    look(run, map=FLAT, explained=np.array([0.5, 0.25]))
    shown = figures(run)["how often a code was chosen"]
    drawn = series(shown)
    assert drawn["tokens"]["y"] == [40, 12, 10, 2]
    assert drawn["all alike"]["y"] == [pytest.approx(64 / 6)] * 2
    assert shown["shaded"] == [4, 6]
    p = COUNTS[COUNTS > 0] / 64
    perplexity = np.exp(-(p * np.log(p)).sum())
    text = words(run)
    assert (
        "After 6,400 training images the 64 tokens of the held-out images used **4 of 6 codes** (66.7%; 2 dead)" in text
    )
    assert f"as evenly as {perplexity:.0f} codes" in text
    assert f"{np.log2(perplexity):.2f} bits of a token's {np.log2(6):.2f} are used" in text
    assert "So few tokens" not in text
    assert "What helps stands in" in text
    look(run, counts=np.full(6, 3))  # the twin: a codebook that is used evenly, and of few tokens
    assert figures(run)["how often a code was chosen"]["shaded"] is None
    text = words(run)
    assert "none dead" in text
    assert "So few tokens cannot show every code that is alive." in text
    assert "What helps stands in" not in text


def test_codes_lie_on_the_map_by_use(run):
    look(run, map=FLAT, explained=np.array([0.5, 0.25]))
    shown = figures(run)["second direction"]
    drawn = series(shown)
    where = {name: list(zip(one["x"], one["y"], strict=True)) for name, one in drawn.items() if one["x"]}
    assert where == {
        "never used": [(1, 0), (0, -1)],
        "below ¼ of the average": [(-1, 0)],
        "¼ to 1": [(0, 1)],
        "1 to 4": [(0, 0), (0.5, 0.5)],
    }
    assert "75% of their variance" in shown["caption"]
    look(run, counts=np.roll(COUNTS, 1), map=FLAT, explained=np.array([0.5, 0.25]))
    assert series(figures(run)["second direction"])["never used"]["x"] != drawn["never used"]["x"], "sabotage twin"
    look(run, counts=np.ones(7001, np.int64), map=np.zeros((7001, 2), np.float32), explained=np.zeros(2))
    many = figures(run)["second direction"]
    assert len(series(many)["1 to 4"]["x"]) == 2334
    assert "One in 3 of 7,001 codes." in many["caption"]


def test_levels_of_a_quantizer_without_a_table(run):
    quantizer = FSQ([4, 2, 3])
    digits = torch.tensor([[0, 1, 2], [0, 1, 2], [3, 1, 0], [0, 0, 2]])
    counts = torch.bincount(quantizer.to_codes(digits), minlength=24).numpy()
    look(run, counts=counts, levels=quantizer.levels.numpy())
    shown = figures(run)["use of a level (1: all alike)"]
    assert shown["ticks"] == ["4", "2", "3"]
    points = {(x, y) for one in series(shown).values() for x, y in zip(one["x"], one["y"], strict=True)}
    assert {(0, 3.0), (0, 1.0), (0, 0.0), (1, 0.5), (1, 1.5), (2, 2.25), (2, 0.75), (2, 0.0)} <= points
    assert sum(len(one["x"]) for name, one in series(shown).items() if name != "all alike") == 4 + 2 + 3


def test_training_and_the_discriminator_over_images(run):
    gan = {"logits_real": 0.5, "logits_fake": -0.5, "discriminator": 0.8, "adaptive_weight": 0.1}
    lines = lines_of(run / "metrics.jsonl")
    for line in lines:
        if "loss" in line:
            line |= {"train_usage": 0.9, "train_perplexity": 50.0 + line["step"] / 10}
            line |= gan if line["step"] > 150 else {}
    write_lines(run / "metrics.jsonl", lines)
    shown = figures(run)
    assert list(shown)[1:] == ["share of the codes in use", "mean logits"]
    assert [panel["title"] for panel in shown["mean logits"]["panels"]] == [
        "mean logits",
        "discriminator's loss",
        "adaptive weight",
    ]
    assert series(shown["mean logits"])["logits of real images"]["x"][0] == 151 * 32
    assert series(shown["share of the codes in use"])["training, perplexity"]["y"][-1] == 70.0
    assert "codebook.statistics=true" not in words(run)
    write_lines(run / "metrics.jsonl", [{k: v for k, v in line.items() if k not in gan} for line in lines])
    assert "mean logits" not in figures(run), "a run without a discriminator"


def test_what_a_validation_measured_stands_in_the_table_and_over_images(run):
    more = {"codebook_perplexity": 31.0, "ssim_llamagen": 0.875, "lpips-hed": 0.125, "rfid": 41.5}
    lines = [line | more if "val_loss" in line else line for line in lines_of(run / "metrics.jsonl")]
    write_lines(run / "metrics.jsonl", lines)
    rows = dict(table(section(run, "The tokenizer"))[1:])
    names = ("the same, range 2", "held-out lpips-hed", "held-out rFID", "perplexity of the codes")
    assert [rows[name] for name in names] == ["0.8750", "0.1250", "41.50", "31"]
    assert "held-out LPIPS" not in rows, "the numbers of another network have another name"
    shown = figures(run)
    titles = [panel["title"] for panel in shown["squared error of pixels in [−1, 1]"]["panels"]]
    assert titles[1:] == ["held-out PSNR (dB)", "held-out lpips-hed", "held-out rFID"]
    assert series(shown["share of the codes in use"])["held out, perplexity"]["y"] == [31.0] * 4
    assert "comparable only within this run" in words(run)


def test_weights_that_were_averaged_are_named(run):
    assert "the average of the weights" not in words(run)
    with open(run / "config.yaml", "a") as file:
        file.write("ema: {decay: 0.999}\nvalidation: {weights: ema}\n")
    assert "| measured with | the average of the weights |" in words(run)


def test_the_losses_that_were_on_are_named_after_their_networks_and_quantizer(run):
    config = run / "config.yaml"
    before = config.read_text()
    assert "On: reconstruction (l2, weight 1), codebook (weight 1), commitment (weight 0.25)," in words(run)
    assert "`loss.perceptual=lpips-hed`" in words(run)
    config.write_text(before.replace("perceptual: none", "perceptual: lpips-hed"))
    assert "perceptual (lpips-hed, weight 1)" in words(run)
    assert "**perceptual** loss (LPIPS) is off" not in words(run)
    config.write_text(before.replace("codebook_dim: 4", "quantizer: fsq, levels: [8, 8]"))
    assert "On: reconstruction (l2, weight 1), adversarial" in words(run)


def test_a_runs_own_pictures_stand_in_for_reconstructions(run):
    assert "and the run drew none" in words(run)
    for step, shade in ((50, 10), (200, 90)):
        folder = run / f"pictures/step_{step:08d}"
        folder.mkdir(parents=True)
        Image.fromarray(np.full((8, 16, 3), shade, np.uint8)).save(folder / "reconstructions.png")
    (grid,) = inside(section(run, "The tokenizer"), "imagegrid")
    assert grid["caption"].endswith("after step 200.")
    (drawn,) = [b for b in collect(run).runs if b.kind == "tokenizer"]
    assert "and the run drew none" not in words(run)
    (drawn.folder / "pictures/step_00000200/reconstructions.png").write_bytes(b"no picture")
    with pytest.raises(UserError, match=r"reconstructions.png: cannot be read"):
        words(run)


def test_a_damaged_file_is_named(run):
    look(run, map=FLAT, explained=np.array([0.5, 0.25]))
    whole = (run / "codebook.npz").read_bytes()
    for spoilt in (whole[: len(whole) // 2], b"", b"no archive"):
        (run / "codebook.npz").write_bytes(spoilt)
        with pytest.raises(UserError, match=r"codebook\.npz: cannot be read .* delete it"):
            collect(run)
    (run / "codebook.npz").write_bytes(whole)
    assert codebook.use(collect(run).runs[0].codebook).used == 4
    (run / "codebook.npz").unlink()
    assert json.dumps(dict(collect(run).runs[0].codebook)) == "{}"
