"""``llamagen status``: what is said of runs from their files and SLURM's answer, true in each of their situations."""

import json
import os
import pty
import select
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from llamagen_dist.config import dump, load
from llamagen_dist.errors import UserError
from llamagen_dist.launch.slurm import queue
from llamagen_dist.launch.slurm.queue import QueuedJob
from llamagen_dist.launch.status import files, screen, survey
from llamagen_dist.launch.status.files import Clock
from llamagen_dist.launch.status.state import count_restarts, one_line
from llamagen_dist.launch.status.survey import Row, look
from llamagen_dist.process import identify
from tests.unit import run_folders as made

ROOT = Path(__file__).resolve().parents[2]


def job(name: str, state: str = "RUNNING", reason: str = "None", where: str = "n[1-2]") -> QueuedJob:
    return QueuedJob(name, state, reason, 2, where, "1:00:00", "t", "run")


def answers(monkeypatch: pytest.MonkeyPatch, *jobs: QueuedJob | Exception) -> list[int]:
    """Let squeue answer so; returns a list that grows by one with every question."""
    asked: list[int] = []

    def my_jobs(patience_s: float) -> dict[str, QueuedJob]:
        asked.append(1)
        for one in jobs:
            if isinstance(one, Exception):
                raise one
        return {one.job: one for one in jobs if isinstance(one, QueuedJob)}

    monkeypatch.setattr(queue, "my_jobs", my_jobs)
    return asked


def only(folder: Path) -> Row:
    (row,) = look([folder]).rows
    return row


# --- runs of this machine ---


def test_a_running_run_tells_how_far_it_is_and_how_long_it_takes(tmp_path: Path) -> None:
    run = made.training(tmp_path / "a", lines=10)
    made.beat(run)
    row = only(run)
    assert (row.name, row.state.name, row.progress.kind) == ("a", "running", "gpt")
    assert (row.progress.done, row.progress.total, row.progress.loss) == (640, 2560, 8.0)
    assert row.eta_s == pytest.approx((2560 - 640) / 100.0)
    assert row.progress.saved_step == 5
    assert row.progress.saved_s == pytest.approx(0, abs=30)


def test_the_speed_is_the_middle_of_the_last_lines(tmp_path: Path) -> None:
    run = made.training(tmp_path / "a")
    with open(run / "metrics.jsonl", "a") as file:
        file.write(json.dumps({"step": 11, "images_seen": 704, "loss": 8.0, "images_per_s": 1.0}) + "\n")
    made.beat(run)
    assert only(run).progress.images_per_s == 100.0


def test_a_process_that_is_gone_does_not_run_whatever_its_files_say(tmp_path: Path) -> None:
    run = made.training(tmp_path / "a")
    made.beat(run, pid=2**22 + 1)
    assert only(run).state.name == "stopped"
    assert "gone without a message" in only(run).state.reason
    made.beat(run, started="1")  # the pid lives, but is another process
    assert only(run).state.name == "stopped"


def test_a_rank_on_another_machine_runs_while_its_heartbeat_is_fresh(tmp_path: Path) -> None:
    run = made.training(tmp_path / "a")
    file = made.beat(run, host="elsewhere", time=0.0)  # its clock may be anything
    assert (only(run).state.name, only(run).state.where) == ("running", "elsewhere")
    made.dated(file, time.time() - 300)
    assert only(run).state.name == "stopped"


@pytest.mark.parametrize(
    ("facts", "state", "reason"),
    [
        ({"outcome": "done", "ended": 1.0}, "finished", ""),
        (
            {"outcome": "user_error", "message": "x.yaml: lr: too large; lower it", "ended": 1.0},
            "failed",
            "x.yaml: lr: too large; lower it",
        ),
        (
            {"outcome": "crashed", "message": "Traceback\n  File\nIndexError: no\n", "ended": 1.0},
            "failed",
            "IndexError: no",
        ),
        ({"outcome": "stopped", "message": "stopped at image 5", "ended": 1.0}, "stopped", "stopped at image 5"),
        ({}, "stopped", "its processes are gone"),
    ],
)
def test_how_a_launched_program_ended(tmp_path: Path, facts: dict[str, Any], state: str, reason: str) -> None:
    (tmp_path / "p").mkdir()
    (tmp_path / "p/launch.lock").touch()
    made.note(tmp_path / "p/log", 0, **facts)
    row = only(tmp_path / "p")
    assert row.state.name == state
    assert row.state.reason.startswith(reason)


def test_the_first_rank_that_failed_is_the_reason(tmp_path: Path) -> None:
    run = made.training(tmp_path / "a")
    made.beat(run, 0, ended="gave up: rank 1 was killed")
    made.beat(run, 1, ended="NonFiniteError: loss in step 7")
    assert only(run).state.reason == "NonFiniteError: loss in step 7"


def test_finished_needs_all_images(tmp_path: Path) -> None:
    run = made.training(tmp_path / "a", lines=40)
    made.summarise(run, images=1280)
    assert only(run).state.name == "stopped"
    made.summarise(run)
    assert (only(run).state.name, only(run).eta_s) == ("finished", None)


def test_torn_and_foreign_lines_do_no_harm(tmp_path: Path) -> None:
    run = made.training(tmp_path / "a")
    with open(run / "metrics.jsonl", "a") as file:
        file.write('[1]\n{"images_seen": "x"}\n{"step": 11, "images_se')
    assert only(run).progress.done == 640
    (run / "summary.json").write_text("{")
    (run / "config.yaml").write_bytes(b"\xff\xfe: [")
    assert only(run).progress.total is None


@given(
    st.lists(
        st.one_of(st.binary(max_size=60), st.builds(lambda n: json.dumps({"images_seen": n}).encode(), st.integers(0)))
    )
)
def test_any_bytes_in_metrics_are_read(lines: list[bytes]) -> None:
    import tempfile

    with tempfile.TemporaryDirectory() as scratch:
        (Path(scratch) / "metrics.jsonl").write_bytes(b"\n".join(lines))
        files.progress(Path(scratch), Clock())


def test_only_the_tail_of_long_metrics_is_read(tmp_path: Path) -> None:
    run = made.training(tmp_path / "a", lines=20_000)
    best = float("inf")
    for _ in range(5):  # a busy machine is slow, not wrong
        began = time.perf_counter()
        assert files.progress(run, Clock()).done == 64 * 20_000
        best = min(best, time.perf_counter() - began)
    assert best < 0.05  # all of its 7 MB would take 0.1 s


def test_the_length_of_every_kind_of_training_is_found_in_its_config() -> None:
    found = 0
    for file in sorted((ROOT / "configs").glob("gpt/*.yaml")) + sorted((ROOT / "configs").glob("tokenizer/*.yaml")):
        try:
            config = load(file, ["data.train=t", "data.validation=v", "run_dir=r"])
        except UserError:
            continue  # needs more settings
        text = dump(config)
        assert files._IMAGES.search(text)[1] == str(config.train.images), file  # type: ignore[index, attr-defined]
        assert files._KIND.search(text)[1] == config.kind  # type: ignore[index, attr-defined]
        found += 1
    assert found > 8


# --- clocks ---


def test_a_file_of_the_future_is_no_negative_age_and_is_said(tmp_path: Path) -> None:
    run = made.training(tmp_path / "a")
    made.dated(run / "checkpoints/step_00000005/COMPLETE", time.time() + 90)
    found = look([run])
    assert found.rows[0].progress.saved_s == 0.0
    assert found.clock_ahead_s == pytest.approx(90, abs=5)
    assert "90 s in the future" in " ".join(screen.below(found)) or "89 s in the future" in " ".join(
        screen.below(found)
    )
    made.dated(run / "checkpoints/step_00000005/COMPLETE", time.time() - 90)
    assert "future" not in " ".join(screen.below(look([run])))


# --- on a cluster ---


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


# --- folders of runs ---


def test_a_pipeline_shows_its_stages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    names = ("pack", "gpt", "sample")
    stages = [{"name": name, "why": "w", "module": "tokenizer_training.toy"} for name in names]
    (out / "stages").mkdir(parents=True)
    (out / "config.yaml").write_text(yaml.safe_dump({"kind": "pipeline", "title": "t", "stages": stages}))
    (out / "stages/pack").mkdir()
    (out / "stages/pack/DONE.json").write_text("{}")
    gpt = out / "stages/gpt"
    run = made.training(out / "gpt-run")
    gpt.mkdir()
    (gpt / "config.yaml").write_text((run / "config.yaml").read_text())
    made.lock(gpt, "7")
    answers(monkeypatch, job("7"))
    found = {row.name: row for row in look([out]).rows}
    assert [row.depth for row in found.values()] == [0, 1, 1, 1]
    assert {name: row.state.name for name, row in found.items()} == {
        "out": "running",
        "pack": "finished",
        "gpt": "running",
        "sample": "waiting",
    }
    assert (found["gpt"].progress.done, found["gpt"].progress.total) == (640, 2560)
    assert found["out"].state.reason == "1 of 3 stages are done"


def test_a_stage_that_is_a_sweep_shows_its_points(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stages = [{"name": "ladder", "why": "w", "module": "m", "out": "{out}/{where}"}, {"name": "b", "module": "m"}]
    data = {"kind": "pipeline", "variables": {"where": "points"}, "stages": stages}
    (tmp_path / "stages/ladder").mkdir(parents=True)
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(data))
    for number in range(2):
        made.lock(made.training(tmp_path / f"points/d{number}"), f"9_{number}")
    (tmp_path / "points/config.yaml").write_text("kind: sweep\n")
    answers(monkeypatch, job("9_0"), job("9_1", "PENDING", "Resources", ""))
    rows = look([tmp_path]).rows
    assert [(row.name, row.depth, row.state.name) for row in rows[1:]] == [
        ("ladder", 1, "running"),
        ("d0", 2, "running"),
        ("d1", 2, "waiting"),
        ("b", 1, "waiting"),
    ]
    assert rows[0].state.name == "running"
    (tmp_path / "stages/ladder/DONE.json").write_text("{}")
    assert look([tmp_path]).rows[1].state.name == "finished"


def test_a_pipeline_between_two_stages_runs_while_its_launcher_does(tmp_path: Path) -> None:
    stages = [{"name": name, "why": "w", "module": "m"} for name in ("a", "b")]
    (tmp_path / "stages/a").mkdir(parents=True)
    (tmp_path / "stages/a/DONE.json").write_text("{}")
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({"kind": "pipeline", "stages": stages}))
    me = identify()
    (tmp_path / "lock").write_text(json.dumps({"pid": me.pid, "started": me.started}))
    assert look([tmp_path]).rows[0].state.name == "running"
    (tmp_path / "lock").write_text(json.dumps({"pid": me.pid, "started": "1"}))
    assert (look([tmp_path]).rows[0].state.name, look([tmp_path]).rows[2].state.name) == ("stopped", "waiting")


def test_a_ladder_shows_its_rungs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = tmp_path / "ladder"
    small, large = made.training(whole / "1small", lines=40), made.training(whole / "2large")
    made.summarise(small)
    made.lock(whole, "7")
    answers(monkeypatch, job("7"))
    rows = look([tmp_path]).rows
    assert [(row.name, row.depth, row.state.name) for row in rows] == [
        ("ladder", 0, "running"),
        ("1small", 1, "finished"),
        ("2large", 1, "running"),
    ]
    assert rows[2].folder == large


def test_a_sweep_shows_its_points(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "lr"
    for number in range(4):
        made.lock(made.training(out / f"lr={number}"), f"9_{number}")
    (out / "config.yaml").write_text("kind: sweep\nmodule: llamagen_dist.train_gpt\n")
    made.history(out / "lr=0", ("submitted", {"job": "9_0"}), ("done", {"job": "9_0"}))
    made.history(out / "lr=1", ("submitted", {"job": "9_1"}), ("failed", {"job": "9_1"}))
    made.end(out / "lr=1", "rank 0: the loss is not finite")
    asked = answers(monkeypatch, job("9_2"), job("9_3", "PENDING", "JobArrayTaskLimit", ""))
    rows = look([tmp_path]).rows
    assert asked == [1]
    assert [(row.name, row.depth, row.state.name) for row in rows] == [
        ("lr", 0, "running"),
        ("lr=0", 1, "finished"),
        ("lr=1", 1, "failed"),
        ("lr=2", 1, "running"),
        ("lr=3", 1, "waiting"),
    ]
    assert rows[0].state.reason == "4 points: 1 failed, 1 running, 1 waiting, 1 finished"
    assert rows[2].state.reason == "rank 0: the loss is not finite"


def test_a_point_run_on_this_machine(tmp_path: Path) -> None:
    run = made.training(tmp_path / "a")
    made.note(run / "launch/log", 0, outcome="crashed", message="OSError: disk", ended=1.0)
    assert (only(run).state.name, only(run).state.reason) == ("failed", "OSError: disk")
    (run / "launch/DONE.json").write_text("{}")
    made.note(run / "launch/log", 0, outcome="done", ended=1.0)
    assert only(run).state.name == "finished"


def test_runs_are_found_below_and_nothing_inside_of_them(tmp_path: Path) -> None:
    made.training(tmp_path / "sweep/a")
    made.training(tmp_path / "sweep/b/code/c")
    made.training(tmp_path / "other")
    assert [row.name for row in look([tmp_path]).rows] == ["other", "sweep/a"]
    assert [row.name for row in look([tmp_path / "sweep", tmp_path / "other"]).rows] == ["a", "other"]


def test_a_folder_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="there is no such folder"):
        look([tmp_path / "absent"])


# --- what is shown ---


def test_the_command_prints_a_table_and_json(tmp_path: Path) -> None:
    made.beat(made.training(tmp_path / "runs/fast"))
    made.note(made.training(tmp_path / "runs/broken") / "log", 0, outcome="crashed", message="OSError: disk", ended=1.0)
    words = [sys.executable, "-m", "llamagen_dist.cli", "status"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    table = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True).stdout
    lines = {line.split()[0]: line for line in table.splitlines() if line.strip()}
    assert lines["fast"].split()[:8] == ["fast", "running", "640", "2.56k", "25", "%", "8.0000", "100"]
    assert "failed" in lines["broken"]
    assert lines["broken"].rstrip().endswith("OSError: disk")
    assert "2 runs: 1 running, 1 failed" in table
    text = subprocess.run(
        [*words, "--json"], cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
    ).stdout
    runs = {run["name"]: run for run in json.loads(text)["runs"]}
    assert (runs["fast"]["done"], runs["fast"]["state"], runs["broken"]["reason"]) == (640, "running", "OSError: disk")


def test_nothing_heavy_is_imported_for_it(tmp_path: Path) -> None:
    made.training(tmp_path / "a")
    code = (
        "import sys; from llamagen_dist import cli; cli.main(sys.argv[1:]); "
        "print(sorted({'torch', 'numpy', 'submitit', 'pydantic', 'yaml'} & set(sys.modules)))"
    )
    out = subprocess.run(
        [sys.executable, "-c", code, "status", str(tmp_path)], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    assert out.splitlines()[-1] == "[]"


def test_watch_shows_it_again_and_ends_well_at_ctrl_c(tmp_path: Path) -> None:
    run = made.training(tmp_path / "a")
    made.beat(run)
    screen_side, program_side = pty.openpty()
    code = (
        "import sys; from llamagen_dist import cli; from llamagen_dist.launch.status import screen; "
        "screen.EVERY_S = 0.5; cli.main(sys.argv[1:])"
    )
    words = [sys.executable, "-c", code, "status", "--watch", str(tmp_path)]
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "120", "LINES": "20"}
    watching = subprocess.Popen(words, cwd=ROOT, env=environment, stdout=program_side, stderr=program_side)
    os.close(program_side)
    shown = b""

    def seen(text: bytes) -> bool:
        nonlocal shown
        if select.select([screen_side], [], [], 0.2)[0]:
            shown += os.read(screen_side, 1 << 16)
        return text in shown

    try:
        deadline = time.monotonic() + 120
        while not seen(b"640") and time.monotonic() < deadline:
            pass
        (run / "metrics.jsonl").write_text(made.metrics(11, 64))
        while not seen(b"704") and time.monotonic() < deadline:
            pass
        watching.send_signal(signal.SIGINT)
        assert watching.wait(60) == 0
        assert b"704" in shown
    finally:
        watching.kill()
        os.close(screen_side)


@pytest.mark.parametrize(
    ("images", "text"), [(0, "0"), (999, "999"), (12_800, "12.8k"), (1_281_167, "1.28M"), (3 * 10**9, "3G")]
)
def test_counts_are_short(images: int, text: str) -> None:
    assert screen.count(images) == text


def test_one_line() -> None:
    assert one_line("\n a  b \n c") == "a b"
    assert one_line("\n a  b \n c \n", last=True) == "c"
    assert one_line("") == ""


@pytest.mark.parametrize("width", [60, 80, 120, None])
def test_no_word_of_a_reason_is_lost_at_any_width(tmp_path: Path, width: int | None) -> None:
    reason = "rank 1 was killed " * 9
    made.note(made.training(tmp_path / "a") / "log", 0, outcome="died", message=reason, ended=1.0)
    lines = screen.table(look([tmp_path]).rows, width)
    assert reason.split() == " ".join(line.plain for line in lines).split()[-len(reason.split()) :]
    assert width is None or len(lines[1]) <= width


# --- sabotage: without these, status would lie, and the tests above would see it ---


def test_without_the_identity_a_dead_run_would_be_running(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from llamagen_dist.launch.status import state

    run = made.training(tmp_path / "a")
    made.beat(run, started="1")
    monkeypatch.setattr(state, "lives", lambda note: os.path.exists(f"/proc/{note['pid']}"))
    assert only(run).state.name == "running"


def test_without_the_floor_an_age_would_be_negative(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = made.training(tmp_path / "a")
    made.dated(run / "checkpoints/step_00000005/COMPLETE", time.time() + 90)
    monkeypatch.setattr(Clock, "age", lambda self, path: self.now - path.stat().st_mtime if path.exists() else None)
    assert (survey.look([run]).rows[0].progress.saved_s or 0) < 0
