"""Which sample of a damaged shard is damaged: a CRC-32 per sample, in a small file beside the tar.

NAME.crc32 holds uint32 [samples], little-endian: the checksum of all bytes from a sample's first tar header to the
next sample's, the last one's to the end of the file. So every byte of a shard belongs to one sample. The manifest's
sha256 decides whether a shard is whole; these only say where it is not. Shards of other programs have none until
``llamagen shards index`` makes them.
"""

import os
import zlib
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from llamagen_dist.data.manifest import ShardRecord

_HEADER = 512
_NAMED = 5  # damaged samples that a message lists


def checksum_name(shard: str) -> str:
    return f"{shard.removesuffix('.tar')}.crc32"


def starts(record: ShardRecord, spans: NDArray[np.uint64] | None) -> NDArray[np.int64]:
    """int64 [samples]: where each sample begins. spans: uint64 [samples, members, 2], unless there is a layout."""
    if record.layout is not None and record.stride is not None:
        first = min(offset for offset, _ in record.layout)
        return np.arange(record.samples, dtype=np.int64) * record.stride + first - _HEADER
    assert spans is not None
    offsets = spans[:, :, 0].astype(np.int64)
    return np.where(offsets > 0, offsets, np.iinfo(np.int64).max).min(axis=1) - _HEADER


def checksums(path: Path, begins: NDArray[np.int64]) -> NDArray[np.uint32]:
    """uint32 [samples] of the file as it is now. begins: int64 [samples], ascending."""
    sums = np.zeros(len(begins), "<u4")
    if len(begins) == 0:
        return sums
    with open(path, "rb") as file:
        ends = [*begins[1:].tolist(), os.fstat(file.fileno()).st_size]
        position = 0  # not begins[0]: what stands before the first sample counts as its own
        for number, end in enumerate(ends):
            value = 0
            while position < end and (block := file.read(min(1 << 20, end - position))):
                value = zlib.crc32(block, value)
                position += len(block)
            sums[number] = value
    return sums


def damage(path: Path, record: ShardRecord, begins: NDArray[np.int64], recorded: bytes | None) -> str:
    """Which samples of a file with another sha256 are damaged, as the end of a sentence.

    recorded: the content of the checksum file; None: there is none.
    """
    if recorded is None or len(recorded) != 4 * record.samples:
        return f" (which sample cannot be told without {checksum_name(record.name)})"
    wrong = np.nonzero(checksums(path, begins) != np.frombuffer(recorded, "<u4"))[0].tolist()
    if not wrong:
        return " (no sample's checksum differs: the manifest belongs to another copy)"
    more = "" if len(wrong) <= _NAMED else f" and {len(wrong) - _NAMED} more"
    return f" (damaged: sample {', '.join(str(number) for number in wrong[:_NAMED])}{more} of {record.samples})"
