"""Where each part of each sample lies in an uncompressed tar, whoever wrote it.

The naming rule is WebDataset's: the key is the path up to the first dot of the file's base name, the rest
(lower case) says which part of the sample it is, and parts of one sample stand next to each other.
"""

import hashlib
import io
import re
import tarfile
import tempfile
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, BinaryIO

import numpy as np
from numpy.typing import NDArray

from llamagen_dist.console import LOG
from llamagen_dist.data import npy
from llamagen_dist.data.manifest import ShardRecord
from llamagen_dist.errors import UserError
from llamagen_dist.files import write_bytes

_BLOCK = tarfile.BLOCKSIZE
_META = re.compile(r"__[^/]*__(?:$|/)")  # WebDataset keeps such names for itself
_NAME = re.compile(r"^((?:.*/)?[^./][^./]*)(\.[^/]+)$")


@dataclass(frozen=True)
class TarIndex:
    """spans: uint64 [samples, members, 2] of (offset, size); (0, 0) where a sample lacks the member.

    ignored: the names of files that are no part of a sample (hidden ones, such as AppleDouble's ``._`` files, and those
    without an ending), as WebDataset ignores them.
    """

    members: tuple[str, ...]
    spans: NDArray[np.uint64]
    ignored: tuple[str, ...] = ()

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


def entries(path: Path, start: int = 0, end: int | None = None) -> Iterator[tarfile.TarInfo]:
    """The files (no folders) in the uncompressed tar that fills bytes ``start`` … ``end`` of ``path``.

    Several tars one after another, as ``cat a.tar b.tar`` leaves them, are read as ``tar --ignore-zeros`` does: all of
    them. ``offset_data`` counts from the beginning of ``path``. Raises UserError, naming the file and the member: not
    an uncompressed tar, cut short or damaged, a link, device or sparse file, a name that is absolute or holds ``..``.
    """
    try:
        end = path.stat().st_size if end is None else end
        with open(path, "rb") as file:
            archive: int | None = start
            while archive is not None:
                file.seek(archive)
                with tarfile.open(fileobj=file, mode="r:") as tar:
                    for item in tar:
                        tar.members = []  # type: ignore[attr-defined]  # tarfile would keep every header in memory
                        _check(path, item)
                        if item.offset_data + (item.size if item.isreg() else 0) > end:
                            raise UserError(f"{path}: cut short inside {shown(item.name)}; copy the tar again")
                        if item.isreg():
                            yield item
                    archive = _next_archive(path, file, tar.offset, end)
    except (tarfile.TarError, EOFError) as error:
        raise UserError(f"{path}: not a complete uncompressed tar ({error}); unpack a compressed one first") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None


def _next_archive(path: Path, file: BinaryIO, position: int, end: int) -> int | None:
    """Where the next header stands after the archive that ends at ``position``; None: there is no further archive.

    Raises UserError where damage could hide samples.
    """
    file.seek(position)
    # tarfile takes a damaged header for the end: what lies there must be the empty block that closes a tar
    if position + _BLOCK > end or any(file.read(_BLOCK)):
        raise UserError(f"{path}: cut short or damaged at byte {position} of {end}; copy the tar again")
    position += _BLOCK
    # Writers fill the last record up with empty blocks, and ``cat`` leaves those in the middle: up to the first byte
    # that is not zero nothing can be lost.
    while position < end:
        piece = file.read(min(1 << 20, end - position))
        if not piece:
            break
        if stripped := piece.lstrip(b"\0"):
            position += (len(piece) - len(stripped)) // _BLOCK * _BLOCK
            break
        position += len(piece)
    else:
        return None
    file.seek(position)
    try:
        tarfile.TarInfo.frombuf(file.read(_BLOCK), "utf-8", "surrogateescape")
    except tarfile.HeaderError:
        # POSIX leaves it open what the last record is filled up with, and nothing else may stand here
        if end - position < tarfile.RECORDSIZE:
            return None
        raise UserError(
            f"{path}: after the end of a tar, at byte {position} of {end}, stands something that is no other tar"
        ) from None
    return position


def _check(path: Path, item: tarfile.TarInfo) -> None:
    if item.name.startswith("/") or ".." in item.name.split("/"):
        raise UserError(f"{path}: the member name {shown(item.name)} leaves the archive; the shard is refused")
    if not item.isdir() and (not item.isreg() or item.issparse()):
        raise UserError(f"{path}: the member {shown(item.name)} is a link, device or sparse file; the shard is refused")


def shown(name: str) -> str:
    """A file name in quotes for a message or the manifest; bytes that are not UTF-8 as backslash escapes."""
    return repr(printable(name))


def printable(name: str) -> str:
    """A file name as text that can be encoded: bytes that are not UTF-8 become backslash escapes."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def scan(path: Path) -> TarIndex:
    """Read the headers of one tar of WebDataset samples.

    Raises UserError as ``entries`` does, and for the same member twice in a sample, a sample in two pieces, and a
    member whose ending is not UTF-8.
    """
    # Two integers per part and no Python object per sample: a shard may hold a million samples.
    columns: dict[str, array[int]] = {}
    rows, current, seen, ignored = 0, None, set[str](), list[str]()
    for item in entries(path):
        key, member = _split(item.name)
        if key is None:
            ignored.append(item.name)
            continue
        if key != current:
            if key in seen:
                raise UserError(
                    f"{path}: the key {shown(key)} comes twice, with other samples between; write the tar again"
                )
            seen.add(key)
            current, rows = key, rows + 1
        if member not in columns and printable(member) != member:
            raise UserError(f"{path}: the ending of {shown(item.name)} is not UTF-8; rename that member")
        column = columns.setdefault(member, array("Q"))
        if len(column) == 2 * rows:
            raise UserError(f"{path}: sample {shown(key)} has {member} twice")
        column.extend([0] * (2 * rows - 2 - len(column)))  # the samples since, which lack it
        column.extend((item.offset_data, item.size))
    members = tuple(sorted(columns))
    spans = np.zeros((rows, len(members), 2), np.uint64)
    for number, member in enumerate(members):
        filled = np.array(columns[member], np.uint64).reshape(-1, 2)
        spans[: len(filled), number] = filled
    return TarIndex(members, spans, tuple(ignored))


def _split(name: str) -> tuple[str | None, str]:
    """(key, member) of a tar entry; (None, "") for what WebDataset ignores (names without an ending)."""
    match = _NAME.match(name)
    return (match[1], match[2].lower()) if match and not _META.search(name) else (None, "")


def index_name(shard: str) -> str:
    return f"{shard.removesuffix('.tar')}.index.npy"


def index_bytes(index: TarIndex) -> bytes:
    """The index as the bytes of an .npy file, which numpy can memory-map."""
    buffer = io.BytesIO()
    np.save(buffer, index.spans, allow_pickle=False)
    return buffer.getvalue()


def index_limit(record: ShardRecord, members: tuple[str, ...]) -> int:
    """More bytes than the index file has: 16 per member and sample, and the header."""
    return 16 * record.samples * len(members) + 1024


def open_index(folder: Path, record: ShardRecord, members: tuple[str, ...], trusted: set[str]) -> IO[bytes]:
    """The index file of a shard in a mounted folder, unbuffered; made again from its tar if it is missing or damaged.

    trusted: the shards whose index was compared already; it grows.
    Raises UserError where the tar is not the one that was indexed.
    """
    path = folder / index_name(record.name)
    try:
        file = open(path, "rb", buffering=0)  # noqa: SIM115 - the caller's
        if record.name in trusted or hashlib.sha256(file.read()).hexdigest() == record.index_sha256:
            trusted.add(record.name)
            return file
        file.close()
        problem = "is damaged"
    except OSError as error:
        problem = f"cannot be read ({error.strerror})"
    data = rebuilt_index(folder / record.name, str(path), record, members)
    try:
        write_bytes(path, data)
        done = "and was made again"
    except OSError:
        done = "and was made again, for this process only, because the folder cannot be written"
    LOG.info(f"{path}: {problem} {done}")
    own = tempfile.TemporaryFile(buffering=0)  # noqa: SIM115 - the caller's
    own.write(data)
    return own


def rebuilt_index(tar: Path, name: str, record: ShardRecord, members: tuple[str, ...]) -> bytes:
    """The content of an index file from its tar. Raises UserError where it is not the one that was recorded.

    name: of the index file, for messages.
    """
    index = scan(tar)
    data = index_bytes(index.columns(members)) if set(index.members) <= set(members) else b""
    if hashlib.sha256(data).hexdigest() != record.index_sha256:
        raise UserError(f"{name}: cannot be made again, because {record.name} has changed since; copy the shard again")
    return data


def spans_start(file: IO[bytes], record: ShardRecord, members: tuple[str, ...]) -> int:
    """Where the numbers, uint64 [samples, members, 2], begin in an index file.

    Raises UserError where it does not fit the manifest.
    """
    file.seek(0)
    start = npy.header_size(file.read(10))
    file.seek(0)
    shape = (record.samples, len(members), 2)
    if npy.shape_of(file.read(start), "<u8") != shape:
        raise UserError(f"{index_name(record.name)}: is not uint64 {list(shape)}; run llamagen shards index")
    return start


def all_spans(file: IO[bytes], record: ShardRecord, members: tuple[str, ...]) -> NDArray[np.uint64]:
    """uint64 [samples, members, 2]: the whole index. Raises UserError."""
    file.seek(spans_start(file, record, members))
    return np.frombuffer(file.read(), "<u8").reshape(record.samples, len(members), 2)
