"""A node that SLURM has lost while everything on it lives on: ranks, srun and the batch script. On the real cluster."""

import os
import shutil
import signal
import time
from pathlib import Path

import pytest

from llamagen_dist.launch.slurm import queue
from tests.slurm import local_cluster
from tests.slurm.faults.checks import leftovers, right_samples
from tests.slurm.faults.programs import GPT, paced_checkout
from tests.slurm.faults.trial import Trial, wait_for

ONE_RANK = ("parallel.tensor=1", "parallel.zero=0", f"train.images={400 * GPT.batch}")  # it needs nobody to go on
PROFILE = {"nodes": 1, "ranks_per_node": 1}


@pytest.fixture
def trials(tmp_path: Path) -> dict[str, Trial]:
    config = GPT.write_config(tmp_path / "data")
    checkout = paced_checkout(tmp_path / "checkout")
    hasty = tmp_path / "hasty"  # sabotage twin: its batch script does not see that the job waits to run again
    shutil.copytree(checkout, hasty)
    script = hasty / "llamagen_dist/launch/slurm/submit.py"
    text = script.read_text()
    assert text.count("JobState=PENDING") == 1
    script.write_text(text.replace("JobState=PENDING", "JobState=NEVER"))
    return {
        name: Trial(GPT, config, code, tmp_path / name, profile=PROFILE, settings=ONE_RANK, pace_s=0.5)
        for name, code in (("run", checkout), ("hasty run", hasty))
    }


def lose(node: str) -> None:
    """Kill its slurmd alone."""
    pid = Path(os.environ["SLURM_CONF"]).with_name(f"slurmd.{node}.pid")
    os.kill(int(pid.read_text()), signal.SIGKILL)


def gone(pid: int) -> bool:
    try:
        return "State:\tZ" in Path(f"/proc/{pid}/status").read_text()
    except FileNotFoundError:
        return True


def test_the_run_goes_on_elsewhere_and_what_lives_on_neither_writes_nor_calls_it_failed(
    trials: dict[str, Trial],
) -> None:
    nodes = []
    try:
        for trial in trials.values():
            trial.launch()
        for trial in trials.values():
            trial.at_step(5)
            nodes += trial.nodes()
        run = trials["run"]
        before, pid = run.owner, run.pids()[0]
        for node in nodes:
            lose(node)
        lost = time.time()
        first = run.goes_on(before)
        wait_for(lambda: gone(pid), "the end of the rank on the lost node", 30)
        text = run.log()
        assert f"this run continues as job {run.owner}; this process, of job {before}, stops" in text
        lived_on = [step.number for step in run.steps() if step.owner == before and step.time > lost]
        assert lived_on, "it was no node of the dead"
        begun = run.events("started")[-1]["time"]
        late = [step for step in run.steps() if step.owner == before and step.time > begun + 3]
        assert late == [], "within a look or two"
        wait_for(lambda: run.steps()[-1].number > first.number + 3, "some more steps")
        steps = [line["step"] for line in run.metrics() if "loss" in line]
        assert steps == list(range(1, len(steps) + 1)), "no line of the other came between"
        assert right_samples(run.metrics(), GPT.digest) == []
        assert [event["event"] for event in run.events("failed", "done")] == []
        job = queue.my_jobs()[run.job]
        assert job.alive

        failed = wait_for(lambda: trials["hasty run"].events("failed"), "the hasty script's end")
        assert "scontrol requeue failed" in failed[0]["reason"], "although it goes on"
    finally:
        queue.cancel([str(event["job"]) for trial in trials.values() for event in trial.events("submitted")])
        for node in nodes:
            local_cluster.call("node-up", node)
    wait_for(lambda: not queue.my_jobs()[run.job].alive, "the end of the job", 60)
    assert [left for left in leftovers(run.folder) if "half a checkpoint" not in left] == []
