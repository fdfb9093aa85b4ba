"""Where the files of an open set of shards come from: a folder, or a remote one through the cache."""

import hashlib
import tempfile
from pathlib import Path
from typing import IO, Protocol

import numpy as np
from numpy.typing import NDArray

from llamagen_dist.data.access.cache import Cache
from llamagen_dist.data.access.remote import NotThere, fetch
from llamagen_dist.data.access.transport import Transport
from llamagen_dist.data.index import TarIndex, index_bytes, index_name, scan
from llamagen_dist.data.manifest import ShardRecord
from llamagen_dist.errors import UserError
from llamagen_dist.files import write_bytes


class ShardFolder(Protocol):
    location: str
    """For messages."""

    def shown(self, name: str) -> str:
        """One of its files, for messages."""

    def open(self, record: ShardRecord) -> IO[bytes]:
        """A shard, unbuffered. Raises UserError."""

    def index(self, record: ShardRecord, members: tuple[str, ...]) -> IO[bytes]:
        """The (checked) index file of a shard without layout, unbuffered. Raises UserError."""


class LocalFolder:
    """A mounted folder. An index that is missing or damaged is made again from its tar."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.location = folder, str(folder)
        self._checked: set[str] = set()  # indexes whose bytes were compared already

    def shown(self, name: str) -> str:
        return str(self.folder / name)

    def open(self, record: ShardRecord) -> IO[bytes]:
        path = self.folder / record.name
        try:
            return open(path, "rb", buffering=0)
        except OSError as error:
            raise UserError(f"{path}: cannot be read ({error.strerror}); copy it here again") from None

    def index(self, record: ShardRecord, members: tuple[str, ...]) -> IO[bytes]:
        path = self.folder / index_name(record.name)
        try:
            file = open(path, "rb", buffering=0)  # noqa: SIM115 - the caller's
            if record.name in self._checked or hashlib.sha256(file.read()).hexdigest() == record.index_sha256:
                self._checked.add(record.name)
                return file
            file.close()
            problem = "is damaged"
        except OSError as error:
            problem = f"cannot be read ({error.strerror})"
        data = rebuilt_index(self.folder / record.name, str(path), record, members)
        try:
            write_bytes(path, data)
            done = "and was made again"
        except OSError:
            done = "and was made again, for this process only, because the folder cannot be written"
        print(f"{path}: {problem} {done}", flush=True)
        kept = tempfile.TemporaryFile(buffering=0)  # noqa: SIM115 - the caller's
        kept.write(data)
        return kept


def rebuilt_index(tar: Path, shown: str, record: ShardRecord, members: tuple[str, ...]) -> bytes:
    """The content of an index file from its tar. Raises UserError where it is not the one that was recorded."""
    found: TarIndex = scan(tar)
    data = index_bytes(found.columns(members)) if set(found.members) <= set(members) else b""
    if hashlib.sha256(data).hexdigest() != record.index_sha256:
        raise UserError(
            f"{shown}: cannot be made again, because {record.name} has changed since the manifest was written; copy or "
            "make the shard again"
        )
    return data


def spans_start(file: IO[bytes], record: ShardRecord, members: tuple[str, ...]) -> int:
    """Where the numbers, uint64 [samples, members, 2], begin in an index file.

    Raises UserError where it does not fit the manifest.
    """
    try:
        file.seek(0)
        version = np.lib.format.read_magic(file)
        shape, fortran, dtype = np.lib.format.read_array_header_1_0(file)
    except (ValueError, EOFError, OSError) as error:
        raise UserError(f"{index_name(record.name)}: not an index ({error}); run llamagen shards index") from None
    if version != (1, 0) or fortran or dtype != np.dtype("<u8") or shape != (record.samples, len(members), 2):
        raise UserError(
            f"{index_name(record.name)}: holds {dtype} {shape}, not uint64 {(record.samples, len(members), 2)}; run "
            "llamagen shards index"
        )
    return file.tell()


def all_spans(file: IO[bytes], record: ShardRecord, members: tuple[str, ...]) -> NDArray[np.uint64]:
    """uint64 [samples, members, 2]: the whole index. Raises UserError."""
    start = spans_start(file, record, members)
    file.seek(start)
    return np.frombuffer(file.read(), "<u8").reshape(record.samples, len(members), 2)


class RemoteFolder:
    """A remote folder, whose files come through the cache when they are opened."""

    def __init__(self, source: Transport, cache: Cache, members: tuple[str, ...]) -> None:
        self.source, self.cache, self.location, self._members = source, cache, source.location, members

    def shown(self, name: str) -> str:
        return self.source.shown(name)

    def open(self, record: ShardRecord) -> IO[bytes]:
        return self.cache.open(record.sha256, record.bytes, lambda file: fetch_shard(self.source, record, file))

    def index(self, record: ShardRecord, members: tuple[str, ...]) -> IO[bytes]:
        limit = index_limit(record, members)

        def fill(file: IO[bytes]) -> None:
            try:
                fetch(self.source, index_name(record.name), file, limit, sha256=record.index_sha256)
            except NotThere:
                with self.open(record) as tar:
                    path = Path(f"/dev/fd/{tar.fileno()}")
                    file.write(rebuilt_index(path, self.shown(index_name(record.name)), record, members))
                print(f"{self.shown(index_name(record.name))}: is missing and was made again in the cache", flush=True)

        return self.cache.open(str(record.index_sha256), limit, fill)


def index_limit(record: ShardRecord, members: tuple[str, ...]) -> int:
    """More bytes than the index file has: 16 per member and sample, and numpy's header."""
    return 16 * record.samples * len(members) + 1024


def fetch_shard(source: Transport, record: ShardRecord, file: IO[bytes]) -> None:
    """Fill ``file`` with a shard, checked; see ``fetch``."""
    fetch(source, record.name, file, record.bytes, record.bytes, record.sha256)
