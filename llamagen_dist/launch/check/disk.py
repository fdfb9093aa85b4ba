"""What a shared disk does that checkpoints and locks rely on, tried by the first rank of every node together."""

import fcntl
import os
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from llamagen_dist.files import sync_folder, write_text

WRITTEN = 64 << 20
SMALL_FILES = 5
PATIENCE_S = 45.0  # less than collectives wait, so that a blind node says so before the others give up
Gather = Callable[[Any], list[Any]]
"""Collective over all ranks: everyone's value, by rank."""


def alone(folder: Path) -> dict[str, Any]:
    """What one node does by itself.

    write_mb_s: of 64 MiB, synced.
    small_s: the slowest of a few small files written aside, synced and renamed, as every record of a run is.
    clock_s: the disk's clock minus this machine's.
    """
    file = folder / f"large-{os.getpid()}"
    block = os.urandom(1 << 20)  # not zeros, which some disks do not store
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
    seconds = []
    for number in range(SMALL_FILES):
        began = time.perf_counter()
        write_text(file, str(number))
        seconds.append(time.perf_counter() - began)
    file.unlink()
    sync_folder(folder)
    return {"write_mb_s": round(rate, 1), "small_s": round(max(seconds), 4), "clock_s": round(clock, 3)}


def together(folder: Path, rank: int, first_of_node: bool, gather: Gather) -> dict[str, Any]:
    """Collective.

    visible_s: seconds until this rank saw a file that rank 0 had renamed into place.
    replaced_s: seconds until it saw the new content of one that it had read before, and may have cached; both None
    where PATIENCE_S was not enough.
    winners: how many ranks created a file exclusively, and how many could link one name: 1 each on a disk that a lock
    of ours can be built on.
    flock: whether a lock that rank 0 holds is seen.
    """
    facts: dict[str, Any] = {}
    new, old = folder / "new", folder / "old"
    if rank == 0:
        write_text(old, "before")
    gather(None)
    _seconds_until(old, "before")
    gather(None)
    if rank == 0:
        write_text(new, "here")
        write_text(old, "after")
    gather(None)
    facts["visible_s"] = _seconds_until(new, "here")
    facts["replaced_s"] = _seconds_until(old, "after")
    gather(None)
    created = first_of_node and _exclusive(folder / "made")
    linked = first_of_node and _linked(folder, rank)
    facts["winners"] = [sum(gather(created)), sum(gather(linked))]
    with open(folder / "held", "a") as file:
        if rank == 0:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        gather(None)
        facts["flock"] = rank == 0 or _locked(file)
        gather(None)  # rank 0 holds it until all have tried
    return facts


def _seconds_until(file: Path, text: str) -> float | None:
    began = time.perf_counter()
    while time.perf_counter() - began < PATIENCE_S:
        with suppress(OSError):  # not there yet, or replaced while it was read
            if file.read_text() == text:
                return round(time.perf_counter() - began, 4)
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
    """Whether somebody else holds the lock; False too where the disk has no locks at all."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False
