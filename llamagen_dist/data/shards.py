"""Reading shards by global sample number: one pread per part, and no Python object per sample.

A folder holds uncompressed WebDataset tars, manifest.json and, for shards whose records differ in length, indexes of
offsets. ``open_shards`` looks at every file's size; verify.py reads every byte. Nothing is memory-mapped: a file that
is cut short, deleted on a network disk, or unreadable while it is in use then is an error with a name, not a SIGBUS.
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
from llamagen_dist.data import npy
from llamagen_dist.data.cache import NodeCache
from llamagen_dist.data.fetch import LocalSource, Source, source_at
from llamagen_dist.data.index import index_name, open_index, spans_start
from llamagen_dist.data.manifest import MANIFEST, Manifest, ShardRecord, read_manifest
from llamagen_dist.errors import UserError

IMAGE_MEMBERS = (".png", ".jpg", ".jpeg", ".webp")
LABEL_MEMBER = ".cls"
CAPTION_MEMBER = ".txt"
"""The caption, UTF-8; the long one where there are two."""
SHORT_CAPTION_MEMBER = ".short.txt"
_OPEN_FILES = 256  # kept open, indexes among them; two sets stay far below the usual limit of 1,024 per process
_LONGEST_LABEL = 18  # digits that fit into 64 bits
_LABELS_AT_ONCE = 1 << 16  # a whole set's labels, as bytes, would fill the memory


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

    def __init__(
        self, folder: Path, manifest: Manifest, source: Source | None = None, cache: NodeCache | None = None
    ) -> None:
        """
        folder: that holds the shards or, under the names of a cache, what has been fetched of them.
        source: where they come from (default: the folder).
        cache: through which they are read; None: where they lie.
        """
        self.folder, self.manifest, self.cache = folder, manifest, cache
        self._source = LocalSource(folder) if source is None else source
        self.location = self._source.location
        """Folder or URL, for messages."""
        self.sizes = np.array([shard.samples for shard in manifest.shards], np.int64)
        """int64 [shards]: the samples of each shard."""
        self.ends = np.cumsum(self.sizes)
        """int64 [shards]: the global number after each shard's last sample."""
        self._open: dict[int, _OpenShard] = {}  # in the order in which they were opened
        self._most_open = _OPEN_FILES // (1 if all(shard.layout is not None for shard in manifest.shards) else 2)
        self._tables: dict[str, NDArray[np.int64]] = {}
        self._row_sizes: dict[str, NDArray[np.int64]] = {}
        self._trusted_indexes: set[str] = set()

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
        return bytes(self.read_many(np.array([sample]), member)[0])

    def read_many(self, samples: NDArray[np.int64], member: str) -> list[bytearray]:
        """The bytes of one part of each sample.

        samples: int64 [n].
        Raises UserError where a sample has no such part, IndexError outside 0 … len-1.
        """
        shard_of, offsets, sizes = self.spans(samples, member)
        parts = [bytearray(size) for size in sizes.tolist()]
        for shard, offset, part in zip(shard_of.tolist(), offsets.tolist(), parts, strict=True):
            self._read_into(shard, memoryview(part), offset)
        return parts

    def read_rows(
        self, samples: NDArray[np.int64], member: str, rows: NDArray[np.int64], shape: tuple[int, int]
    ) -> NDArray[np.uint16]:
        """uint16 [n, W]: of each sample one row of the .npy array in its part ``member``, without reading the others.

        samples, rows: int64 [n].
        shape: (R, W), of every sample's array; its type is uint16.
        Raises UserError, naming shard and sample: no such part, an array of another shape or type.
        """
        shard_of, offsets, sizes = self.spans(samples, member)
        self._check_headers(samples, member, shape, shard_of, offsets, sizes)
        width = 2 * shape[1]
        values = np.empty((len(samples), shape[1]), "<u2")
        buffer = values.reshape(-1).view(np.uint8).data
        starts = offsets + sizes - (shape[0] - rows) * width  # from the end, as headers differ in length
        for row, (shard, start) in enumerate(zip(shard_of.tolist(), starts.tolist(), strict=True)):
            self._read_into(shard, buffer[row * width : (row + 1) * width], start)
        return values

    def _check_headers(
        self,
        samples: NDArray[np.int64],
        member: str,
        shape: tuple[int, int],
        shard_of: NDArray[np.int64],
        offsets: NDArray[np.int64],
        sizes: NDArray[np.int64],
    ) -> None:
        """One header a shard is read: in one shard equal sizes mean equal shapes."""
        if member not in self._row_sizes:
            self._row_sizes[member] = np.full(len(self.ends), -1, np.int64)
        checked = self._row_sizes[member]
        for row in np.nonzero(checked[shard_of] != sizes)[0].tolist():
            shard, size = int(shard_of[row]), int(sizes[row])
            if checked[shard] == size:
                continue
            header = bytearray(max(size - 2 * shape[0] * shape[1], 0))
            self._read_into(shard, memoryview(header), int(offsets[row]))
            if npy.shape_of(bytes(header), "<u2") != shape:
                raise UserError(
                    f"{self.where(int(samples[row]))}: its {member} is not uint16 {list(shape)}; extract them again"
                )
            checked[shard] = size

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
        # A few array operations for the whole batch: in Python, looking up one sample after another would take
        # longer than reading it.
        shard_of = np.searchsorted(self.ends, samples, side="right")
        table = self._table(member)
        rows = samples - table[0][shard_of]
        offsets, sizes = table[1][shard_of] + rows * table[2][shard_of], table[3][shard_of]
        indexed = np.nonzero(offsets < 0)[0]  # records that differ in length
        if len(indexed):
            offsets[indexed] = 0
            if member in self.manifest.members:
                members = self.manifest.members
                starts = 16 * (rows[indexed] * len(members) + members.index(member))
                pairs = zip(shard_of[indexed].tolist(), starts.tolist(), strict=True)
                spans = np.frombuffer(b"".join([self._index(shard, start, 16) for shard, start in pairs]), "<u8")
                offsets[indexed], sizes[indexed] = spans.reshape(-1, 2).T.astype(np.int64)
        if len(samples) and offsets.min() <= 0:
            bad = int(samples[int(np.argmin(offsets))])
            raise UserError(f"{self.where(bad)} has no {member} (it has: {self.parts(bad)})")
        outside = offsets + sizes > table[4][shard_of]
        if outside.any():
            bad = int(samples[int(np.argmax(outside))])
            raise UserError(f"{self.where(bad)}: {member} lies outside its file; run llamagen shards index")
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

    def _index(self, shard: int, start: int, size: int) -> bytes:
        """A piece of a shard's index, which is not kept in memory."""
        opened = self._open.get(shard) or self._shard(shard)
        assert opened.index is not None
        data = os.pread(opened.index.fileno(), size, opened.index_start + start)
        if len(data) != size:
            name = index_name(self.manifest.shards[shard].name)
            raise UserError(f"{self._source.shown(name)}: was cut short while it was in use; run llamagen shards index")
        return data

    def _read_into(self, shard: int, buffer: memoryview, offset: int) -> None:
        """Fill a buffer from one position of a shard; about two microseconds. Raises UserError, naming the shard."""
        try:
            opened = self._open.get(shard) or self._shard(shard)
            count = os.preadv(opened.descriptor, [buffer], offset)
        except OSError as error:
            raise UserError(
                f"{self._where_shard(shard)}: cannot be read any more ({error.strerror}); copy it again"
            ) from None
        if count != len(buffer):
            raise UserError(
                f"{self._where_shard(shard)}: ends before byte {offset:,}, where a sample lies: it was cut short while "
                f"it was in use; copy the shard again (sha256 {self.manifest.shards[shard].sha256})"
            )

    def image_bytes(self, sample: int) -> bytes:
        """The encoded image of one sample, in whichever format it is stored."""
        parts = self.parts(sample)
        member = next((name for name in IMAGE_MEMBERS if name in parts), None)
        if member is None:
            raise UserError(f"{self.where(sample)}: no image (it has: {parts})")
        return self.read(sample, member)

    def labels(self, samples: Sequence[int] | NDArray[np.int64], num_classes: int | None = None) -> NDArray[np.int64]:
        """int64 [n]: the class labels. num_classes: how many to allow (default: the manifest's).

        Raises UserError for a missing, unreadable or too large label.
        """
        classes = self.manifest.num_classes if num_classes is None else num_classes
        numbers = np.asarray(samples, np.int64)
        labels = np.empty(len(numbers), np.int64)
        for start in range(0, len(numbers), _LABELS_AT_ONCE):
            piece = numbers[start : start + _LABELS_AT_ONCE]
            for row, text in enumerate(self.read_many(piece, LABEL_MEMBER), start):
                labels[row] = int(text) if text.strip().isdigit() and len(text) <= _LONGEST_LABEL else -1
                if not 0 <= labels[row] < classes:
                    shown = bytes(text[:_LONGEST_LABEL])
                    raise UserError(
                        f"{self.where(int(numbers[row]))}: label {shown!r} is not one of the {classes} classes"
                    )
        return labels

    def where(self, sample: int) -> str:
        """``folder/shard.tar: sample N`` for messages."""
        shard, row = self.locate(sample)
        return f"{self._where_shard(shard)}: sample {row}"

    def _where_shard(self, shard: int) -> str:
        return self._source.shown(self.manifest.shards[shard].name)

    def _shard(self, number: int) -> _OpenShard:
        opened = self._open.get(number)
        if opened is None:  # two threads may both open it, which does no harm: the loser's file is closed unused
            record = self.manifest.shards[number]
            file = self._shard_file(record)
            if (size := os.fstat(file.fileno()).st_size) != record.bytes:
                raise UserError(_other_size(str(file.name), size, record))
            index, start = None, 0
            if record.layout is None:
                index = self.open_index(record)
                start = spans_start(index, record, self.manifest.members)
            opened = _OpenShard(file, file.fileno(), index, start)
            self._close_some()
            self._open[number] = opened
        return opened

    def _shard_file(self, record: ShardRecord) -> IO[bytes]:
        if self.cache is not None:
            return self.cache.shard(record)
        path = self.folder / record.name
        try:
            return open(path, "rb", buffering=0)
        except OSError as error:
            raise UserError(f"{path}: cannot be read ({error.strerror}); copy it here again") from None

    def open_index(self, record: ShardRecord) -> IO[bytes]:
        """The (checked) index file of a shard without layout, unbuffered. Raises UserError."""
        if self.cache is not None:
            return self.cache.index(record)
        return open_index(self.folder, record, self.manifest.members, self._trusted_indexes)

    def _close_some(self) -> None:
        """The longest open, and files that the cache has dropped: those fill the disk until they are closed."""
        if self.cache is not None:
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
        return source_at(location, access is not None and access.allow_pipe).manifest()
    return read_manifest(Path(location))


def open_shards(location: str | Path, kind: str | None = None, access: ShardAccess | None = None) -> Shards:
    """Open a folder of shards after comparing every shard's size with the manifest.

    location: a folder, or where ``access`` says how to bring its shards near, ``http(s)://``, ``s3://`` or ``pipe:``.
    kind: ``images`` or ``tokens`` where only that will do.
    Raises UserError: no manifest, another kind, no samples, a shard missing, cut short or grown (named with both sizes
    and the recorded sha256), a source that cannot be reached.
    """
    stage_in = None if access is None else access.staged_in
    access = ShardAccess() if access is None else access
    near = not is_remote(location)
    source = source_at(location, access.allow_pipe)
    if not near and access.cache is None and stage_in is None:
        raise UserError(
            f"{source.location}: remote shards need a local folder: set data.cache (and data.cache_gb), or data.stage"
        )
    manifest = read_manifest(Path(location)) if near else source.manifest()
    if kind is not None and manifest.kind != kind:
        hint = "extract tokens from them first" if kind == "tokens" else "name the image shards instead"
        raise UserError(f"{source.location}: holds {manifest.kind}, but {kind} are needed here; {hint}")
    if manifest.count == 0:
        raise UserError(f"{source.location}: the shards hold no samples")
    if near:
        problems = [_size_problem(Path(location), record) for record in manifest.shards]
        if any(problems):
            raise UserError("\n".join(filter(None, problems)))
    if stage_in is not None:
        cache = NodeCache.pinned(source, manifest, stage_in)
    elif near:
        return Shards(Path(location), manifest)
    else:
        assert access.cache is not None
        cache = NodeCache(source, manifest.members, access.cache, int(access.cache_gb * 1e9))
    shards = Shards(cache.folder, manifest, source, cache)
    weakref.finalize(shards, cache.release)
    return shards


def _size_problem(folder: Path, record: ShardRecord) -> str | None:
    path = folder / record.name
    try:
        size = path.stat().st_size
    except OSError as error:
        return f"{error.filename}: {error.strerror}, but {MANIFEST} lists {record.name}; copy it here again"
    return None if size == record.bytes else _other_size(str(path), size, record)


def _other_size(path: str, size: int, record: ShardRecord) -> str:
    return (
        f"{path}: {size} bytes, but {MANIFEST} records {record.bytes} (sha256 {record.sha256}): the shard "
        "was cut short or changed; copy or make it again"
    )
