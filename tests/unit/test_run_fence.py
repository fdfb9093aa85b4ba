"""Who may write in a run directory, how long a stop takes, and what disks without room or locks mean."""

import errno
import fcntl
import json
import os
import resource
import time
from pathlib import Path

import pytest

from llamagen_dist import program
from llamagen_dist.config import ShardAccess
from llamagen_dist.console import set_up_logging
from llamagen_dist.errors import Superseded, UserError
from llamagen_dist.files import sync_folder, write_text
from llamagen_dist.parallel.topology import Topology
from llamagen_dist.training import fence, run, timing
from llamagen_dist.training.fence import Fence
from llamagen_dist.training.run import Run
from llamagen_dist.training.timing import Stopwatch, Timing


def name(lock: Path, owner: str | None) -> None:
    lock.parent.mkdir(parents=True, exist_ok=True)
    write_text(lock, json.dumps({"token": "x", "jobs": ["12"], "owner": owner}))


@pytest.fixture
def lock(tmp_path, monkeypatch) -> Path:
    """A rank of incarnation 12.0, which owns the run."""
    monkeypatch.setattr(fence, "GONE_PATIENCE_S", 0.3)
    file = tmp_path / "launch" / "lock.json"
    name(file, "12.0")
    monkeypatch.setenv("LLAMAGEN_LOCK", str(file))
    monkeypatch.setenv("LLAMAGEN_OWNER", "12.0")
    return file


# --- the lock ---


@pytest.mark.parametrize(("owner", "said"), [("12.1", "as job 12.1"), ("34.0", "as job 34.0"), (None, "not begun yet")])
def test_another_owner_is_named_and_its_own_job_too(lock, owner, said):
    mine = Fence.of_environment()
    mine.check()
    assert mine.lost() == ""
    name(lock, owner)
    with pytest.raises(Superseded, match=said) as lost:
        mine.check()
    assert mine.lost() == str(lost.value)
    assert "of job 12.0" in str(lost.value)
    name(lock, "12.0")
    mine.check()


def test_a_lock_is_waited_for_while_it_cannot_be_read(lock):
    """A look that never waits says nothing then: it is no proof."""
    mine = Fence.of_environment()
    lock.unlink()
    assert mine.lost() == ""
    began = time.monotonic()
    with pytest.raises(Superseded, match="cannot be read any more"):
        mine.check()
    assert time.monotonic() - began > 0.25
    lock.write_text("{")
    with pytest.raises(Superseded, match="cannot be read any more"):
        mine.check()
    lock.write_text("[]")
    assert mine.lost() == ""


def test_outside_a_job_nothing_is_asked(lock, monkeypatch):
    monkeypatch.delenv("LLAMAGEN_OWNER")
    name(lock, "34.0")
    mine = Fence.of_environment()
    mine.check()
    assert not mine.active
    assert mine.lost() == ""


def test_a_run_that_went_on_elsewhere_gets_no_line_from_here(lock, tmp_path):
    here = Run(tmp_path, Topology(), "")
    here.metrics(images_seen=16)
    before = (tmp_path / "metrics.jsonl").read_text()
    name(lock, "12.1")
    for write in (lambda: here.metrics(images_seen=32), lambda: here.cut_metrics(0), lambda: here.summary(step=2)):
        with pytest.raises(Superseded):
            write()
    assert (tmp_path / "metrics.jsonl").read_text() == before
    assert not here.finished()
    here.fence = Fence()  # sabotage twin: without the fence the line is written
    here.metrics(images_seen=32)
    assert (tmp_path / "metrics.jsonl").read_text() != before


@pytest.fixture
def launched(tmp_path, monkeypatch):
    """This process is a rank that llamagen launched; its lines are plain again afterwards."""
    monkeypatch.setenv(program.ERROR_FILE, str(tmp_path / "error.txt"))
    yield
    set_up_logging(launched=False)


def test_a_program_that_was_superseded_says_so_and_ends_with_75(tmp_path, launched, capsys):

    def main(argv: list[str]) -> None:
        raise Superseded("this run continues as job 12.1")

    with pytest.raises(SystemExit) as end:
        program.run(main)
    assert end.value.code == 75
    time_and_rank, _, line = capsys.readouterr().err.partition(" | ")
    assert time_and_rank.endswith(" rank 0")
    assert line == "llamagen: this run continues as job 12.1\n"
    assert (tmp_path / "error.txt").read_text() == "this run continues as job 12.1"


# --- a full disk ---


def test_metrics_on_a_full_disk_are_one_sentence(tmp_path):
    (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
    with pytest.raises(UserError, match=r"metrics\.jsonl: cannot be written \(No space left on device\); once it can"):
        Run(tmp_path, Topology(), "").metrics(images_seen=16)


def test_a_line_that_a_nearly_full_disk_cuts_is_told_too(tmp_path):
    """Else the next line would be appended to it."""
    here = Run(tmp_path, Topology(), "")
    here.metrics(images_seen=1)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (30, limits[1]))
    try:
        with pytest.raises(UserError, match="No space left on device"):
            here.metrics(images_seen=2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert (tmp_path / "metrics.jsonl").stat().st_size == 30
    here.cut_metrics(1)
    assert (tmp_path / "metrics.jsonl").read_text() == '{"images_seen": 1}\n'


def test_a_sentence_that_cannot_be_left_changes_no_exit_code(tmp_path, launched, monkeypatch):
    monkeypatch.setenv(program.ERROR_FILE, str(tmp_path / "gone" / "error.txt"))

    def main(argv: list[str]) -> None:
        raise UserError("no room")

    with pytest.raises(SystemExit) as end:
        program.run(main)
    assert end.value.code == 2


# --- the run directory's own lock ---


@pytest.fixture
def held(tmp_path, monkeypatch):
    """Somebody else holds the lock of the run directory."""
    monkeypatch.setattr(run, "LOCK_PATIENCE_S", 0.6)
    with open(tmp_path / "lock", "w") as file:
        file.write("pid 7 on n2")
        file.flush()
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def test_a_zombie_of_a_lost_node_is_waited_for_and_named_but_does_not_stop_its_successor(held, lock, tmp_path):
    said: list[str] = []
    run._lock(tmp_path, Fence.of_environment(), said.append)
    assert len(said) == 2
    assert "waiting for another process (pid 7 on n2)" in said[0]
    assert "pid 7 on n2, which this job replaces, still has the run open; it may not write" in said[1]
    assert str(os.getpid()) in (tmp_path / "lock").read_text()


def test_outside_a_job_two_processes_of_one_run_are_one_too_many(held, tmp_path):
    with pytest.raises(UserError, match=r"another process \(pid 7 on n2\) is running in this run directory; stop it"):
        run._lock(tmp_path, Fence(), lambda text: None)
    assert (tmp_path / "lock").read_text() == "pid 7 on n2"


def test_who_lost_the_run_while_waiting_for_it_does_not_get_it(held, lock, tmp_path):
    with pytest.raises(Superseded):
        run._lock(tmp_path, Fence.of_environment(), lambda text: name(lock, "34.0"))
    assert (tmp_path / "lock").read_text() == "pid 7 on n2"


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS])
def test_a_disk_without_locks_is_said_where_nothing_else_protects_the_run(tmp_path, lock, monkeypatch, code):
    """The kernel's answers on such disks; none is at hand."""

    def refuse(file: object, how: int) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "flock", refuse)
    said: list[str] = []
    run._lock(tmp_path, Fence.of_environment(), said.append)
    assert said == []
    run._lock(tmp_path, Fence(), said.append)
    assert "never start this run twice at once" in said[0]
    code = errno.EIO
    with pytest.raises(OSError, match=os.strerror(errno.EIO)):
        run._lock(tmp_path, Fence(), said.append)


@pytest.mark.parametrize(("code", "passes"), [(errno.EINVAL, True), (errno.EOPNOTSUPP, True), (errno.EIO, False)])
def test_a_disk_that_syncs_no_folders_is_no_error_but_a_failing_one_is(tmp_path, monkeypatch, code, passes):
    def refuse(descriptor: int) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "fsync", refuse)
    if passes:
        sync_folder(tmp_path)
    else:
        with pytest.raises(OSError, match=os.strerror(code)):
            sync_folder(tmp_path)


# --- the time that a stop takes ---


def test_a_signal_too_close_to_the_time_limit_is_told_once_with_a_number(tmp_path, monkeypatch):
    monkeypatch.setenv("LLAMAGEN_SIGNAL_DELAY_S", "60")
    said: list[str] = []
    watch = Stopwatch(tmp_path / "log", said.append)
    (tmp_path / "log").mkdir()
    watch.saved(None)
    assert timing.measured(tmp_path) is None
    with watch.timing("step", counts=False):
        time.sleep(0.2)
    with watch.timing("step"):
        time.sleep(0.01)
    watch.saved(20.0)
    assert said == []
    found = timing.measured(tmp_path)
    assert found is not None
    assert found.save_s == 20.0
    assert 0.01 <= found.step_s < 0.2, "the first step is none that a signal meets after something is done"
    assert timing.warning(tmp_path, 60) is None
    for save_s in (40.0, 45.0):
        watch.saved(save_s)
    assert len(said) == 1
    assert "a signal 60 s before the time limit may be too late" in said[0]
    assert "a save 40 s (on " in said[0]
    assert "give twice both, 81 s" in said[0]
    assert "give twice both, 91 s" in str(timing.warning(tmp_path, 60)), "what a launch says reads the file"


def test_a_validation_is_finished_before_a_save_and_a_ladders_slowest_run_counts(tmp_path):
    for rung, validation_s in (("small", 2.0), ("large", 30.0)):
        (tmp_path / rung / "log").mkdir(parents=True)
        facts = {"step_s": 1.0, "validation_s": validation_s, "save_s": 5.0, "host": "n1", "time": 0.0}
        (tmp_path / rung / "log" / "timing.json").write_text(json.dumps(facts))
    (tmp_path / "log").mkdir()
    (tmp_path / "log" / "timing.json").write_text("{")
    assert timing.measured(tmp_path) == Timing(1.0, 30.0, 5.0, "n1")
    assert timing.warning(tmp_path, 70) is None
    assert "the longest validation took 30 s" in str(timing.warning(tmp_path, 69))


# --- devices and disks of a node ---


def test_the_profiles_stage_is_used_where_the_config_says_nothing(monkeypatch):
    assert ShardAccess().staged_in is None
    monkeypatch.setenv("LLAMAGEN_STAGE", "/dev/shm")
    assert ShardAccess().staged_in == Path("/dev/shm")
    assert ShardAccess(stage=Path("/scratch")).staged_in == Path("/scratch")
    assert ShardAccess(cache=Path("/scratch")).staged_in is None
