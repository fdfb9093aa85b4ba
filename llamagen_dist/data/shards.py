"""Reading shards by global sample number: one pread per part, and no Python object per sample.

A folder holds uncompressed WebDataset tars, manifest.json and, for shards whose records differ in length, offsets.
``open_shards`` looks at every file's size; verify.py reads every byte. Nothing is memory-mapped: a file that is cut
short, deleted on a network disk, or unreadable while it is in use then is an error with a name, not a SIGBUS.
"""

import os
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np
from numpy.typing import NDArray

from llamagen_dist.config import ShardAccess, is_remote
from llamagen_dist.data.access.cache import Cache
from llamagen_dist.data.access.folders import LocalFolder, RemoteFolder, ShardFolder, spans_start
from llamagen_dist.data.access.remote import fetch_manifest
from llamagen_dist.data.access.staging import stage
from llamagen_dist.data.access.transport import transport
from llamagen_dist.data.index import index_name
from llamagen_dist.data.manifest import MANIFEST, Manifest, ShardRecord, read_manifest
from llamagen_dist.errors import UserError

IMAGE_MEMBERS = (".png", ".jpg", ".jpeg", ".webp")
LABEL_MEMBER = ".cls"
CAPTION_MEMBER = ".txt"
"""The caption, UTF-8; the long one where there are two."""
SHORT_CAPTION_MEMBER = ".short.txt"
_OPEN_FILES = 256  # kept open, indexes among them; two sets stay far below the usual limit of 1,024 per process


@dataclass(frozen=True)
class _OpenShard:
    file: IO[bytes]  # closed when the last thread that reads it lets go
    descriptor: int
    index: IO[bytes] | None
    index_start: int


class Shards:
    """Open shards; made by ``open_shards``. Samples are numbered over all shards in manifest order.

    Threads may share one object.
    """

    def __init__(self, folder: Path, manifest: Manifest, source: ShardFolder | None = None) -> None:
        self.folder, self.manifest = folder, manifest
        self.source: ShardFolder = LocalFolder(folder) if source is None else source
        self.location = self.source.location
        """Folder or URL, for messages."""
        self.sizes = np.array([shard.samples for shard in manifest.shards], np.int64)
        """int64 [shards]: the samples of each shard."""
        self.ends = np.cumsum(self.sizes)
        """int64 [shards]: the global number after each shard's last sample."""
        self._open: dict[int, _OpenShard] = {}  # in the order in which they were opened
        self._most_open = _OPEN_FILES // (1 if all(shard.layout is not None for shard in manifest.shards) else 2)
        self._tables: dict[str, NDArray[np.int64]] = {}

    def __len__(self) -> int:
        return self.manifest.count

    def locate(self, sample: int) -> tuple[int, int]:
        """(shard number, sample number inside it). Raises IndexError outside 0 … len-1."""
        if not 0 <= sample < len(self):
            raise IndexError(f"sample {sample} of {len(self)} in {self.location}")
        shard = int(np.searchsorted(self.ends, sample, side="right"))
        return shard, sample - int(self.ends[shard]) + self.manifest.shards[shard].samples

    def read(self, sample: int, member: str) -> bytes:
        """The bytes of one part of one sample, for example ``read(7, ".png")``.

        Raises UserError where the sample has no such part, IndexError outside 0 … len-1.
        """
        shards, offsets, sizes = self.spans(np.array([sample]), member)
        data = bytearray(int(sizes[0]))
        self.read_into(int(shards[0]), memoryview(data), int(offsets[0]))
        return bytes(data)

    def parts(self, sample: int) -> tuple[str, ...]:
        """The members that this sample has."""
        shard, row = self.locate(sample)
        if self.manifest.shards[shard].layout is not None:
            return self.manifest.members
        width = 16 * len(self.manifest.members)
        spans = np.frombuffer(self._index(shard, row * width, width), "<u8").reshape(-1, 2)
        return tuple(name for name, span in zip(self.manifest.members, spans, strict=True) if span[0])

    def spans(
        self, samples: NDArray[np.int64], member: str
    ) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
        """(shard numbers, offsets, sizes), int64 [n] each: where one part of each sample lies.

        samples: int64 [n]. Raises UserError where a sample has no such part, IndexError outside 0 … len-1.
        """
        if len(samples) and not 0 <= int(samples.min()) <= int(samples.max()) < len(self):
            raise IndexError(f"samples {samples.min()} to {samples.max()} of {len(self)} in {self.location}")
        shard_of = np.searchsorted(self.ends, samples, side="right")
        table = self._table(member)
        rows = samples - table[0][shard_of]
        offsets, sizes = table[1][shard_of] + rows * table[2][shard_of], table[3][shard_of]
        indexed = np.nonzero(offsets < 0)[0]  # records that differ in length
        if len(indexed):
            offsets[indexed] = 0
            if member in self.manifest.members:
                members = self.manifest.members
                places = 16 * (rows[indexed] * len(members) + members.index(member))
                pairs = zip(shard_of[indexed].tolist(), places.tolist(), strict=True)
                found = np.frombuffer(b"".join([self._index(shard, place, 16) for shard, place in pairs]), "<u8")
                offsets[indexed], sizes[indexed] = found.reshape(-1, 2).T.astype(np.int64)
        if len(samples) and offsets.min() <= 0:
            bad = int(samples[int(np.argmin(offsets))])
            raise UserError(f"{self.where(bad)} has no {member} (found: {self.parts(bad)})")
        outside = offsets + sizes > table[4][shard_of]
        if outside.any():
            raise UserError(
                f"{self.where(int(samples[int(np.argmax(outside))]))}: the index or manifest says that it lies outside "
                "its file; run llamagen shards index"
            )
        return shard_of, offsets, sizes

    def _table(self, member: str) -> NDArray[np.int64]:
        """int64 [5, shards]: first sample, first offset (0: no such part, very negative: by index), stride, size of
        the part, size of the file.
        """
        if member not in self._tables:
            column = self.manifest.members.index(member) if member in self.manifest.members else None
            table = np.zeros((5, len(self.ends)), np.int64)
            table[0, 1:] = self.ends[:-1]
            table[4] = [record.bytes for record in self.manifest.shards]
            for number, record in enumerate(self.manifest.shards):
                if record.layout is None or record.stride is None:
                    table[1, number] = np.iinfo(np.int64).min
                elif column is not None:
                    offset, size = record.layout[column]
                    table[1:4, number] = offset, record.stride, size
            self._tables[member] = table
        return self._tables[member]

    def _index(self, shard: int, place: int, size: int) -> bytes:
        """A piece of a shard's index, which is not kept in memory."""
        opened = self._open.get(shard) or self._shard(shard)
        assert opened.index is not None
        data = os.pread(opened.index.fileno(), size, opened.index_start + place)
        if len(data) != size:
            name = index_name(self.manifest.shards[shard].name)
            raise UserError(
                f"{self.source.shown(name)}: was cut short while it was in use; run llamagen shards index "
                f"{self.location}"
            )
        return data

    def read_into(self, shard: int, buffer: memoryview, offset: int) -> None:
        """Fill a buffer of bytes from one place of a shard; about two microseconds.

        Raises UserError, naming the shard, where it cannot be read any more or ends before.
        """
        try:
            opened = self._open.get(shard) or self._shard(shard)
            found = os.preadv(opened.descriptor, [buffer], offset)
        except OSError as error:
            raise self._unreadable(shard, error.strerror) from None
        if found != len(buffer):
            raise self._cut(shard, offset)

    def image_bytes(self, sample: int) -> bytes:
        """The encoded image of one sample, in whichever format it is stored."""
        parts = self.parts(sample)
        member = next((name for name in IMAGE_MEMBERS if name in parts), None)
        if member is None:
            raise UserError(f"{self.where(sample)}: no image (found: {parts})")
        return self.read(sample, member)

    def labels(self, samples: Sequence[int] | NDArray[np.int64], num_classes: int | None = None) -> NDArray[np.int64]:
        """int64 [n]: the class labels. num_classes: how many to allow (default: the manifest's).

        Raises UserError for a missing, unreadable or too large label.
        """
        classes = self.manifest.num_classes if num_classes is None else num_classes
        labels = np.empty(len(samples), np.int64)
        for number, sample in enumerate(samples):
            text = self.read(int(sample), LABEL_MEMBER)
            labels[number] = int(text) if text.strip().isdigit() else -1
            if not 0 <= labels[number] < classes:
                raise UserError(f"{self.where(int(sample))}: label {text!r} is not one of the {classes} classes")
        return labels

    def where(self, sample: int) -> str:
        """``folder/shard.tar: sample N`` for messages."""
        shard, row = self.locate(sample)
        return f"{self.where_shard(shard)}: sample {row}"

    def where_shard(self, shard: int) -> str:
        """``folder/shard.tar`` for messages."""
        return self.source.shown(self.manifest.shards[shard].name)

    def _unreadable(self, shard: int, problem: str | None) -> UserError:
        return UserError(f"{self.where_shard(shard)}: cannot be read any more ({problem}); copy the shard again")

    def _cut(self, shard: int, offset: int) -> UserError:
        return UserError(
            f"{self.where_shard(shard)}: ends before byte {offset:,}, where a sample lies: it was cut short while it "
            f"was in use; copy the shard again (sha256 {self.manifest.shards[shard].sha256})"
        )

    def _shard(self, number: int) -> _OpenShard:
        opened = self._open.get(number)
        if opened is None:  # two threads may both open it, which does no harm
            record = self.manifest.shards[number]
            file = self.source.open(record)
            if (found := os.fstat(file.fileno()).st_size) != record.bytes:
                raise UserError(_other_size(str(file.name), found, record))
            index, start = None, 0
            if record.layout is None:
                index = self.source.index(record, self.manifest.members)
                start = spans_start(index, record, self.manifest.members)
            opened = _OpenShard(file, file.fileno(), index, start)
            self._let_go()
            self._open[number] = opened
        return opened

    def _let_go(self) -> None:
        """Of the longest open, and of files that the cache has dropped: they fill the disk until they are closed."""
        if isinstance(self.source, RemoteFolder):
            for number, opened in list(self._open.items()):
                if os.fstat(opened.descriptor).st_nlink == 0:
                    self._open.pop(number, None)
        for number in list(self._open)[: max(len(self._open) - self._most_open + 1, 0)]:
            self._open.pop(number, None)

    def close(self) -> None:
        """Close the files; the object opens them again when it is read."""
        self._open.clear()


def manifest_of(location: str | Path, access: ShardAccess | None = None) -> Manifest:
    """The manifest alone, of a folder or a remote one. Raises UserError where there is none."""
    if is_remote(location):
        return fetch_manifest(transport(location, access is not None and access.allow_pipe))
    return read_manifest(Path(location))


def open_shards(location: str | Path, kind: str | None = None, access: ShardAccess | None = None) -> Shards:
    """Open a folder of shards after comparing every shard's size with the manifest.

    location: a folder, or where ``access`` says how to bring its shards near, ``http(s)://``, ``s3://`` or ``pipe:``.
    kind: ``images`` or ``tokens`` where only that will do. Raises UserError: no manifest, another kind, no samples, a
    shard missing, cut short or grown (named with both sizes and the recorded sha256), a source that cannot be reached.
    """
    stage_in = None if access is None else access.staged_in
    access = ShardAccess() if access is None else access
    near = not is_remote(location)
    source = transport(location, access.allow_pipe)
    if not near and access.cache is None and stage_in is None:
        raise UserError(
            f"{source.location}: shards from elsewhere need a folder on a local disk to be kept in: set data.cache "
            "(and data.cache_gb), or data.stage"
        )
    manifest = manifest_of(location, access)
    if kind is not None and manifest.kind != kind:
        hint = "extract tokens from them first" if kind == "tokens" else "name the image shards instead"
        raise UserError(f"{source.location}: holds {manifest.kind}, but {kind} are needed here; {hint}")
    if manifest.count == 0:
        raise UserError(f"{source.location}: the shards hold no samples")
    if near:
        _check_sizes(Path(location), manifest)
    if stage_in is not None:
        staged = stage(source, manifest, stage_in)
        shards = Shards(staged.folder, manifest)
        weakref.finalize(shards, staged.release)
        return shards
    if near:
        return Shards(Path(location), manifest)
    assert access.cache is not None
    cache = Cache(access.cache, int(access.cache_gb * 1e9))
    return Shards(access.cache, manifest, RemoteFolder(source, cache, manifest.members))


def _check_sizes(folder: Path, manifest: Manifest) -> None:
    problems = [text for record in manifest.shards if (text := _size_problem(folder, record))]
    if problems:
        raise UserError("\n".join(problems))


def _size_problem(folder: Path, record: ShardRecord) -> str | None:
    path = folder / record.name
    try:
        found = path.stat().st_size
    except OSError as error:
        return f"{error.filename}: {error.strerror}, but {MANIFEST} lists {record.name}; copy it here again"
    return None if found == record.bytes else _other_size(str(path), found, record)


def _other_size(path: str, found: int, record: ShardRecord) -> str:
    return (
        f"{path}: {found} bytes, but {MANIFEST} records {record.bytes} (sha256 {record.sha256}): the shard "
        "was cut short or changed; copy or make it again"
    )
