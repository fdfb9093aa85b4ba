"""Files that are the old one or the new one, never half, and their hashes. Imports nothing heavy."""

import errno
import hashlib
import math
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def written_aside(path: Path) -> Iterator[Path]:
    """Where to write the content of ``path``; at the end of the block it is synced and renamed.

    ``path`` is either the old file or the whole new one, after a power cut too. An exception leaves nothing behind.
    The name keeps the suffix, by which some writers and readers tell the format.
    """
    aside = path.with_name(f".{path.stem}.{socket.gethostname()}.{os.getpid()}.tmp{path.suffix}")
    try:
        yield aside
        with open(aside, "rb") as file:
            os.fsync(file.fileno())
        os.replace(aside, path)
        sync_folder(path.parent)
    finally:
        aside.unlink(missing_ok=True)


def remove_asides(folder: Path) -> None:
    """Delete what killed writers of files in ``folder`` left. Only while nobody else writes there."""
    for left in folder.glob(".*.tmp*"):
        left.unlink(missing_ok=True)


def write_bytes(path: Path, data: bytes) -> None:
    """A whole small file; see ``written_aside``."""
    with written_aside(path) as aside:
        aside.write_bytes(data)


def write_text(path: Path, text: str) -> None:
    """``write_bytes`` of UTF-8."""
    write_bytes(path, text.encode())


def sync_folder(folder: Path) -> None:
    """Make renames in ``folder`` survive a power cut, where its disk can."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP):  # what disks say that sync files only
            raise
    finally:
        os.close(descriptor)


def seconds_old(path: Path) -> float:
    """Since a file was last written, by the clock of its disk, as the clocks of hosts differ; infinite where it is
    missing. The folder must be writable."""
    now = path.with_name(f".now.{socket.gethostname()}.{os.getpid()}")
    try:
        now.touch()
        return now.stat().st_mtime - path.stat().st_mtime
    except FileNotFoundError:
        return math.inf
    finally:
        now.unlink(missing_ok=True)


def sha256_file(path: Path) -> str:
    """sha256 (hex) of a file."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
