"""An array's items are jobs of their own: what becomes of one is nothing to the others."""

import time
from pathlib import Path
from typing import Any

import pytest

from llamagen_dist.config import load
from llamagen_dist.launch.slurm import queue, submission
from llamagen_dist.launch.slurm.records import Limits, Place, Work

ROOT = Path(__file__).resolve().parents[2]


def array(out: Path) -> list[str]:
    """Three items of a module of the standard library: two sleep, the last one dies."""
    cluster = load(ROOT / "slurm/local.yaml", ["nodes=1", "ranks_per_node=1"], kind="cluster")
    code = (
        "import time; time.sleep(200)",
        "import time; time.sleep(200)",
        "import os, time; time.sleep(2); os._exit(3)",
    )
    works = [
        Work(str(n), "timeit", ("-n1", "-r1", text), str(out / str(n)), str(ROOT), limits=Limits(max_stuck=1))
        for n, text in enumerate(code)
    ]
    return submission.submit(works, cluster, submission.size_of(cluster))


def starts(out: Path) -> list[int]:
    found = [Place.of(out / str(n)).events() for n in range(3)]
    return [sum(event["event"] == "started" for event in events) for events in found]


def wait_for(out: Path, wanted: list[int]) -> None:
    deadline = time.monotonic() + 90
    while starts(out) != wanted:
        assert time.monotonic() < deadline, starts(out)
        time.sleep(0.5)


def test_a_requeue_is_of_one_item_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # The last item's SLURM_JOB_ID is the whole array's id: it is the one to look at.
    jobs = array(tmp_path / "good")
    original = submission._executor

    def by_job_id(*arguments: Any) -> Any:
        executor = original(*arguments)
        item = "${SLURM_ARRAY_JOB_ID}_${SLURM_ARRAY_TASK_ID}"
        lines = executor.parameters["teardown"]
        executor.parameters["teardown"] = [line.replace(f"requeue {item}", "requeue $SLURM_JOB_ID") for line in lines]
        assert executor.parameters["teardown"] != lines
        return executor

    monkeypatch.setattr(submission, "_executor", by_job_id)
    jobs += array(tmp_path / "sabotaged")
    try:
        wait_for(tmp_path / "sabotaged", [2, 2, 2])
        wait_for(tmp_path / "good", [1, 1, 2])
        time.sleep(8)  # longer than it takes to start again
        assert starts(tmp_path / "good") == [1, 1, 2]
    finally:
        queue.cancel(jobs)
