"""An array's items are jobs of their own: what becomes of one is nothing to the others."""

import time
from pathlib import Path
from typing import Any

import pytest

from llamagen_dist.config import load
from llamagen_dist.launch.folder import JobFolder, JobSpec, Limits, outcome_of
from llamagen_dist.launch.slurm import lock, queue
from llamagen_dist.launch.slurm.submit import Submission, size_of

ROOT = Path(__file__).resolve().parents[2]


def array(out: Path) -> list[str]:
    """Three items of a module of the standard library: two sleep, the last one dies."""
    cluster = load(ROOT / "slurm/local.yaml", ["nodes=1", "ranks_per_node=1"], kind="cluster")
    code = (
        "import time; time.sleep(200)",
        "import time; time.sleep(200)",
        "import os, time; time.sleep(2); os._exit(3)",
    )
    specs = tuple(
        JobSpec(str(n), "timeit", ("-n1", "-r1", text), str(out / str(n)), str(ROOT), limits=Limits(max_stuck=1))
        for n, text in enumerate(code)
    )
    return Submission(specs, cluster, size_of(cluster)).submit()


def starts(out: Path) -> list[int]:
    found = [JobFolder.of(out / str(n)).events() for n in range(3)]
    return [sum(event["event"] == "started" for event in events) for events in found]


def wait_for(out: Path, wanted: list[int]) -> None:
    deadline = time.monotonic() + 90
    while starts(out) != wanted:
        assert time.monotonic() < deadline, starts(out)
        time.sleep(0.5)


def test_a_requeue_is_of_one_item_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # The last item's SLURM_JOB_ID is the whole array's id: it is the one to look at.
    jobs = array(tmp_path / "good")
    original = Submission._executor

    def by_job_id(*arguments: Any) -> Any:
        executor = original(*arguments)
        item = "${SLURM_ARRAY_JOB_ID}_${SLURM_ARRAY_TASK_ID}"
        lines = executor.parameters["teardown"]
        executor.parameters["teardown"] = [line.replace(f"requeue {item}", "requeue $SLURM_JOB_ID") for line in lines]
        assert executor.parameters["teardown"] != lines
        return executor

    monkeypatch.setattr(Submission, "_executor", by_job_id)
    jobs += array(tmp_path / "sabotaged")
    try:
        wait_for(tmp_path / "sabotaged", [2, 2, 2])
        wait_for(tmp_path / "good", [1, 1, 2])
        time.sleep(8)  # longer than it takes to start again
        assert starts(tmp_path / "good") == [1, 1, 2]
    finally:
        queue.cancel(jobs)


def test_no_item_begins_before_its_folder_names_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Naming the items one after another takes a slow disk long; those that are named last must not have ended by then.
    The twin is not submitted held."""
    cluster = load(ROOT / "slurm/local.yaml", ["nodes=1", "ranks_per_node=1"], kind="cluster")
    original, slow = lock.name_submitted, 2.0

    def name_slowly(*arguments: Any, **facts: Any) -> None:
        time.sleep(slow)
        original(*arguments, **facts)

    monkeypatch.setattr(lock, "name_submitted", name_slowly)

    def outcomes(out: Path) -> list[str]:
        specs = tuple(JobSpec(str(n), "timeit", ("-n1", "pass"), str(out / str(n)), str(ROOT)) for n in range(3))
        jobs = Submission(specs, cluster, size_of(cluster)).submit()
        deadline = time.monotonic() + 60
        while any(state.alive for job, state in queue.my_jobs().items() if job in jobs):
            assert time.monotonic() < deadline
            time.sleep(0.5)
        return [outcome_of(JobFolder.of(spec.folder).events()) for spec in specs]

    assert outcomes(tmp_path / "held") == ["done"] * 3
    executor = Submission._executor

    def not_held(self: Submission) -> Any:
        made = executor(self)
        del made.parameters["additional_parameters"]["hold"]
        return made

    monkeypatch.setattr(Submission, "_executor", not_held)
    monkeypatch.setattr(queue, "release", lambda job: None)
    slow = 6.0
    assert outcomes(tmp_path / "sabotaged")[-1] == "", "done before it was submitted: it looks as if it had not ended"
