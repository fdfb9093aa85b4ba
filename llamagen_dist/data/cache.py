"""Files of far-away shards on a node's own disk or in its memory, shared by all processes of the node.

A file's name is its sha256, under which it appears only when its bytes have been checked: whatever is there is whole,
and two data sets that share a shard keep it once. While a file arrives it is ``HASH.SIZE.part`` under a lock, so one
process fetches it, the others wait, and the next one resumes where a dead one stopped.

A cache is bounded (``data.cache``: the longest unused files make room for new ones), or pinned (``data.stage``: filled
before anything starts, and removed by its last user):

    DIR/llamagen-stage-UID/lock            locked while filling and removing
    DIR/llamagen-stage-UID/FINGERPRINT/    the copy; manifest.json is written last
    DIR/llamagen-stage-UID/FINGERPRINT.use locked (shared) by its users

The kernel takes a lock back at any death. So whoever ends last removes the copy, and if that process was killed, the
next one to stage anything here does; a copy without users is never trusted again.
"""

import fcntl
import os
import re
import shutil
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import IO, TYPE_CHECKING

from llamagen_dist import files
from llamagen_dist.console import LOG
from llamagen_dist.data.fetch import NotThere, Source
from llamagen_dist.data.index import index_limit, index_name, rebuilt_index
from llamagen_dist.data.manifest import MANIFEST, Manifest, ShardRecord, write_manifest
from llamagen_dist.errors import UserError

if TYPE_CHECKING:
    from llamagen_dist.data.order import Windows

_HASH = re.compile(r"[0-9a-f]{64}")
_PART = re.compile(r"[0-9a-f]{64}\.([0-9]+)\.part")
_REPORT_EVERY_S = 30.0
_STAGED_AT_ONCE = 4  # shards copied at the same time: one stream does not fill a parallel file system
_FETCHED_AT_ONCE = 2  # per rank; the ranks of a node share the work through the cache's locks


class NodeCache:
    """Opens the files of one source, which it fetches where they are not there yet.

    A process that reads a file which is dropped meanwhile keeps it to the end, as it has it open.
    """

    def __init__(
        self, source: Source, members: tuple[str, ...], folder: Path, limit: int | None, key: str = "data.cache"
    ) -> None:
        """
        members: of the source's manifest.
        limit: bytes that the folder may hold; None: no limit.
        key: the config key that messages name.
        """
        self.source, self._members, self._key = source, members, key
        self.folder, self.limit = files.own_folder(folder, key, follow=False), limit
        self._use: tuple[int, int] | None = None  # of a pinned cache: the descriptor of its lock, the process

    def shard(self, record: ShardRecord) -> IO[bytes]:
        """A shard, unbuffered. Raises UserError."""

        def fill(file: IO[bytes]) -> None:
            self.source.fetch(record.name, file, record.bytes, record.bytes, record.sha256)

        return self.open(record.sha256, record.bytes, fill)

    def index(self, record: ShardRecord) -> IO[bytes]:
        """The (checked) index file of a shard without layout, unbuffered. Raises UserError."""
        limit, name = index_limit(record, self._members), index_name(record.name)

        def fill(file: IO[bytes]) -> None:
            try:
                self.source.fetch(name, file, limit, sha256=record.index_sha256)
            except NotThere:
                with self.shard(record) as tar:
                    path = Path(f"/dev/fd/{tar.fileno()}")
                    data = rebuilt_index(path, self.source.shown(name), record, self._members)
                file.seek(0)
                file.truncate()  # the beginning that an earlier process may have fetched
                file.write(data)
                LOG.info(f"{self.source.shown(name)}: is missing and was made again in the cache")

        return self.open(str(record.index_sha256), limit, fill)

    def open(self, sha256: str, size: int, fill: Callable[[IO[bytes]], None]) -> IO[bytes]:
        """The file, open for reading, after ``fill`` has brought it if it is not there yet.

        size: what it needs at most.
        fill: gets a file that may hold the beginning already, and raises UserError or leaves the checked content in it.
        Raises UserError where the file is larger than the cache.
        """
        if not _HASH.fullmatch(sha256):
            raise UserError(f"the manifest's sha256 {sha256!r} is not one; make the shards again")
        if self.limit is not None and size > self.limit:
            raise UserError(
                f"data.cache_gb: a shard of {size / 1e9:.3g} GB does not fit into {self.limit / 1e9:.3g} GB"
            )
        try:
            return self._present(sha256) or self._fetched(sha256, size, fill)
        except OSError as error:
            raise UserError(f"{self._key}: {error.filename or self.folder}: {error.strerror}") from None

    def _present(self, sha256: str) -> IO[bytes] | None:
        try:
            file = open(self.folder / sha256, "rb", buffering=0)  # noqa: SIM115 - the caller's
        except FileNotFoundError:
            return None
        os.utime(file.fileno())  # the time of last use
        return file

    def _fetched(self, sha256: str, size: int, fill: Callable[[IO[bytes]], None]) -> IO[bytes]:
        folder = files.own_folder(self.folder, self._key, follow=False)  # again: it may have been tidied away
        part = folder / f"{sha256}.{size}.part"
        with ExitStack() as stack:
            lock = files.take_lock(part)
            assert lock is not None
            file = stack.enter_context(os.fdopen(lock, "r+b"))
            if (present := self._present(sha256)) is not None:  # another process was faster
                part.unlink()
                return present
            if self.limit is not None:
                with files.locked(self.folder / "lock"):
                    self._make_room(self.limit, size - os.fstat(lock).st_size, part)
            fill(file)
            file.flush()
            os.fsync(lock)  # before the rename: a name that is a hash promises the bytes, after a power cut too
            os.replace(part, self.folder / sha256)
            opened = self._present(sha256)
            if opened is None:  # another process needed the room at once
                opened = open(f"/dev/fd/{lock}", "rb", buffering=0)  # noqa: SIM115 - the caller's
            return opened

    def _make_room(self, limit: int, needed: int, own: Path) -> None:
        """Drop the longest unused until ``needed`` more bytes fit, into the limit and onto the disk.

        own: the file that the room is for.
        """
        # Two bounds, as the disk is shared: the limit is about this cache alone, free space about everything on it. A
        # reader of a dropped file has it open, so its bytes come back to the disk only when that reader closes it.
        others, total = [], 0
        for entry in os.scandir(self.folder):
            part = _PART.fullmatch(entry.name)
            if part is None and not _HASH.fullmatch(entry.name):
                continue
            try:
                status = entry.stat()
            except FileNotFoundError:
                continue
            size = int(part[1]) if part else status.st_size  # what arrives counts as whole: its room is promised
            total += size
            if entry.name != own.name:
                others.append((status.st_mtime_ns, size, Path(entry.path), part is not None))
        others.sort(key=lambda item: item[0])
        free = os.statvfs(self.folder)
        room = free.f_bavail * free.f_frsize
        for _, size, path, arriving in others:
            if total <= limit and room >= needed:
                return
            if _drop(path, arriving):
                total -= size
                room += size
        if room < needed:
            raise UserError(
                f"data.cache: {self.folder} has {room / 1e9:.3g} GB free and {needed / 1e9:.3g} GB are needed"
            )
        if total > limit:
            raise UserError(
                f"data.cache_gb: {limit / 1e9:.3g} GB do not hold what this node's processes fetch at once; raise it"
            )

    def release(self) -> None:
        """Give a pinned cache up; it is removed if nobody else uses it. (A forked child shares its parent's use.)"""
        if self._use is None or self._use[1] != os.getpid():
            return
        descriptor, self._use = self._use[0], None
        fcntl.flock(descriptor, fcntl.LOCK_UN)  # closing is not enough: forked children have it open, too
        os.close(descriptor)
        base = self.folder.parent
        lock = files.take_lock(base / "lock", wait=False)
        if lock is not None:  # else somebody is copying, and may be at it for long: the next one removes it
            try:
                _sweep(base)
            finally:
                os.close(lock)

    @staticmethod
    def pinned(source: Source, manifest: Manifest, parent: Path) -> "NodeCache":
        """All shards of a source, below ``parent``: copied now, or by another process of this node before.

        Raises UserError: no room, a file that cannot be copied, or arrives with another sha256 twice.
        """
        base = files.own_folder(parent / f"llamagen-stage-{os.getuid()}", "data.stage", follow=False)
        folder = base / manifest.fingerprint()[:32]
        try:
            with files.locked(base / "lock"):
                _sweep(base)
                use = files.take_lock(folder.with_suffix(".use"), shared=True)
                assert use is not None
                try:
                    cache = NodeCache(source, manifest.members, folder, None, "data.stage")
                    if not (folder / MANIFEST).exists():
                        cache._fill(manifest)
                except BaseException:
                    shutil.rmtree(folder, ignore_errors=True)
                    os.close(use)
                    raise
        except OSError as error:
            raise UserError(f"data.stage: {error.filename or base}: {error.strerror}") from None
        cache._use = (use, os.getpid())
        return cache

    def _fill(self, manifest: Manifest) -> None:
        indexed = [record for record in manifest.shards if record.layout is None]
        needed = sum(record.bytes for record in manifest.shards)
        needed += sum(index_limit(record, manifest.members) for record in indexed)
        free = shutil.disk_usage(self.folder).free
        if free < needed:
            raise UserError(
                f"data.stage: {self.folder.parent} has {free / 1e9:.3g} GB free, but {self.source.location} needs "
                f"{needed / 1e9:.3g} GB"
            )
        began = reported = time.monotonic()
        count = len(manifest.shards)
        LOG.info(f"staging {self.source.location} in {self.folder}: {count} shards, {needed / 1e9:.3g} GB")
        with ThreadPoolExecutor(_STAGED_AT_ONCE) as threads:
            try:
                for done, file in enumerate(threads.map(self.shard, manifest.shards), 1):
                    file.close()
                    if time.monotonic() > reported + _REPORT_EVERY_S:
                        reported = time.monotonic()
                        LOG.info(f"staging {self.source.location}: {done} of {count} shards")
            except BaseException:
                threads.shutdown(cancel_futures=True)
                raise
        for record in indexed:
            self.index(record).close()
        write_manifest(self.folder, manifest)
        LOG.info(f"staged {self.source.location} in {time.monotonic() - began:.1f} s")


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


def _sweep(base: Path) -> None:
    """Remove the pinned caches that nobody uses. The caller holds the lock of ``base``."""
    for marker in base.glob("*.use"):
        use = files.take_lock(marker, wait=False)
        if use is not None:
            shutil.rmtree(marker.with_suffix(""), ignore_errors=True)
            marker.unlink(missing_ok=True)
            os.close(use)


class ShardPrefetcher:
    """Brings the shards of the next window into a bounded cache while those of the present one are read.

    Follows the positions that a stream reads. Does nothing for shards that need no cache.
    """

    def __init__(
        self, cache: NodeCache | None, shards: Sequence[ShardRecord], windows: "Windows | None", rank: int
    ) -> None:
        """rank: where this rank begins in the list, so that the ranks of a node do not all wait for the same shard."""
        self._cache, self._shards, self._windows, self._rank = cache, shards, windows, rank
        self._first, self._end = 0, 0  # positions of the window that was seen last

    def at(self, position: int) -> None:
        """Note that this position is read now. Returns at once; a shard that fails is reported to whoever reads it."""
        if self._windows is None or self._cache is None or self._first <= position < self._end:
            return
        if self._cache.limit is None:  # pinned: everything is there
            return
        present, self._first, self._end = self._windows.window(position)
        coming, _, _ = self._windows.window(self._end)
        if sum(self._shards[shard].bytes for shard in {*present, *coming}) > self._cache.limit:
            return  # what is fetched ahead would push out what is being read
        wanted = [*self._rotated(present), *self._rotated(coming)]
        for number in range(_FETCHED_AT_ONCE):
            shards = wanted[number::_FETCHED_AT_ONCE]
            threading.Thread(target=self._fetch, args=(self._cache, shards), daemon=True).start()

    def _rotated(self, shards: Sequence[int]) -> list[int]:
        start = self._rank % len(shards)
        return [*shards[start:], *shards[:start]]

    def _fetch(self, cache: NodeCache, shards: Sequence[int]) -> None:
        for shard in shards:
            try:
                cache.shard(self._shards[shard]).close()
            except UserError:
                return
