"""A rank that is not the run's any more: on a lost node, woken by SLURM before it is killed, or replaced. It commits
nothing. Real forked ranks, real signals; a rank plays SLURM."""

import os
import signal
import time
from pathlib import Path

import pytest

from llamagen_dist.checkpoint.saver import Saver
from llamagen_dist.parallel.topology import start
from llamagen_dist.training.fence import Fence
from llamagen_dist.training.gpt_task import GPTTask
from tests import checkpoints as store
from tests.ranks.fit_run import lines, run
from tests.ranks.forked import end_ranks, run_ranks
from tests.ranks.layouts import BATCH, Layout
from tests.ranks.pacing import paced
from tests.ranks.test_saver import Gate, save, tensors
from tests.ranks.test_watchdog import GUARD
from tests.unit.test_run_fence import name

OWNER, SUCCESSOR = "12.0", "12.1"


def own(run_dir: Path) -> Path:
    """Be a rank of incarnation 12.0; returns the lock."""
    lock = run_dir / "launch" / "lock.json"
    name(lock, OWNER)
    os.environ.update(LLAMAGEN_LOCK=str(lock), LLAMAGEN_OWNER=OWNER)
    return lock


def files(folder: Path) -> dict[str, int]:
    return {str(p.relative_to(folder)): p.stat().st_mtime_ns for p in folder.rglob("*") if p.is_file()}


# --- a save that is overtaken ---


def overtaken_while_writing(run_dir: Path, fenced: bool) -> str:
    """The run goes on elsewhere while the last rank writes its files, and makes a folder for the same step."""
    topology = start()
    lock = own(run_dir)
    topology.barrier()
    pace = Gate(run_dir / "gate")
    fence = {"fence": Fence.of_environment().check} if fenced else {}
    saver = Saver(run_dir, topology, **fence)
    last = topology.rank == topology.world - 1
    with paced(pace if last else None):
        save(saver, 1, tensors())
        if last:
            while not pace.waited:
                time.sleep(0.002)
            name(lock, SUCCESSOR)
            (run_dir / "checkpoints" / "step_00000001" / "theirs").touch()
            pace.gate.touch()
        topology.barrier()
        try:
            with saver:
                saver.wait()
        except Exception as error:
            return f"{type(error).__name__}: {error}"
    return "committed"


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_save_that_is_overtaken_is_neither_committed_nor_cleaned_up(tmp_path, ranks):
    for result in run_ranks(overtaken_while_writing, ranks, tmp_path, True):
        assert result.startswith(f"Superseded: {tmp_path}: this run continues as job 12.1; this process, of job 12.0")
    folder = tmp_path / "checkpoints" / "step_00000001"
    assert (folder / "theirs").exists(), "the folder may be the successor's"
    assert store.complete(tmp_path) == []


def test_without_the_fence_it_would_be_committed(tmp_path):
    """Sabotage twin."""
    assert run_ranks(overtaken_while_writing, 2, tmp_path, False) == ["committed"] * 2
    assert len(store.complete(tmp_path)) == 1


# --- stopped, and woken by SLURM, which kills the others ---


def stopped(pid: int) -> bool:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"


def wake(pid: int) -> None:
    while not stopped(pid):
        time.sleep(0.005)
    os.kill(pid, signal.SIGCONT)


def woken_in_a_save(run_dir: Path, finished: bool, moved: bool) -> None:
    """Rank 0 is stopped while it writes; rank 1 writes its share (or not), wakes rank 0, and is killed."""
    topology = start()
    lock = own(run_dir)
    pid = run_dir / "pid"
    if topology.rank == 0:
        pid.write_text(str(os.getpid()))
    topology.barrier()
    other = int(pid.read_text())

    def pace(written: int) -> None:
        if topology.rank == 0:
            os.kill(os.getpid(), signal.SIGSTOP)
        elif not finished:
            wake_and_die()

    def wake_and_die() -> None:
        while not stopped(other):
            time.sleep(0.005)
        if moved:
            name(lock, SUCCESSOR)
        wake(other)
        os.kill(os.getpid(), signal.SIGKILL)

    once = [pace]
    saver = Saver(run_dir, topology, patience_s=0.5, fence=Fence.of_environment().check)
    with paced(lambda written: once.pop()(written) if once else None):
        save(saver, 1, tensors())
        if topology.rank == 1:
            saver._current.written.wait()
            wake_and_die()
        saver.close()


@pytest.mark.parametrize(
    ("finished", "moved", "committed"), [(True, False, 1), (True, True, 0), (False, False, 0), (False, True, 0)]
)
def test_a_woken_rank_commits_what_all_have_written_while_it_may_and_nothing_else(tmp_path, finished, moved, committed):
    (zero, _), (one, _) = end_ranks(woken_in_a_save, 2, tmp_path, finished, moved)
    assert (zero, one) == (0, -signal.SIGKILL)
    found = store.complete(tmp_path)
    assert len(found) == committed
    for folder in found:
        store.verify(folder)


# --- a whole run ---

EVERY_STEP = ("log.every_steps=1", f"checkpoint.every_images={2 * BATCH}")


def woken_in_a_run(run_dir: Path) -> None:
    lock = own(run_dir)
    pid = run_dir / "pid"

    def fault(task: GPTTask, number: int) -> None:
        if number == 1 and task.topology.rank == 0:
            pid.write_text(str(os.getpid()))
        if number == 6 and task.topology.rank == 0:
            os.kill(os.getpid(), signal.SIGSTOP)
        if number == 6 and task.topology.rank == 1:
            while not stopped(int(pid.read_text())):
                time.sleep(0.005)
            then = files(run_dir)
            name(lock, SUCCESSOR)
            (run_dir / "then").write_text(repr(then))
            wake(int(pid.read_text()))
            os.kill(os.getpid(), signal.SIGKILL)

    run(Layout(2, 1, 1), run_dir, "guard.hang_minutes=0.5", *EVERY_STEP, read=fault)


def test_a_woken_rank_of_a_run_that_went_on_changes_nothing_and_ends(tmp_path):
    (zero, trace), (one, _) = end_ranks(woken_in_a_run, 2, tmp_path)
    assert one == -signal.SIGKILL
    assert zero in (75, 1), trace
    then = eval((tmp_path / "then").read_text())
    changed = {path for path, time_ns in files(tmp_path).items() if then.get(path) != time_ns}
    # what was half-way when it was stopped may come to its end (a heartbeat, a file of the save of step 4); no more
    assert {path for path in changed if not path.startswith(("log/", "checkpoints/step_00000004/"))} == {
        "then",
        "launch/lock.json",
    }
    assert not any(path.endswith("COMPLETE") for path in changed)
    assert lines(tmp_path)[-1]["step"] == 5


def zombie(run_dir: Path, settings: tuple[str, ...], fenced: bool) -> None:
    """One rank on a lost node needs nobody to go on."""
    lock = own(run_dir)
    if not fenced:
        del os.environ["LLAMAGEN_OWNER"]

    def fault(task: GPTTask, number: int) -> None:
        if number == 4:
            name(lock, SUCCESSOR)
        if number > 4:
            time.sleep(0.1)

    run(Layout(), run_dir, *GUARD, *settings, read=fault)


@pytest.mark.parametrize(("every", "last"), [(1, 3), (1000, 1)], ids=["at the next line", "between lines"])
def test_a_run_on_a_lost_node_ends_by_itself(tmp_path, capfd, every, last):
    ((code, trace),) = end_ranks(zombie, 1, tmp_path, (f"log.every_steps={every}",), True)
    assert code == 75 or "Superseded" in trace, "its watchdog, or the line that it would have written"
    assert code == 75 or every == 1
    assert "this run continues as job 12.1" in trace + capfd.readouterr().err
    assert lines(tmp_path)[-1]["step"] == last
    assert store.complete(tmp_path) == []
    assert not (tmp_path / "summary.json").exists()


def test_without_a_lock_it_would_run_to_its_end(tmp_path):
    """Sabotage twin."""
    assert end_ranks(zombie, 1, tmp_path, ("log.every_steps=1",), False)[0][0] == 0
    assert (tmp_path / "summary.json").exists()
