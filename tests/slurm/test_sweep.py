"""A sweep of six points as one job array of the real cluster: side by side, attached to, failed, retried, refused."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from llamagen_dist.launch.folder import JobFolder
from llamagen_dist.launch.slurm import queue
from tests.runs.checkout import ROOT, checkout, llamagen
from tests.slurm.toy import profile

POINTS = {
    "slow": 15,
    "dies": 16,
    "bad": 13,
    "a": 1,
    "b": 2,
    "c": 3,
}  # name -> seed, by which toy_run.py knows how to end


def sweep_file(folder: Path) -> Path:
    file = folder / "sweep.yaml"
    content = {
        "kind": "sweep",
        "title": "toy",
        "module": "tokenizer_training.toy_run",
        "config": str(ROOT / "configs/gpt/GPT-B.yaml"),
        "set": {"guard.hang_minutes": 4},  # how many seconds the slow one takes
        "list": {name: {"train.seed": seed} for name, seed in POINTS.items()},
        "at_once": 2,
        "nodes": 1,
    }
    file.write_text(yaml.safe_dump(content, sort_keys=False))
    return file


def events(out: Path, kind: str) -> dict[str, list[dict[str, Any]]]:
    return {name: [e for e in JobFolder.of(out / name).events() if e["event"] == kind] for name in POINTS}


def tries(out: Path) -> dict[str, int]:
    return {name: len(found) for name, found in events(out, "started").items()}


def most_at_once(out: Path) -> int:
    starts = [(e["time"], 1) for found in events(out, "started").values() for e in found]
    ends = [(e["time"], -1) for found in events(out, "ended").values() for e in found]
    running = most = 0
    for _, step in sorted(starts + ends):
        running += step
        most = max(most, running)
    return most


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkout(tmp_path_factory.mktemp("sweep"), "runs/toy_program.py", "runs/toy_run.py")


def test_six_points_one_fails_and_is_tried_again(root: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    words = ("sweep", sweep_file(tmp_path), "--out", out, "--cluster", profile(tmp_path))

    dry = llamagen(root, *words, "--dry-run")
    assert dry.returncode == 0, dry.stderr
    assert "#SBATCH --array=0-5%2" in dry.stdout
    assert not out.exists()

    before = set(queue.my_jobs())
    first = llamagen(root, *words)
    assert first.returncode == 0, first.stderr
    assert "6 points, 2 at a time, each on 2 ranks of 1 node" in first.stdout
    submitted = {job for job, state in queue.my_jobs().items() if job not in before}
    assert len(submitted) == 6
    assert len({job.partition("_")[0] for job in submitted}) == 1, "one array"

    here = llamagen(root, *words[:-1], "local")
    assert here.returncode == 2
    assert "runs there; wait for it" in here.stderr, "nothing is started here beside a cluster's job"

    attached = llamagen(root, *words, "--follow")  # what has ended by now is finished, the rest is followed
    assert attached.returncode == 1, attached.stderr
    assert "5 of 6 points are finished; failed: bad" in attached.stdout
    assert "thirteen is nonsense; give it sense" in attached.stdout
    assert set(queue.my_jobs()) - before == submitted, "attached: nothing was submitted again"
    assert most_at_once(out) == 2
    requeued = events(out, "requeued")
    assert {name: len(found) for name, found in requeued.items() if found} == {"dies": 1}, "that item alone"
    done = json.loads((out / "a/launch/DONE.json").read_text())
    assert done["ranks"] == 2
    assert done["seconds"] > 0
    assert {e["job"] for found in events(out, "started").values() for e in found} == submitted

    again = llamagen(root, *words)
    assert "5 of 6 points finished" in again.stdout
    assert "bad has failed: rank" in again.stdout
    assert set(queue.my_jobs()) - before == submitted, "finished ones are skipped, failed ones wait to be asked for"

    other = llamagen(root, *words, "train.images=2560")
    assert other.returncode == 2
    assert "point slow was started with another config (train.images: 384349952 -> 2560)" in other.stderr

    (out / "mended").touch()
    (out / "a/launch/DONE.json").unlink()  # so this one must run again, or "skipped" would prove nothing
    mended = llamagen(root, *words, "--retry-failed", "--follow")
    assert mended.returncode == 0, mended.stdout
    assert "all 6 points are finished" in mended.stdout
    assert tries(out) == {"slow": 1, "dies": 2, "bad": 2, "a": 2, "b": 1, "c": 1}
    assert not (out / "bad/launch/FAILED.json").exists()
