"""Killed before every single change that a save makes to the disk: a good checkpoint is always there, nothing stays
half-written, and what must survive a power cut is synced in time."""

import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from llamagen_dist import files
from llamagen_dist.checkpoint import folder as folders
from llamagen_dist.checkpoint.saver import Saver
from llamagen_dist.parallel.topology import Topology
from tests import checkpoints as store
from tests.ranks.test_saver import save, tensors

CHANGES = ("os.rename", "os.remove", "os.rmdir", "os.mkdir")


def weights(step: int) -> dict[str, torch.Tensor]:
    return {name: tensor + step for name, tensor in tensors().items()}


def save_step(run: Path, step: int) -> None:
    with Saver(run, Topology(), keep_last=1) as saver:
        save(saver, step, weights(step))
        saver.wait()


def in_child(work: Callable[[], None]) -> int:
    """Run it in a forked process; returns how that ended: 0, or minus the signal."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            work()
            code = 0
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def killed_before(change: int, work: Callable[[], None]) -> int:
    """``work`` in a child that is killed just before its change number ``change`` to the disk."""

    def armed() -> None:
        done = 0

        def hook(event: str, arguments: tuple) -> None:
            nonlocal done
            writing = event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR)
            if event in CHANGES or writing:
                if done == change:
                    os.kill(os.getpid(), signal.SIGKILL)
                done += 1

        sys.addaudithook(hook)
        work()

    return in_child(armed)


def found(run: Path) -> int | None:
    """The step of the newest good checkpoint, whose weights are that step's to the bit; None without."""
    newest = store.newest(run, warn=False)
    if newest is None:
        return None
    step, read = store.read_state(newest)["step"], store.read_weights(newest)
    return step if all(torch.equal(read[name], tensor) for name, tensor in weights(step).items()) else None


def every_kill(tmp_path: Path, work: Callable[[Path], None]) -> tuple[list[int | None], list[str]]:
    """(what is found after each kill, what the next start leaves behind that is not whole)."""
    save_step(tmp_path / "before", 1)
    steps, left = [], []
    for change in range(200):
        run = tmp_path / str(change)
        shutil.copytree(tmp_path / "before", run)
        code = killed_before(change, lambda run=run: work(run))
        steps.append(found(run))
        Saver(run, Topology())
        left += [str(f) for f in run.rglob("*.tmp*")]
        left += [str(f) for f in (run / "checkpoints").iterdir() if not (f / "COMPLETE").exists()]
        shutil.rmtree(run)
        if code == 0:
            return steps, left
        assert code == -signal.SIGKILL
    raise AssertionError("the save never came to its end")


def test_a_kill_at_any_moment_of_a_save_leaves_the_old_or_the_new_one(tmp_path):
    steps, left = every_kill(tmp_path, lambda run: save_step(run, 2))
    assert left == []
    assert len(steps) > 20, "a change for every file at least"
    assert set(steps) == {1, 2}
    assert steps == sorted(steps), "once the new one counts, it stays"
    assert steps.count(2) > 3, "the old one is removed after that, in several changes"


def test_without_the_order_there_is_a_moment_with_none(tmp_path):
    """Sabotage twin: the old one is removed first."""

    def careless(run: Path) -> None:
        folders.remove(run / "checkpoints" / "step_00000001")
        save_step(run, 2)

    steps, _ = every_kill(tmp_path, careless)
    assert None in steps
    assert steps[-1] == 2


def test_what_a_power_cut_must_not_take_is_synced_first(tmp_path, monkeypatch):
    save_step(tmp_path, 1)
    told: list[tuple[str, str]] = []
    real_fsync, real_replace, real_remove = os.fsync, os.replace, folders.remove

    def fsync(descriptor: int) -> None:
        told.append(("sync", os.path.basename(os.readlink(f"/proc/self/fd/{descriptor}"))))
        real_fsync(descriptor)

    def replace(source: Path, target: Path) -> None:
        told.append(("rename", Path(target).name))
        real_replace(source, target)

    def remove(folder: Path) -> None:
        told.append(("remove", folder.name))
        real_remove(folder)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(files.os, "replace", replace)
    monkeypatch.setattr(folders, "remove", remove)
    save_step(tmp_path, 2)
    complete, gone = told.index(("rename", "COMPLETE")), told.index(("remove", "step_00000001"))
    synced = {what for kind, what in told[:complete] if kind == "sync"}
    data = {f.name for f in (tmp_path / "checkpoints" / "step_00000002").glob("*.safetensors")}
    assert synced >= data != set(), "every byte before the mark"
    assert {"step_00000002", "checkpoints"} <= synced, "their names, too"
    assert ("sync", "step_00000002") in told[complete:gone], "the mark before the old one goes"
