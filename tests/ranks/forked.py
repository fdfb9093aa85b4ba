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

import torch.distributed as dist


def run_ranks(function: Callable[..., Any], world: int, *arguments: Any, timeout_s: float = 120) -> list[Any]:
    """Call ``function(*arguments)`` on ``world`` gloo ranks; returns their results or raises the first traceback."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        sys.stdout.flush()
        sys.stderr.flush()
        children = [_fork(function, rank, world, folder, arguments) for rank in range(world)]
        deadline = time.monotonic() + timeout_s
        alive = set(children)
        while alive and time.monotonic() < deadline:
            for pid in list(alive):
                if os.waitpid(pid, os.WNOHANG)[0]:
                    alive.discard(pid)
            failed = sorted(folder.glob("failed-*"))
            if failed and alive:
                time.sleep(0.5)  # the others usually fail of it too; do not wait for them
                break
            time.sleep(0.005)
        for pid in alive:
            os.kill(pid, 9)
            os.waitpid(pid, 0)
        failed = sorted(folder.glob("failed-*"), key=lambda f: f.stat().st_mtime_ns)
        if failed:
            raise AssertionError(f"{failed[0].name}:\n{failed[0].read_text()}")
        if alive:
            raise AssertionError(f"{len(alive)} of {world} ranks were still running after {timeout_s} s")
        return [pickle.loads((folder / f"result-{rank}").read_bytes()) for rank in range(world)]


def _fork(function: Callable[..., Any], rank: int, world: int, folder: Path, arguments: tuple[Any, ...]) -> int:
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
