"""A bounded folder of fetched files, shared by all processes of a node.

A file's name is its sha256, under which it appears only when its bytes have been checked: whatever is there is whole,
and two data sets that share a shard keep it once. While a file arrives it is ``HASH.SIZE.part`` under a lock, so one
process fetches it, the others wait, and the next one goes on where a dead one stopped.
"""

import os
import re
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import IO

from llamagen_dist import files
from llamagen_dist.errors import UserError

_HASH = re.compile(r"[0-9a-f]{64}")
_PART = re.compile(r"[0-9a-f]{64}\.([0-9]+)\.part")


class Cache:
    """At most ``limit`` bytes in ``folder``; the longest unused files make room for new ones.

    A process that reads a file which is dropped meanwhile keeps it to the end, as it has it open.
    """

    def __init__(self, folder: Path, limit: int) -> None:
        self.folder, self.limit = files.private_folder(folder, "data.cache"), limit

    def open(self, sha256: str, size: int, fill: Callable[[IO[bytes]], None]) -> IO[bytes]:
        """The file, open for reading, after ``fill`` has brought it if it is not there yet.

        size: what it needs at most. fill: gets a file that may hold the beginning already, and raises UserError or
        leaves the checked content in it. Raises UserError where the file is larger than the cache.
        """
        if not _HASH.fullmatch(sha256):
            raise UserError(f"the manifest's sha256 {sha256!r} is not one; make the shards again")
        if size > self.limit:
            raise UserError(
                f"data.cache_gb: a shard of {size / 1e9:.3g} GB does not fit into {self.limit / 1e9:.3g} GB; raise it"
            )
        try:
            return self._present(sha256) or self._fetched(sha256, size, fill)
        except OSError as error:
            raise UserError(f"data.cache: {error.filename or self.folder}: {error.strerror}") from None

    def _present(self, sha256: str) -> IO[bytes] | None:
        try:
            file = open(self.folder / sha256, "rb", buffering=0)  # noqa: SIM115 - the caller's
        except FileNotFoundError:
            return None
        os.utime(file.fileno())  # the time of last use
        return file

    def _fetched(self, sha256: str, size: int, fill: Callable[[IO[bytes]], None]) -> IO[bytes]:
        part = files.private_folder(self.folder, "data.cache") / f"{sha256}.{size}.part"  # or tidied away meanwhile
        with ExitStack() as stack:
            lock = files.take_lock(part)
            assert lock is not None
            file = stack.enter_context(os.fdopen(lock, "r+b"))
            if (present := self._present(sha256)) is not None:  # another process was faster
                part.unlink()
                return present
            with files.locked(self.folder / "lock"):
                self._make_room(size - os.fstat(lock).st_size, part)
            fill(file)
            file.flush()
            os.fsync(lock)
            os.replace(part, self.folder / sha256)
            opened = self._present(sha256)
            if opened is None:  # another process needed the room at once
                opened = open(f"/dev/fd/{lock}", "rb", buffering=0)  # noqa: SIM115 - the caller's
            return opened

    def _make_room(self, needed: int, own: Path) -> None:
        """Drop the longest unused until ``needed`` more bytes fit, into the limit and onto the disk."""
        held, total = [], 0
        for entry in os.scandir(self.folder):
            part = _PART.fullmatch(entry.name)
            if part is None and not _HASH.fullmatch(entry.name):
                continue
            try:
                found = entry.stat()
            except FileNotFoundError:
                continue
            size = int(part[1]) if part else found.st_size
            total += size
            if entry.name != own.name:
                held.append((found.st_mtime_ns, size, Path(entry.path), part is not None))
        held.sort(key=lambda item: item[0])
        free = os.statvfs(self.folder)
        room = free.f_bavail * free.f_frsize
        for _, size, path, arriving in held:
            if total <= self.limit and room >= needed:
                return
            if self._drop(path, arriving):
                total -= size
                room += size
        if room < needed:
            raise UserError(
                f"data.cache: {self.folder} has {room / 1e9:.3g} GB free and {needed / 1e9:.3g} GB are needed; make "
                "room there or name another folder"
            )
        if total > self.limit:
            raise UserError(
                f"data.cache_gb: {self.limit / 1e9:.3g} GB are not enough for the shards that the processes of this "
                "node fetch at the same time; raise it"
            )

    @staticmethod
    def _drop(path: Path, part: bool) -> bool:
        """Whether it is gone now; what another process is fetching is left."""
        lock = files.take_lock(path, wait=False) if part else None
        if part and lock is None:
            return False
        try:
            path.unlink(missing_ok=True)
        finally:
            if lock is not None:
                os.close(lock)
        return True
