"""results.json of a made-up quickstart with known numbers: exactly those, and nothing guessed."""

import json
import math
import shutil
from pathlib import Path

import pytest

from llamagen_dist.cli import main
from llamagen_dist.errors import UserError
from llamagen_dist.report import results as of
from llamagen_dist.report.collect import Found, collect
from tests.unit.quickstart_folder import (
    BATCH,
    BUDGETS,
    SIZES,
    STEPS,
    TOKENS,
    lines_of,
    make,
    train_loss,
    write_lines,
)
from tests.unit.report_pages import html


def results(out: Path) -> dict:
    found: Found = collect(out)
    return of.results(found)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished quickstart, made once; tests that change it copy it."""
    folder = tmp_path_factory.mktemp("quickstart") / "OUT"
    make(folder)
    return folder


@pytest.fixture
def out(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "OUT"))


def test_results_hold_exactly_what_the_runs_wrote(out: Path) -> None:
    found = results(out)
    assert found["tokenizer"] == {"psnr": 25.5, "ssim": 0.8125, "codebook_usage": 0.875}
    expected = [
        {
            "name": name,
            "params": SIZES[name],
            "tokens_seen": step * BATCH * TOKENS,
            "val_loss": round(train_loss(name, step) + 0.03, 6),
            "layout": {"ranks": 2, "tensor": 1, "data": 2, "zero": 1},
        }
        for name in ("g30k", "g130k", "g560k")
        for step in BUDGETS
    ]
    assert found["gpt"] == expected
    assert found["parity"].pop("tp_max_abs_loss_diff") == pytest.approx(3e-6, rel=1e-6)
    assert found["parity"].pop("tp_final_val_loss_diff") == pytest.approx(2.4e-5, rel=1e-6)
    assert found["parity"] == {"steps": 50, "rung": "g130k"}
    assert found["time_s"] == {
        "pack": 3.25,
        "tokenizer": 130.5,
        "extract": 14.0,
        "ladder": 262.0,
        "tp2": 96.75,
    }
    assert found["peak_rss_gb"] == 1.375
    assert set(found) == {"tokenizer", "gpt", "parity", "time_s", "peak_rss_gb"}


def test_a_shifted_step_shows_in_the_parity_figure(out: Path) -> None:
    """Sabotage: the split run's log is one step late; agreement must be gone."""
    path = out / "tp2" / "g130k" / "metrics.jsonl"
    lines = lines_of(path)
    losses = [line["loss"] for line in lines if "loss" in line]
    late = iter([losses[0], *losses[:-1]])
    write_lines(path, [line | {"loss": next(late)} if "loss" in line else line for line in lines])
    assert results(out)["parity"]["tp_max_abs_loss_diff"] > 0.05


def test_a_difference_after_step_50_does_not_count_but_one_at_step_50_does(out: Path) -> None:
    path = out / "tp2" / "g130k" / "metrics.jsonl"
    original = lines_of(path)
    for step, expected in ((51, 3e-6), (50, 0.5)):
        changed = [
            line | {"loss": train_loss("g130k", step) + 0.5} if line["step"] == step and "loss" in line else line
            for line in original
        ]
        write_lines(path, changed)
        assert results(out)["parity"]["tp_max_abs_loss_diff"] == pytest.approx(expected, rel=1e-6)


def test_a_log_of_every_tenth_step_is_said_to_be_one(out: Path) -> None:
    for folder in ("ladder", "tp2"):
        path = out / folder / "g130k" / "metrics.jsonl"
        write_lines(path, [line for line in lines_of(path) if line["step"] % 10 == 0])
    assert results(out)["parity"]["steps"] == 5
    assert "5 of the first 50 steps" in html(out)


def test_steps_that_saw_other_images_are_not_compared(out: Path) -> None:
    path = out / "tp2" / "g130k" / "metrics.jsonl"
    write_lines(path, [line | {"images_seen": line["images_seen"] + 1} for line in lines_of(path)])
    assert "parity" not in results(out)
    assert "no step or validation point in common" in html(out)


def test_what_is_missing_is_absent_and_the_rest_stays(out: Path) -> None:
    whole = results(out)
    shutil.rmtree(out / "tp2")
    found = results(out)
    assert "parity" not in found
    assert found["gpt"] == whole["gpt"]
    (out / "ladder" / "g30k" / "summary.json").unlink()  # still training: its size is not known yet
    last = results(out)["gpt"][-1]
    assert last == {"name": "g30k", "val_loss": round(train_loss("g30k", 120) + 0.03, 6)}
    for folder in ("tokenizer", "ladder", "tokens"):
        shutil.rmtree(out / folder)
    assert set(results(out)) == {"time_s", "peak_rss_gb"}
    page = html(out)
    assert "tokenizer learnt" not in page
    for file in (out / "stages").glob("*/launch/DONE.json"):
        file.unlink()
    assert results(out) == {}
    assert "Nothing has finished yet" in html(out)


def test_a_half_written_last_line_is_not_there_yet_but_a_broken_one_is_named(out: Path) -> None:
    path = out / "ladder" / "g30k" / "metrics.jsonl"
    text, whole = path.read_text(), results(out)
    path.write_text(text + '{"step": 121, "ima')
    assert results(out) == whole
    assert len(collect(out).ladder[0].training) == STEPS
    path.write_text(text.replace('"loss"', '"loss', 1))
    with pytest.raises(UserError, match=r"g30k/metrics.jsonl, line 1: is not valid JSON"):
        collect(out)


def test_a_loss_that_is_not_finite_stays_out_of_the_json(out: Path) -> None:
    path = out / "ladder" / "g30k" / "metrics.jsonl"
    write_lines(path, [line | {"val_loss": math.nan} if "val_loss" in line else line for line in lines_of(path)])
    main(["report", str(out)])
    found = json.loads((out / "results.json").read_text(), parse_constant=lambda word: pytest.fail(word))
    assert [("val_loss" in point) for point in found["gpt"]] == [False] * 3 + [True] * 6
    assert "not finite" in (out / "report.html").read_text()
