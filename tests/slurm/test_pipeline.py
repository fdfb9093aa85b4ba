"""A pipeline as a chain of real jobs: a stage that fails, is mended and gone on with; a stage that is requeued."""

import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from llamagen_dist.launch.folder import JobFolder
from llamagen_dist.launch.slurm import queue
from llamagen_dist.launch.state import JobState, state_of
from tests.runs.checkout import ROOT, checkout, llamagen
from tests.slurm.toy import profile


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkout(tmp_path_factory.mktemp("pipeline"), "runs/toy_program.py", "runs/toy_run.py")


def stage(name: str, *arguments: str, **more: object) -> dict[str, object]:
    words = [arguments[0], "{out}/work", *arguments[1:]]
    return {"name": name, "why": "a test", "module": "tokenizer_training.toy_program", "arguments": words, **more}


def command(folder: Path, *stages: dict[str, object]) -> tuple[object, ...]:
    file = folder / "toy.yaml"
    file.write_text(yaml.safe_dump({"kind": "pipeline", "title": "toy", "stages": list(stages)}, sort_keys=False))
    return ("pipeline", file, "--out", folder / "out", "--cluster", profile(folder))


def wait_for(what: Callable[[], object], seconds: float = 90.0) -> None:
    deadline = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.3)


def find(folder: Path) -> JobState:
    return state_of(JobFolder.of(folder), queue.my_jobs())


def kinds(out: Path, name: str) -> list[str]:
    return [event["event"] for event in JobFolder.of(out / "stages" / name).events()]


def test_the_third_of_four_stages_fails_is_mended_and_the_same_command_goes_on(root: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    words = command(
        tmp_path,
        stage("once", "touch", produces=["{out}/work/touched.txt"]),
        stage("count", "work", "120", "0.05", ranks=2, nodes=2, produces=["{out}/work/steps_3.txt"]),
        stage("fragile", "mend"),
        stage("last", "touch", produces=["{out}/work/touched.txt"]),
    )
    shown = llamagen(root, *words, "--dry-run")
    assert shown.returncode == 0, shown.stderr
    assert "4 ranks on 2 nodes" in shown.stdout
    assert not out.exists()

    first = llamagen(root, *words)
    assert first.returncode == 0, first.stderr
    jobs = {
        name: JobFolder.of(out / "stages" / name).events()[0]["job"] for name in ("once", "count", "fragile", "last")
    }
    assert f"after job {jobs['once']}" in first.stdout
    again = llamagen(root, *words)
    assert f"last — job {jobs['last']} is pending already" in again.stdout, "the same command attaches"

    # a stage that is told to stop, saves and is requeued is not over: what waits for it goes on waiting
    wait_for(lambda: (JobFolder.of(out / "stages/count").progress).exists())
    queue.signal(jobs["count"])
    failed = llamagen(root, *words, "--follow")
    assert failed.returncode == 1
    assert "fragile has not ended well" in failed.stdout
    assert "toy.yaml: nonsense was given; mend it" in failed.stdout
    assert kinds(out, "count") == ["submitted", "started", "ended", "requeued", "started", "ended", "done"]
    for rank in range(4):
        assert (out / f"work/steps_{rank}.txt").read_text().split() == [str(n) for n in range(120)]
    done = json.loads((out / "stages/count/launch/DONE.json").read_text())
    assert (done["name"], done["ranks"]) == ("count", 4)
    wait_for(lambda: not find(out / "stages/last").live, 10)
    assert kinds(out, "last") == ["submitted"], "cancelled before it began"

    (out / "work/mended").touch()
    mended = llamagen(root, *words, "--follow")
    assert mended.returncode == 0, mended.stdout + mended.stderr
    assert mended.stdout.count("finished earlier") == 2
    assert "all 4 stages are finished" in mended.stdout
    assert (out / "work/touched.txt").read_text() == "xx", "once by the first stage, once by the last"
    assert not JobFolder.of(out / "stages/fragile").failed.exists()
    assert json.loads((out / "stages/last/launch/DONE.json").read_text())["ranks"] == 1


def test_without_kill_on_invalid_dep_the_stages_after_a_failure_would_wait_for_ever(root: Path, tmp_path: Path) -> None:
    broken = tmp_path / "sabotaged"
    shutil.copytree(root, broken)
    file = broken / "llamagen_dist/launch/slurm/submit.py"
    text = file.read_text()
    good = ', "kill-on-invalid-dep": "yes"'
    assert text.count(good) == 1
    file.write_text(text.replace(good, ""))
    out = tmp_path / "out"
    started = llamagen(broken, *command(tmp_path, stage("fragile", "mend"), stage("last", "touch")))
    assert started.returncode == 0, started.stderr
    wait_for(JobFolder.of(out / "stages/fragile").failed.exists)
    time.sleep(5)
    found = find(out / "stages/last")
    assert found.live
    assert found.queued is not None
    assert (found.queued.state, found.queued.reason) == ("PENDING", "DependencyNeverSatisfied")
    queue.cancel([str(found.job)])


def test_a_stage_that_is_a_sweep_is_an_array_whose_failed_points_are_mended(root: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    content = {
        "kind": "sweep",
        "title": "toy ladder",
        "module": "tokenizer_training.toy_run",
        "config": str(ROOT / "configs/gpt/GPT-B.yaml"),
        "list": {"small": {"train.seed": 1}, "large": {"train.seed": 13}},
    }
    (tmp_path / "ladder.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
    ladder = {"name": "ladder", "why": "a test", "module": "tokenizer_training.toy_run", "config": "ladder.yaml"}
    ladder |= {"out": "{out}/ladder", "nodes": 1, "produces": ["{out}/ladder/large/rate_0.txt"]}
    words = command(tmp_path, ladder, stage("last", "touch"))
    shown = llamagen(root, *words, "--dry-run")
    assert "2 points on 2 ranks" in shown.stdout
    assert "#SBATCH --array=0-1" in shown.stdout

    failed = llamagen(root, *words, "--follow")
    assert failed.returncode == 1, failed.stderr
    assert "ladder/large has not ended well: rank" in failed.stdout
    assert (out / "ladder/small/launch/DONE.json").exists()
    assert not (out / "stages/ladder/launch/DONE.json").exists(), "one point of two"
    wait_for(lambda: not find(out / "stages/last").live, 20)
    assert kinds(out, "last") == ["submitted"], "cancelled before it began"

    (out / "ladder/mended").touch()
    mended = llamagen(root, *words, "--follow")
    assert mended.returncode == 0, mended.stdout + mended.stderr
    assert "1 point on 2 ranks" in mended.stdout
    told = {
        name: [event["event"] for event in JobFolder.of(out / "ladder" / name).events()] for name in ("small", "large")
    }
    assert {name: found.count("started") for name, found in told.items()} == {"small": 1, "large": 2}
    done = [
        json.loads((out / path).read_text())
        for path in ("stages/ladder/launch/DONE.json", "ladder/small/launch/DONE.json")
    ]
    assert done[0]["seconds"] > done[1]["seconds"], "of all points"
    assert kinds(out, "last")[-1] == "done"
    again = llamagen(root, *words)
    assert again.stdout.count("finished earlier") == 2
