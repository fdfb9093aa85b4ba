"""Copies of shards on a node's own disk or in its memory, where random reads are fast.

One process of the node copies while the others wait, then all read the same files. Whoever uses a copy holds a shared
lock on it, which the kernel takes back at any death: the last one to end removes the copy, and if it was killed the
next process to stage anything here does. A copy without users is never trusted again.

    DIR/llamagen-stage-UID/lock            held while copying and removing
    DIR/llamagen-stage-UID/FINGERPRINT/    the copy; manifest.json is written last
    DIR/llamagen-stage-UID/FINGERPRINT.use held (shared) by its users
"""

import fcntl
import os
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from llamagen_dist import files
from llamagen_dist.data.access.folders import fetch_shard, index_limit
from llamagen_dist.data.access.remote import NotThere, fetch
from llamagen_dist.data.access.transport import Transport
from llamagen_dist.data.index import index_name
from llamagen_dist.data.manifest import MANIFEST, Manifest, ShardRecord, write_manifest
from llamagen_dist.errors import UserError

_SAID_EVERY_S = 30.0
_AT_ONCE = 4  # shards copied at the same time: one stream does not fill a parallel file system


@dataclass(frozen=True)
class Staged:
    """A copy in use by this process."""

    folder: Path
    _use: int
    _owner: int

    def release(self) -> None:
        """Give the copy up; it is removed if nobody else uses it. (A forked child only shares its parent's use.)"""
        if os.getpid() != self._owner:
            return
        fcntl.flock(self._use, fcntl.LOCK_UN)  # closing is not enough: forked children have it open, too
        os.close(self._use)
        base = self.folder.parent
        lock = files.take_lock(base / "lock", wait=False)
        if lock is not None:  # else somebody is copying, and may be at it for long: the next one removes it
            try:
                _sweep(base)
            finally:
                os.close(lock)


def stage(source: Transport, manifest: Manifest, parent: Path) -> Staged:
    """Copy the shards below ``parent``, or use the copy that another process of this node has made.

    Raises UserError: no room, a file that cannot be copied, or arrives with another sha256 twice.
    """
    base = files.private_folder(parent / f"llamagen-stage-{os.getuid()}", "data.stage")
    folder = base / manifest.fingerprint()[:32]
    try:
        with files.locked(base / "lock"):
            _sweep(base)
            use = files.take_lock(folder.with_suffix(".use"), shared=True)
            assert use is not None
            staged = Staged(folder, use, os.getpid())
            if not (folder / MANIFEST).exists():
                try:
                    _copy(source, manifest, folder)
                except BaseException:
                    shutil.rmtree(folder, ignore_errors=True)
                    os.close(use)
                    raise
    except OSError as error:
        raise UserError(f"data.stage: {error.filename or base}: {error.strerror}") from None
    return staged


def _sweep(base: Path) -> None:
    """Remove the copies that nobody uses. The caller holds the lock of ``base``."""
    for marker in base.glob("*.use"):
        use = files.take_lock(marker, wait=False)
        if use is not None:
            shutil.rmtree(marker.with_suffix(""), ignore_errors=True)
            marker.unlink(missing_ok=True)
            os.close(use)


def _copy(source: Transport, manifest: Manifest, folder: Path) -> None:
    folder.mkdir(mode=0o700)
    indexed = [record for record in manifest.shards if record.layout is None]
    needed = sum(record.bytes for record in manifest.shards)
    needed += sum(index_limit(record, manifest.members) for record in indexed)
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise UserError(
            f"data.stage: {folder.parent} has {free / 1e9:.3g} GB free, but {source.location} needs {needed / 1e9:.3g} "
            "GB; make room, name another folder, or leave stage empty"
        )
    began = time.monotonic()
    size = f"{len(manifest.shards)} shards, {needed / 1e9:.3g} GB"
    print(f"staging {source.location} in {folder}: {size}", flush=True)

    def shard(record: ShardRecord) -> None:
        with open(folder / record.name, "w+b") as file:
            fetch_shard(source, record, file)

    said = began
    with ThreadPoolExecutor(_AT_ONCE) as threads:
        try:
            for done, _ in enumerate(threads.map(shard, manifest.shards), 1):
                if time.monotonic() > said + _SAID_EVERY_S:
                    said = time.monotonic()
                    print(f"staging {source.location}: {done} of {len(manifest.shards)} shards", flush=True)
        except BaseException:
            threads.shutdown(cancel_futures=True)
            raise
    for record in indexed:
        index = folder / index_name(record.name)
        try:
            with open(index, "w+b") as file:
                fetch(source, index.name, file, index_limit(record, manifest.members), sha256=record.index_sha256)
        except NotThere:
            index.unlink()  # it is made again when the shard is opened
    write_manifest(folder, manifest)
    print(f"staged {source.location} in {time.monotonic() - began:.1f} s", flush=True)
