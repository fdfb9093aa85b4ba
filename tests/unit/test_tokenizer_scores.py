"""Several tokenizers compared: what the correlations are of, and how terminal and report show them."""

import json
import math

import pytest

from llamagen_dist.errors import UserError
from llamagen_dist.evaluation.tokenizer_scores import agreement, noise_share, probe, rates
from llamagen_dist.report import page, plots, tokenizers
from llamagen_dist.report.collect import collect
from llamagen_dist.report.sections import build

FIDS = {"vq": (90.0, 94.0), "fsq": (70.0, 72.0), "lfq": (120.0, 118.0), "a_b|c": (60.0, 66.0)}
"""Of the probes' two seeds."""


def row(number: int, fids: tuple[float, ...]) -> dict:
    return {
        "quantizer": "vq",
        "codes": 512,
        "tokens": 64,
        "params": 1000,
        "psnr": 20.0 + number,
        "psnr_pooled": 19.0,
        "ssim": 0.8,
        "ssim_llamagen": 0.9,
        "rfid": sum(fids) / 4,
        "codebook_usage": 0.5,
        "codebook_perplexity": 100.0 + number,
        **rates(512, 100.0 + number, 64, 32),
        "probe": probe({seed: {"fid": fid, "kid_mean": 0.1, "val_loss": 3.0} for seed, fid in enumerate(fids)}),
        "speed": {
            f"{what}_{key}": 10.0 for what in ("encode", "decode") for key in ("images_per_s", "cpu_s_per_image")
        },
    }


@pytest.fixture
def content() -> dict:
    rows = {name: row(number, fids) for number, (name, fids) in enumerate(FIDS.items())}
    return {
        "kind": "tokenizers",
        "n": 300,
        "image_size": 32,
        "tokenizers": rows,
        "correlations": agreement(rows),
        "noise_share": noise_share(rows),
        "probe": {"train": {"images": 8192}, "seeds": [0, 1]},
        "absent": {},
    }


def test_bits_per_pixel_of_both_kinds():
    known = rates(512, 64.0, 64, 32)
    assert known == {"bits_per_pixel": 9 * 64 / 1024, "entropy_bits_per_pixel": 6 * 64 / 1024}
    assert rates(512, 0.0, 64, 32)["entropy_bits_per_pixel"] == 0.0, "no codes were counted"
    assert rates(4096, 64.0, 64, 32)["bits_per_pixel"] == 12 * 64 / 1024


def test_plus_one_is_the_order_of_the_probe(content):
    known = content["correlations"]
    assert known["rfid"]["spearman"] == known["rfid"]["kendall"] == pytest.approx(1.0)
    assert known["rfid"]["spearman_p"] == pytest.approx(2 / 24)
    # PSNR grows with the row: 92, 71, 119, 63 have the ranks 3, 2, 4, 1, and its ranks are 1 to 4
    assert known["psnr"]["spearman"] == pytest.approx(-(1 - 6 * (4 + 0 + 1 + 9) / 60)), "the higher PSNR is better"
    assert {"ssim", "bits_per_pixel", "codebook_usage"}.isdisjoint(known), "the same for all: no order"
    assert "lpips" not in known
    twin = {name: {**one, "rfid": -one["rfid"]} for name, one in content["tokenizers"].items()}
    assert agreement(twin)["rfid"]["spearman"] == pytest.approx(-1.0)
    without = {name: {key: one[key] for key in one if key != "rfid"} for name, one in twin.items() if name == "vq"}
    assert "rfid" not in agreement({**twin, **without}), "a score that one tokenizer lacks"
    assert agreement({name: {**one, "probe": None} for name, one in twin.items()}) == {}


def test_the_share_of_the_seeds_in_the_variance(content):
    within = sum((a - b) ** 2 / 2 for a, b in FIDS.values()) / 4
    means = [sum(fids) / 2 for fids in FIDS.values()]
    spread = sum((m - sum(means) / 4) ** 2 for m in means) / 3
    between = spread - within / 2
    assert content["noise_share"] == pytest.approx(within / (within + between))
    alike = {name: row(0, (a, a + 10)) for name, a in (("x", 50.0), ("y", 50.0))}
    assert noise_share(alike) == 1.0, "twin: tokenizers that do not differ"
    assert noise_share({name: row(0, (a,)) for name, a in (("x", 50.0), ("y", 60.0))}) is None
    assert probe({3: {"fid": 5.0}}) == {"fid": 5.0, "fid_sd": None, "seeds": {"3": {"fid": 5.0}}}


def test_terminal_and_report_show_the_same_table(content, tmp_path):
    text = tokenizers.terminal(content)
    lines = text.splitlines()
    assert [line.split()[0] for line in lines[1:5]] == ["a_b|c", "fsq", "vq", "lfq"], "the best probe first"
    assert "63.00 ± 4.24" in lines[1]
    assert "rFID" in text
    assert "rFID orders the 4 tokenizers most as the probe's FID does (Spearman +1.00)" in text
    assert "at 5 % in all (Bonferroni): none." in text, "four tokenizers cannot show more than 2 / 24"
    (tmp_path / "results.json").write_text(json.dumps(content))
    for place in (tmp_path, tmp_path / "results.json"):
        found = collect(place)
        assert found.kind == "tokenizers"
        html = page.render(build(found))
        assert "Tokenizers compared" in html
        assert "63.00 ± 4.24" in html
        assert "a_b|c" in html
    figure = tokenizers.figure(content)
    assert [panel.title.split(" (")[0] for panel in figure.panels] == ["PSNR", "SSIM", "rFID", "perplexity"]
    assert all(len(series.x) == 2 for panel in figure.panels for series in panel.series)
    assert plots.draw(figure, "png")[:4] == b"\x89PNG"
    (tmp_path / "results.json").write_text(json.dumps({"tokenizer": {"psnr": 1.0}}))
    with pytest.raises(UserError, match="nothing to report on"):
        collect(tmp_path)  # twin: a pipeline's results.json is no comparison


def test_without_a_probe_the_scores_stand_alone(content):
    rows = {name: {key: one[key] for key in one if key != "probe"} for name, one in content["tokenizers"].items()}
    alone = {**content, "tokenizers": rows, "correlations": agreement(rows), "noise_share": None, "probe": None}
    text = tokenizers.terminal(alone)
    assert "Without a probe nothing says which score to trust." in text
    assert "probe FID" not in text
    assert tokenizers.section(alone).title == "Tokenizers compared"
    assert len(tokenizers.figure(alone).panels) == 1
    assert math.isfinite(rows["vq"]["rfid"])
