"""``llamagen status``: what is said of runs of this machine from their files, and how it is shown."""

import json
import os
import pty
import select
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llamagen_dist.config import dump, load
from llamagen_dist.errors import UserError
from llamagen_dist.launch.status import program, screen
from llamagen_dist.launch.status.program import Reader, one_line
from llamagen_dist.launch.status.survey import look
from tests.unit import run_folders as made
from tests.unit.run_folders import only

ROOT = Path(__file__).resolve().parents[2]


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
    with tempfile.TemporaryDirectory() as scratch:
        (Path(scratch) / "metrics.jsonl").write_bytes(b"\n".join(lines))
        Reader().progress(Path(scratch))


def test_only_the_tail_of_long_metrics_is_read(tmp_path: Path) -> None:
    run = made.training(tmp_path / "a", lines=20_000)
    best = float("inf")
    for _ in range(5):  # a busy machine is slow, not wrong
        began = time.perf_counter()
        assert Reader().progress(run).done == 64 * 20_000
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
        assert program._IMAGES.search(text)[1] == str(config.train.images), file  # type: ignore[index]
        assert program._KIND.search(text)[1] == config.kind  # type: ignore[index]
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
    run = made.training(tmp_path / "a")
    made.beat(run, started="1")
    monkeypatch.setattr(program, "lives", lambda note: os.path.exists(f"/proc/{note['pid']}"))
    assert only(run).state.name == "running"


def test_without_the_floor_an_age_would_be_negative(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = made.training(tmp_path / "a")
    made.dated(run / "checkpoints/step_00000005/COMPLETE", time.time() + 90)
    monkeypatch.setattr(Reader, "age", lambda self, path: self.now - path.stat().st_mtime if path.exists() else None)
    assert (look([run]).rows[0].progress.saved_s or 0) < 0
