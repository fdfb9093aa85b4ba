"""Real gloo ranks by fork: imports are paid once, a FileStore needs no port, results come back by pickle."""

import os
import pickle
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

LINGER_S = 2.0
# Autograd starts its threads at a process's first backward pass, one per device. Where torch.compile has run before,
# it counts one, and no forked rank can go backward any more; started here, before any test runs, it counts none.
torch.zeros(1, requires_grad=True).backward()


def run_ranks(function: Callable[..., Any], world: int, *arguments: Any, timeout_s: float = 120) -> list[Any]:
    """Call ``function(*arguments)`` on ``world`` gloo ranks; returns their results or raises the first traceback."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        sys.stdout.flush()
        sys.stderr.flush()
        children = [_fork(function, rank, world, folder, arguments, LINGER_S) for rank in range(world)]
        deadline = time.monotonic() + timeout_s
        alive = set(children)
        codes: dict[int, int] = {}
        while alive and time.monotonic() < deadline:
            for rank, pid in enumerate(children):
                if pid in alive and (ended := os.waitpid(pid, os.WNOHANG))[0]:
                    codes[rank] = os.waitstatus_to_exitcode(ended[1])
                    alive.discard(pid)
            if alive and any(folder.glob("failed-*")):  # the others usually fail of it too: a moment, no longer
                deadline = min(deadline, time.monotonic() + LINGER_S)
            time.sleep(0.005)
        for pid in alive:
            os.kill(pid, 9)
            os.waitpid(pid, 0)
        failed = sorted(folder.glob("failed-*"), key=lambda f: f.stat().st_mtime_ns)
        if failed:
            raise AssertionError(f"{failed[0].name}:\n{failed[0].read_text()}")
        if alive:
            raise AssertionError(f"{len(alive)} of {world} ranks were still running after {timeout_s} s")
        silent = {rank: code for rank, code in codes.items() if not (folder / f"result-{rank}").exists()}
        if silent:  # os._exit, or a signal: what the rank printed says why
            raise AssertionError(f"ranks that ended without a result: {silent} (rank: exit status)")
        return [pickle.loads((folder / f"result-{rank}").read_bytes()) for rank in range(world)]


def _fork(
    function: Callable[..., Any], rank: int, world: int, folder: Path, arguments: tuple[Any, ...], linger_s: float = 0
) -> int:
    """linger_s: how long a rank that fails waits for the others' results, so that its closed connection is not what
    ends a collective that they are still in."""
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        os.environ.update(
            RANK=str(rank),
            LOCAL_RANK=str(rank),
            WORLD_SIZE=str(world),
            MASTER_ADDR="127.0.0.1",
            MASTER_PORT="29500",
        )
        store = dist.FileStore(str(folder / "store"), world)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=world)
        (folder / f"result-{rank}").write_bytes(pickle.dumps(function(*arguments)))
        status = 0
    except BaseException:
        (folder / f"failed-{rank}").write_text(traceback.format_exc())
        leaves = time.monotonic() + linger_s
        while time.monotonic() < leaves and len([*folder.glob("failed-*"), *folder.glob("result-*")]) < world:
            time.sleep(0.01)
    finally:
        os._exit(status)


def end_ranks(
    function: Callable[..., Any], world: int, *arguments: Any, timeout_s: float = 60
) -> list[tuple[int | None, str]]:
    """For ranks that are to fail: (exit status, last traceback) of each; minus the signal's number if one killed it.

    None: it still ran after the time-out (and was killed then). Nobody is stopped before.
    """
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        sys.stdout.flush()
        sys.stderr.flush()
        children = [_fork(function, rank, world, folder, arguments) for rank in range(world)]
        codes: dict[int, int] = {}
        deadline = time.monotonic() + timeout_s
        while len(codes) < world and time.monotonic() < deadline:
            for pid in children:
                if pid not in codes and (found := os.waitpid(pid, os.WNOHANG))[0]:
                    codes[pid] = os.waitstatus_to_exitcode(found[1])
            time.sleep(0.01)
        for pid in children:
            if pid not in codes:
                os.kill(pid, 9)
                os.waitpid(pid, 0)
        failed = [folder / f"failed-{rank}" for rank in range(world)]
        return [
            (codes.get(pid), file.read_text() if file.exists() else "")
            for pid, file in zip(children, failed, strict=True)
        ]
