"""A sweep on this machine through its real command line: failures, going on, retries."""

import json
from pathlib import Path

import pytest
import yaml

from tests.runs.checkout import ROOT, checkout, llamagen

LONGER = {"train.images": 1_000_000_000 // 256 * 256}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkout(tmp_path_factory.mktemp("checkout"), "runs/toy_run.py")


def write_sweep(file: Path, points: dict[str, dict[str, int]]) -> Path:
    base = ROOT / "configs/gpt/GPT-B.yaml"
    content = {
        "kind": "sweep",
        "title": "toy",
        "module": "tokenizer_training.toy_run",
        "config": str(base),
        "list": points,
    }
    file.write_text(yaml.safe_dump(content, sort_keys=False))
    return file


@pytest.mark.long
def test_a_failed_point_holds_nobody_up_and_is_tried_again_on_request(root: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    seeds = {"good": 1, "bad": 13, "bug": 14, "last": 2}
    file = write_sweep(tmp_path / "sweep.yaml", {name: {"train.seed": seed} for name, seed in seeds.items()})
    words = ("sweep", str(file), "--out", str(out))
    first = llamagen(root, *words)
    assert first.returncode == 1, first.stderr
    assert "2 of 4 points are finished; failed: bad, bug" in first.stdout
    assert "failed: toy.yaml: thirteen is nonsense; give it sense" in first.stdout
    assert "failed: IndexError: list index out of range" in first.stdout
    assert [(out / name / "launch/DONE.json").exists() for name in ("good", "bad", "bug", "last")] == [1, 0, 0, 1]
    assert json.loads((out / "bad/launch/FAILED.json").read_text())["reason"].startswith("toy.yaml")
    again = llamagen(root, *words)
    assert again.returncode == 1
    assert again.stdout.count("finished earlier") == 2
    assert "bug — failed earlier: IndexError" in again.stdout
    (out / "mended").touch()
    mended = llamagen(root, *words, "--retry-failed")
    assert mended.returncode == 0, mended.stdout
    assert "all 4 points are finished" in mended.stdout
    tries = {name: len((out / name / "rate_0.txt").read_text().split()) for name in ("good", "bad", "bug", "last")}
    assert tries == {"good": 1, "bad": 2, "bug": 2, "last": 1}
    assert not list(out.glob("*/launch/FAILED.json"))
    write_sweep(
        file, {name: {"train.seed": seed} for name, seed in seeds.items()} | {"good": {"train.seed": 1} | LONGER}
    )
    assert llamagen(root, *words).stdout.count("finished earlier") == 3, "a longer training is not finished"
    assert len((out / "good/rate_0.txt").read_text().split()) == 2
    assert llamagen(root, *words).stdout.count("finished earlier") == 4


@pytest.mark.long
def test_a_pipelines_stage_that_is_a_sweep(root: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    write_sweep(tmp_path / "ladder.yaml", {"small": {"train.seed": 1}, "large": {"train.seed": 13}})
    stage = {"name": "ladder", "why": "a test", "module": "tokenizer_training.toy_run", "config": "ladder.yaml"}
    stage |= {"out": "{out}/ladder", "produces": ["{out}/ladder/large/rate_0.txt"]}
    (tmp_path / "p.yaml").write_text(yaml.safe_dump({"kind": "pipeline", "title": "toy", "stages": [stage]}))
    words = ("pipeline", str(tmp_path / "p.yaml"), "--out", str(out))
    failed = llamagen(root, *words)
    assert failed.returncode == 1, failed.stderr
    assert "stage ladder: 1 of 2 points have failed" in failed.stdout
    (out / "ladder/mended").touch()
    mended = llamagen(root, *words)
    assert mended.returncode == 0, mended.stderr
    assert "small — finished earlier" in mended.stdout
    assert json.loads((out / "stages/ladder/launch/DONE.json").read_text())["seconds"] > 0
    assert "ladder — finished earlier" in llamagen(root, *words).stdout
