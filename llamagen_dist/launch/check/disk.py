"""What a shared disk does that checkpoints and locks rely on, tried by the first rank of every node together."""

import fcntl
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from llamagen_dist.files import sync_folder, write_text

WRITTEN = 64 << 20
SMALL_FILES = 5
PATIENCE_S = 45.0  # less than collectives wait
Gather = Callable[[Any], list[Any]]
"""Collective over all ranks: everyone's value, by rank."""


def alone(folder: Path) -> dict[str, Any]:
    """What one node does by itself. write_mb_s: of 64 MiB, synced; small_s: the slowest of a few small files written
    aside, synced and renamed; clock_s: the disk's clock minus this machine's."""
    file = folder / f"large-{os.getpid()}"
    block = os.urandom(1 << 20)
    began = time.perf_counter()
    with open(file, "wb", buffering=0) as out:
        for _ in range(WRITTEN >> 20):
            out.write(block)
        os.fsync(out.fileno())
    rate = WRITTEN / (time.perf_counter() - began) / 1e6
    before = time.time()
    file.touch()
    clock = file.stat().st_mtime - (before + time.time()) / 2
    file.unlink()
    slowest = 0.0
    for number in range(SMALL_FILES):
        began = time.perf_counter()
        write_text(file, str(number))
        slowest = max(slowest, time.perf_counter() - began)
    file.unlink()
    sync_folder(folder)
    return {"write_mb_s": round(rate, 1), "small_s": round(slowest, 4), "clock_s": round(clock, 3)}


def together(folder: Path, rank: int, first_of_node: bool, gather: Gather) -> dict[str, Any]:
    """Collective. visible_s: until this rank saw a file that rank 0 had renamed into place; replaced_s: until it saw
    the new content of one that it had read before; None where that was not enough time. winners: ranks that made a file
    which must not have existed, and that hold a hard link of one name: 1 each on a disk that locks can be built on.
    flock: whether a lock that rank 0 holds is seen."""
    found: dict[str, Any] = {}
    new, old = folder / "new", folder / "old"
    if rank == 0:
        write_text(old, "before")
    gather(None)
    _wait(old, "before")
    gather(None)
    if rank == 0:
        write_text(new, "here")
        write_text(old, "after")
    gather(None)
    found["visible_s"] = _wait(new, "here")
    found["replaced_s"] = _wait(old, "after")
    gather(None)
    won = _exclusive(folder / "made") if first_of_node else False
    linked = _linked(folder, rank) if first_of_node else False
    found["winners"] = [sum(gather(won)), sum(gather(linked))]
    held = open(folder / "held", "a")  # noqa: SIM115 - held across the collectives below
    if rank == 0:
        fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
    gather(None)
    found["flock"] = rank == 0 or _locked(held)
    gather(None)
    held.close()
    return found


def _wait(file: Path, text: str) -> float | None:
    began = time.perf_counter()
    while time.perf_counter() - began < PATIENCE_S:
        try:
            if file.read_text() == text:
                return round(time.perf_counter() - began, 4)
        except OSError:
            pass
        time.sleep(0.002)
    return None


def _exclusive(file: Path) -> bool:
    try:
        os.close(os.open(file, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
    except FileExistsError:
        return False
    return True


def _linked(folder: Path, rank: int) -> bool:
    mine = folder / f"link-of-{rank}"
    mine.touch()
    try:
        os.link(mine, folder / "link")
    except FileExistsError:
        return False
    return True


def _locked(file: Any) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:  # no locks at all on this disk
        return False
    return False
