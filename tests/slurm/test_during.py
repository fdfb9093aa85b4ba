"""Checkpoints scored on a real cluster: as jobs of their own, once each, through a requeue of the training."""

import json
import time
from pathlib import Path

import yaml

from llamagen_dist.launch.folder import JobFolder
from llamagen_dist.launch.slurm import lock, queue
from llamagen_dist.tracking import evaluations
from tests.runs.checkout import ROOT, llamagen
from tests.runs.scored_run import BATCH, STAGES, ended, scored_work
from tests.slurm.toy import profile, wait_for

LONG = 1500
"""Steps: long enough to be told to stop in between."""


def submitted(run: Path) -> int:
    """Jobs of all evaluations so far."""
    jobs = [JobFolder.of(path) for path in run.glob("evaluations/step-*/stages/*")]
    return sum(event["event"] == "submitted" for job in jobs for event in job.events())


def test_every_due_checkpoint_is_scored_once_by_jobs_of_its_own_through_a_requeue(tmp_path: Path) -> None:
    (tmp_path / "work").mkdir()
    work = scored_work(tmp_path / "work")
    own = profile(tmp_path, nodes=1)
    small = yaml.safe_load(own.read_text()) | {"ranks_per_node": 1}
    (tmp_path / "small.yaml").write_text(yaml.safe_dump(small))
    run = tmp_path / "run"
    words = [
        *("launch", "llamagen_dist.train_gpt", work / "scored.yaml", f"run_dir={run}", "--cluster", own),
        *(f"train.images={LONG * BATCH}", f"checkpoint.every_images={500 * BATCH}"),
        f"evaluation.every_images={700 * BATCH}",
    ]
    refused = llamagen(ROOT, *words)
    assert refused.returncode == 2
    assert "evaluation.cluster: is empty; name the profile" in refused.stderr
    assert not run.exists()

    words.append(f"evaluation.cluster={tmp_path / 'small.yaml'}")
    launched = llamagen(ROOT, *words)
    assert launched.returncode == 0, launched.stderr
    wait_for((run / "checkpoints/step_00000500/COMPLETE").exists, 120)
    held = lock.read(JobFolder.of(run))
    assert held is not None
    queue.signal(held.jobs[0])
    wait_for(JobFolder.of(run).done.exists, 240)
    events = [event["event"] for event in JobFolder.of(run).events()]
    assert events == ["submitted", "started", "ended", "requeued", "started", "ended", "done"]

    due = [json.loads(path.read_text())["step"] for path in run.glob("evaluations/step-*/checkpoint.json")]
    assert len(due) == 2, "the first at or after image 5,600, and the last"
    assert max(due) == LONG
    wait_for(lambda: [line["step"] for line in evaluations.lines(run)] == sorted(due), 240)
    wait_for(lambda: all(ended(run, step)["record"] for step in due), 60)
    assert [ended(run, step) for step in due] == [dict.fromkeys(STAGES, 1)] * 2
    lines = [json.loads(line) for line in (run / "evaluations.jsonl").read_text().splitlines()]
    assert lines == evaluations.lines(run)
    assert all(line["images_seen"] == line["step"] * BATCH and line["fid"] > 0 for line in lines)
    assert submitted(run) == 2 * len(STAGES)
    time.sleep(1)
    again = llamagen(ROOT, "evaluate", run, "--cluster", tmp_path / "small.yaml")
    assert again.returncode == 0, again.stderr
    assert submitted(run) == 2 * len(STAGES), "nothing is left to do"

    (run / f"evaluations/step-{LONG:08d}/result.json").unlink()
    twice = llamagen(ROOT, "evaluate", run, "--cluster", tmp_path / "small.yaml", "--follow")
    assert twice.returncode == 0, twice.stderr
    assert submitted(run) == 3 * len(STAGES), "sabotage twin: without its mark it is submitted again"
    assert "all 3 stages are finished" in twice.stdout
    assert ended(run, LONG)["record"] == 2
