"""What the batch script concludes from how its ranks ended: nothing loops for ever, nothing is given up too soon."""

from typing import Any

import pytest

from llamagen_dist.launch.folder import Limits
from llamagen_dist.launch.slurm.verdict import Verdict, decide


def report(rank: int, outcome: str, message: str = "", ended: float = 1.0, **more: Any) -> dict[str, Any]:
    return {"rank": rank, "outcome": outcome, "message": message, "ended": ended, **more}


def requeued(steps: float, fault: bool = True) -> dict[str, Any]:
    return {"event": "requeued", "steps": steps, "fault": fault}


STOPPED = [report(0, "stopped")]
KILLED: list[dict[str, Any]] = []


def verdict(
    rc: int, reports: list[dict[str, Any]], *events: dict[str, Any], steps: float = 10, **limits: Any
) -> Verdict:
    return decide(rc, reports, Limits(**limits), events, steps)


@pytest.mark.parametrize(
    ("rc", "reports", "action", "fault"),
    [
        (0, [report(0, "done")], "done", False),
        (0, STOPPED, "requeue", False),  # a time limit, a preemption, scancel --signal
        (137, KILLED, "requeue", True),  # kill -9, out of memory
        (75, [{"rank": 1, "sentence": "no step for 6 s: rank 2 is stopped"}], "requeue", True),  # the watchdog
        (143, KILLED, "requeue", False),  # TERM while Python was starting
        (140, KILLED, "requeue", False),  # USR2 then
        (130, [report(1, "interrupted")], "requeue", False),  # before the program listened
        (1, [report(2, "crashed", "Traceback\nIndexError: list index out of range")], "requeue", True),
        (1, [report(0, "crashed", "NonFiniteError: the loss is nan", error="NonFiniteError")], "failed", False),
        (2, [report(1, "user_error", "optim.lr: missing; set it")], "failed", False),
        (0, KILLED, "requeue", True),  # status 0 and no rank 0 that says it is done: not believed
    ],
)
def test_what_follows_each_end(rc, reports, action, fault):
    found = verdict(rc, reports)
    assert (found.action, found.fault) == (action, fault)


def test_the_first_cause_is_named_in_one_line():
    reports = [
        report(0, "crashed", "Traceback\nLostRankError: connection closed", ended=9.0),
        report(3, "crashed", "Traceback (most recent call last):\n  x\nKeyError: 'lr'", ended=8.0),
    ]
    assert verdict(1, reports).reason == "rank 3: KeyError: 'lr'"
    assert verdict(2, [*reports, report(1, "user_error", "data.train: no such folder", 9.5)]).reason == (
        "rank 1: data.train: no such folder"
    )
    assert "killed by signal 9" in verdict(137, []).reason


def test_a_fault_at_the_same_step_again_and_again_is_given_up():
    assert verdict(1, KILLED, requeued(5)).action == "requeue"
    assert verdict(1, KILLED, requeued(5), requeued(10)).action == "requeue"
    stuck = verdict(1, KILLED, requeued(10), requeued(10))
    assert (stuck.action, "no progress in 2 restarts" in stuck.reason) == ("failed", True)
    # a step of progress, and the count begins anew: without that a long run would end at its third fault
    assert verdict(1, KILLED, requeued(10), requeued(10), requeued(10), steps=11).action == "requeue"
    # being stopped again and again without a step is no progress either
    assert verdict(0, STOPPED, requeued(10, fault=False), requeued(10, fault=False)).action == "failed"


def test_time_slices_do_not_use_up_the_faults():
    slices = [requeued(n, fault=False) for n in range(50)]
    assert verdict(0, STOPPED, *slices, steps=100).action == "requeue"
    assert verdict(137, KILLED, *slices, steps=100, max_faults=1).action == "requeue"
    faults = [requeued(n) for n in range(3)]
    used_up = verdict(137, KILLED, *faults, steps=100, max_faults=3)
    assert (used_up.action, "3 restarts after faults used up" in used_up.reason) == ("failed", True)
    assert verdict(0, STOPPED, *faults, steps=100, max_faults=3).action == "requeue"


def test_without_requeue_a_stop_is_the_end():
    found = verdict(0, STOPPED, requeue=False)
    assert (found.action, "requeue is off" in found.reason) == ("failed", True)
    assert verdict(0, [report(0, "done")], requeue=False).action == "done"
