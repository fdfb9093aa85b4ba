"""Where each part of each sample lies in an uncompressed tar, whoever wrote it.

The naming rule is WebDataset's: the key is the path up to the first dot of the file's base name, the rest
(lower case) says which part of the sample it is, and parts of one sample stand next to each other.
"""

import io
import re
import tarfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from llamagen_dist.config import UserError

_META = re.compile(r"__[^/]*__(?:$|/)")  # WebDataset keeps such names for itself
_NAME = re.compile(r"^((?:.*/)?[^./][^./]*)(\.[^/]+)$")


@dataclass(frozen=True)
class TarIndex:
    """spans: uint64 [samples, members, 2] of (offset, size); (0, 0) where a sample lacks the member."""

    members: tuple[str, ...]
    spans: NDArray[np.uint64]

    def columns(self, members: tuple[str, ...]) -> "TarIndex":
        """The same index with the columns named ``members``; all of this index's own must be among them."""
        spans = np.zeros((len(self.spans), len(members), 2), np.uint64)
        for number, member in enumerate(self.members):
            spans[:, members.index(member)] = self.spans[:, number]
        return TarIndex(members, spans)

    def stride(self) -> int | None:
        """Bytes from sample to sample where all records are laid out alike, else None."""
        if len(self.spans) == 0 or not self.spans[:, :, 0].all():
            return None
        steps = np.diff(self.spans[:, :, 0].astype(np.int64), axis=0)
        same_sizes = (self.spans[:, :, 1] == self.spans[0, :, 1]).all()
        if not same_sizes or (steps.size and not (steps == steps[0, 0]).all()):
            return None
        return int(steps[0, 0]) if steps.size else 1


def scan(path: Path) -> TarIndex:
    """Read the headers of one tar.

    Raises UserError, naming the file and the member: not an uncompressed tar, cut short, a link or device, a
    name that is absolute or holds ``..``, the same member twice in a sample, a sparse file.
    """
    rows: list[dict[str, tuple[int, int]]] = []
    current = None
    size = path.stat().st_size
    try:
        with tarfile.open(path, mode="r:") as tar:
            for item in tar:
                tar.members = []  # type: ignore[attr-defined]  # tarfile would keep every header in memory
                key, member = _split(path, item)
                if key is None:
                    continue
                if item.offset_data + item.size > size:
                    raise UserError(f"{path}: cut short inside {item.name!r}; copy the shard again")
                if key != current:
                    current = key
                    rows.append({})
                if member in rows[-1]:
                    raise UserError(f"{path}: sample {key!r} has {member} twice")
                rows[-1][member] = (item.offset_data, item.size)
    except (tarfile.TarError, EOFError) as error:
        raise UserError(
            f"{path}: not a complete uncompressed tar ({error}); unpack a compressed one first, "
            "because samples are read from the middle of the file"
        ) from None
    members = tuple(sorted({member for row in rows for member in row}))
    spans = np.zeros((len(rows), len(members), 2), np.uint64)
    for number, row in enumerate(rows):
        for member, span in row.items():
            spans[number, members.index(member)] = span
    return TarIndex(members, spans)


def _split(path: Path, item: tarfile.TarInfo) -> tuple[str | None, str]:
    """(key, member) of a tar entry; (None, "") for what WebDataset ignores (folders, names without an
    ending).
    """
    if item.name.startswith("/") or ".." in item.name.split("/"):
        raise UserError(f"{path}: the member name {item.name!r} leaves the archive; the shard is refused")
    if item.isdir():
        return None, ""
    if not item.isreg() or item.issparse():
        raise UserError(f"{path}: the member {item.name!r} is a link, device or sparse file; the shard is refused")
    match = _NAME.match(item.name)
    return (match[1], match[2].lower()) if match and not _META.search(item.name) else (None, "")


def index_name(shard: str) -> str:
    return f"{shard.removesuffix('.tar')}.index.npy"


def index_bytes(index: TarIndex) -> bytes:
    """The index as the bytes of an .npy file, which numpy can memory-map."""
    buffer = io.BytesIO()
    np.save(buffer, index.spans, allow_pickle=False)
    return buffer.getvalue()
