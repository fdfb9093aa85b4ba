"""The rate-distortion curve in the report of a tokenizer with prefix tokens; no such part where tokens are a grid."""

import json
from pathlib import Path

from llamagen_dist.config import dump, load
from llamagen_dist.report import rate_distortion
from llamagen_dist.report.collect import collect
from tests.unit.quickstart_folder import make
from tests.unit.report_pages import html, inside, section, series, text_of

ROOT = Path(__file__).parents[2]
MEASURED = {"psnr_at_1": 11.5, "psnr_at_2": 13.0, "psnr_at_8": 17.25, "psnr": 20.5}


def test_the_curve_is_the_last_validation_at_so_many_bits(tmp_path: Path) -> None:
    make(tmp_path / "OUT")
    out = tmp_path / "OUT" / "tokenizer"
    assert "bits per image" not in html(out), "the twin: a grid has one rate"
    (out / "config.yaml").write_text(dump(load(ROOT / "configs/tokenizer/prefix.yaml", {"run_dir": str(out)})))
    metrics = out / "metrics.jsonl"
    lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    seen = lines[-1]["images_seen"]
    lines += [{"step": 9, "images_seen": seen, "val_loss": 0.1, **MEASURED}]
    lines[-2:-2] = [{"step": 8, "images_seen": seen, "val_loss": 0.2, **dict.fromkeys(MEASURED, 9.0)}]
    metrics.write_text("".join(json.dumps(line) + "\n" for line in lines))
    shown = section(out, "The tokenizer")
    assert "a small row of code numbers" in html(out)
    assert "How much of an image how many tokens keep" in text_of(shown)
    (curve,) = [figure for figure in inside(shown, "figure") if "bits per image" in figure["x"]]
    line = series(curve)["held out"]
    assert line["x"] == [9.0, 18.0, 72.0, 288.0]  # 512 codes, and 32 of them are all
    assert line["y"] == [11.5, 13.0, 17.25, 20.5]
    run = collect(out).tokenizer
    assert run is not None
    assert rate_distortion.curve(run) == ([1, 2, 8, 32], line["x"], line["y"])
