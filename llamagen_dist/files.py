"""Files that are the old one or the new one, never half, and their hashes. Imports nothing heavy."""

import hashlib
import os
from pathlib import Path


def write_bytes(path: Path, data: bytes) -> None:
    """Write aside, fsync, rename: ``path`` is either the old file or the whole new one, after a power cut too."""
    aside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with open(aside, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(aside, path)
    sync_folder(path.parent)


def write_text(path: Path, text: str) -> None:
    """``write_bytes`` of UTF-8."""
    write_bytes(path, text.encode())


def sync_folder(folder: Path) -> None:
    """Make renames in ``folder`` survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256_file(path: Path) -> str:
    """sha256 (hex) of a file."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
