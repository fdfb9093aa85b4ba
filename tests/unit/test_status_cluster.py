"""``llamagen status`` of what was launched on a cluster: the folder's files and SLURM's answer, in all situations."""

import time
from pathlib import Path
from typing import Any

import pytest

from llamagen_dist.launch.slurm import queue
from llamagen_dist.launch.status.program import count_restarts
from llamagen_dist.launch.status.survey import look
from tests.unit import run_folders as made
from tests.unit.run_folders import answers, job, only


@pytest.mark.parametrize(
    ("answer", "state", "reason"),
    [
        ([job("7")], "running", ""),
        ([job("7", "PENDING", "Resources", "")], "waiting", "for Resources"),
        ([job("7", "COMPLETING")], "running", "completing"),
        (
            [job("7", "PENDING", "DependencyNeverSatisfied", "")],
            "waiting",
            "for DependencyNeverSatisfied: it will never",
        ),
        ([job("7", "CANCELLED", where="")], "stopped", "job 7 is over (CANCELLED)"),
        ([], "stopped", "job 7 is over (forgotten by SLURM)"),
        ([queue.SilentError("squeue gave no answer within 10 s")], "unknown", "SLURM does not answer"),
    ],
)
def test_a_job_is_what_squeue_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, answer: list[Any], state: str, reason: str
) -> None:
    run = made.training(tmp_path / "a")
    made.lock(run, "7")
    answers(monkeypatch, *answer)
    row = only(run)
    assert (row.state.name, row.state.job) == (state, "7")
    assert row.state.reason.startswith(reason)
    assert row.progress.done == 640  # which needs no SLURM


def test_a_heartbeat_left_by_a_lost_node_is_no_sign_that_a_job_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = made.training(tmp_path / "a")
    made.beat(run)
    made.lock(run, "7")
    answers(monkeypatch)
    assert only(run).state.name == "stopped"


def test_of_several_jobs_the_running_one_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = made.training(tmp_path / "a")
    made.lock(run, "7", "8")
    answers(monkeypatch, job("7", "PENDING", "Resources"), job("8", where="n4"))
    assert (only(run).state.job, only(run).state.where) == ("8", "n4")
    assert only(run).state.reason == "with fewer nodes, while job 7 waits for Resources"
    answers(monkeypatch, job("7"), job("8", "PENDING", "BeginTime", ""))
    assert (only(run).state.job, only(run).state.reason) == ("7", "")
    answers(monkeypatch, job("7", "COMPLETED"))
    made.history(run, ("started", {"job": "7"}), ("gave_up", {"job": "7", "reason": "job 8 runs already"}))
    assert only(run).state.reason == "job 7 is over (COMPLETED): job 8 runs already; the same launch resumes it"


def test_requeued_is_told_from_waiting_for_the_first_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = made.training(tmp_path / "a")
    made.lock(run, "7")
    made.history(run, ("submitted", {"job": "7"}), ("started", {"job": "7", "restart": 0}))
    answers(monkeypatch, job("7", "PENDING", "BeginTime"))
    assert only(run).state.reason == "requeued, waits for BeginTime"
    made.history(run, ("started", {"job": "7"}), ("requeued", {"job": "7", "fault": True, "why": "rank 1: disk full"}))
    assert only(run).state.reason == "requeued, waits for BeginTime, after: rank 1: disk full"


def test_failed_runs_say_why_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = made.training(tmp_path / "a")
    made.lock(run, "7")
    made.history(run, ("submitted", {"job": "7"}), ("failed", {"job": "7"}))
    made.end(run, "no progress in 2 restarts\nlook into the logs")
    answers(monkeypatch, job("7", "FAILED"))
    row = only(run)
    assert (row.state.name, row.state.reason) == ("failed", "no progress in 2 restarts")


def test_a_launch_between_lock_and_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = made.training(tmp_path / "a")
    made.lock(run)
    answers(monkeypatch)
    assert (only(run).state.name, only(run).state.reason) == ("submitting", "by me on login")
    made.dated(run / "launch/lock.json", time.time() - 3600)
    assert only(run).state.name == "stopped"
    answers(monkeypatch, job("7"))  # it carries the lock's token
    assert (only(run).state.name, only(run).state.job) == ("running", "7")


def test_a_run_is_as_long_as_its_launch_says_before_it_has_begun(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "a"
    made.lock(run, "7")
    (run / "launch/config.yaml").write_text((made.training(tmp_path / "b") / "config.yaml").read_text())
    answers(monkeypatch, job("7", "PENDING", "Priority", ""))
    row = only(run)
    assert (row.state.name, row.progress.kind, row.progress.total) == ("waiting", "gpt", 2560)


def test_a_program_without_a_summary_is_finished_when_its_job_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "x"
    made.history(folder, ("submitted", {"job": "7"}), ("started", {"job": "7"}), ("done", {"job": "7"}))
    asked = answers(monkeypatch)
    assert only(folder).state.name == "finished"
    assert not asked  # no lock, no question
    made.history(folder, ("done", {"job": "7"}), ("submitted", {"job": "8"}))
    assert only(folder).state.name == "stopped"


def test_slurm_is_asked_once_and_not_at_all_for_local_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = answers(monkeypatch)
    for number in range(5):
        made.training(tmp_path / str(number))
    look([tmp_path])
    assert asked == []
    for number in range(5):
        made.lock(tmp_path / str(number), f"9_{number}")
    look([tmp_path])
    assert asked == [1]


def test_slurm_is_not_asked_about_what_is_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done, failed = made.training(tmp_path / "done"), made.training(tmp_path / "failed")
    for run, event in ((done, "done"), (failed, "failed")):
        made.lock(run, "7")
        made.history(run, ("submitted", {"job": "7"}), (event, {"job": "7"}))
    asked = answers(monkeypatch)
    assert [row.state.name for row in look([tmp_path]).rows] == ["finished", "failed"]
    assert not asked


def test_a_damaged_folder_does_not_hide_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = made.training(tmp_path / "broken")
    for name in ("launch/lock.json", "launch/history.jsonl", "summary.json", "log/heartbeat-rank-0.json"):
        (broken / name).mkdir(parents=True)  # as unreadable as another user's
    torn = made.training(tmp_path / "torn")
    made.lock(torn, "7")
    (torn / "launch/history.jsonl").write_bytes(b"\xff\x00\n")
    answers(monkeypatch, job("7"))
    found = {row.name: row for row in look([tmp_path]).rows}
    assert (found["broken"].progress.done, found["torn"].state.name) == (640, "running")


def test_restarts_by_kind() -> None:
    def event(name: str, **facts: Any) -> dict[str, Any]:
        return {"event": name, "job": "7", **facts}

    events = [
        event("submitted"),
        event("started", restart=0),
        event("ended", rc=137, outcome="crashed"),
        event("requeued", why="a rank died", fault=True),
        event("started", restart=1),
        event("ended", rc=0, outcome="stopped"),
        event("requeued", why="told to stop", fault=False),
        event("started", restart=2),
        event("started", restart=3),  # SLURM's own
        {"event": "started", "job": "8", "restart": 0},
    ]
    assert count_restarts(events) == {"fault": 1, "signal": 1, "slurm": 1, "launch": 1}
    assert count_restarts([event("submitted"), event("started")]) == {}
    assert count_restarts([event("requeued"), {"event": "started"}, {}]) == {}
