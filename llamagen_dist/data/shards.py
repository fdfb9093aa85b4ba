"""Reading shards by global sample number: one pread per part, and no Python object per sample.

A folder holds uncompressed WebDataset tars, manifest.json and, for shards whose records differ in length,
memory-mapped offsets. ``open_shards`` looks at every file's size; ``verify`` reads every byte.
"""

import os
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from llamagen_dist.config import UserError
from llamagen_dist.data.index import index_name
from llamagen_dist.data.manifest import MANIFEST, Manifest, ShardRecord, read_manifest
from llamagen_dist.files import sha256_file

IMAGE_MEMBERS = (".png", ".jpg", ".jpeg", ".webp")
LABEL_MEMBER = ".cls"
CAPTION_MEMBER = ".txt"
"""The caption, UTF-8; the long one where there are two."""
SHORT_CAPTION_MEMBER = ".short.txt"
_OPEN_AT_ONCE = 256  # shards kept open; far below the usual limit of 1,024 files per process


@dataclass(frozen=True)
class _OpenShard:
    descriptor: int
    spans: NDArray[np.uint64] | None
    bytes: NDArray[np.uint8]


class Shards:
    """An open folder of shards; made by ``open_shards``. Samples are numbered over all shards in manifest
    order.
    """

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        self.folder, self.manifest = folder, manifest
        self.ends = np.cumsum([shard.samples for shard in manifest.shards], dtype=np.int64)
        """int64 [shards]: the global number after each shard's last sample."""
        self._starts = np.concatenate([np.zeros(1, np.int64), self.ends[:-1]])
        self._layouts: dict[str, tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]] = {}
        self._open: OrderedDict[int, _OpenShard] = OrderedDict()

    def __len__(self) -> int:
        return self.manifest.count

    def locate(self, sample: int) -> tuple[int, int]:
        """(shard number, sample number inside it). Raises IndexError outside 0 … len-1."""
        if not 0 <= sample < len(self):
            raise IndexError(f"sample {sample} of {len(self)} in {self.folder}")
        shard = int(np.searchsorted(self.ends, sample, side="right"))
        return shard, sample - int(self.ends[shard]) + self.manifest.shards[shard].samples

    def read(self, sample: int, member: str) -> bytes:
        """The bytes of one part of one sample, for example ``read(7, ".png")``.

        Raises UserError where the sample has no such part, IndexError outside 0 … len-1.
        """
        shard, row = self.locate(sample)
        record = self.manifest.shards[shard]
        opened = self._shard(shard)
        offset = size = 0
        if member in self.manifest.members:
            column = self.manifest.members.index(member)
            if record.layout is not None and record.stride is not None:
                offset, size = record.layout[column]
                offset += row * record.stride
            elif opened.spans is not None:
                offset, size = (int(number) for number in opened.spans[row, column])
        if offset == 0:
            raise UserError(f"{self.folder / record.name}: sample {row} has no {member} (found: {self.parts(sample)})")
        data = os.pread(opened.descriptor, size, offset)
        if len(data) != size:
            raise UserError(f"{self.folder / record.name}: ends inside sample {row}; copy the shard again")
        return data

    def parts(self, sample: int) -> tuple[str, ...]:
        """The members that this sample has."""
        shard, row = self.locate(sample)
        spans = self._shard(shard).spans
        if spans is None:
            return self.manifest.members
        return tuple(name for name, span in zip(self.manifest.members, spans[row], strict=True) if span[0])

    def spans(
        self, samples: NDArray[np.int64], member: str
    ) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
        """(shard, offset in its file, size) of one part of each sample, int64 [n] each. samples: int64 [n].

        Raises UserError where a sample has no such part, IndexError outside 0 … len-1.
        """
        if len(samples) and not 0 <= int(samples.min()) <= int(samples.max()) < len(self):
            raise IndexError(f"samples {samples.min()} to {samples.max()} of {len(self)} in {self.folder}")
        shard_of = np.searchsorted(self.ends, samples, side="right")
        inside = samples - self._starts[shard_of]
        offsets, strides, sizes = self._columns(member)
        offset, size = offsets[shard_of] + inside * strides[shard_of], sizes[shard_of]
        for row in np.nonzero(size < 0)[0].tolist():  # shards with an index
            spans = self._shard(int(shard_of[row])).spans
            if spans is not None and member in self.manifest.members:
                offset[row], size[row] = spans[inside[row], self.manifest.members.index(member)]
        lacking = np.nonzero(offset <= 0)[0]
        if len(lacking):
            self.read(int(samples[lacking[0]]), member)  # says so
        return shard_of, offset, size

    def _columns(self, member: str) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
        """(first offset, stride, size) of a member in every shard; 0, 0, -1 where its records differ in length."""
        if member not in self._layouts:
            columns = np.array([(0, 0, -1)] * len(self.manifest.shards), np.int64)
            if member in self.manifest.members:
                column = self.manifest.members.index(member)
                for number, record in enumerate(self.manifest.shards):
                    if record.layout is not None and record.stride is not None:
                        columns[number] = (record.layout[column][0], record.stride, record.layout[column][1])
            self._layouts[member] = (columns[:, 0], columns[:, 1], columns[:, 2])
        return self._layouts[member]

    def read_into(self, shard: int, buffer: memoryview, offset: int) -> None:
        """Fill ``buffer`` (bytes) from this place of a shard's file. Raises UserError where the file ends before."""
        if os.preadv(self._shard(shard).descriptor, [buffer], offset) != len(buffer):
            path = self.folder / self.manifest.shards[shard].name
            raise UserError(f"{path}: ends at byte {os.path.getsize(path)}, inside a sample; copy the shard again")

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
        return f"{self.folder / self.manifest.shards[shard].name}: sample {row}"

    def bytes_of(self, shard: int) -> NDArray[np.uint8]:
        """A whole shard as a memory map, uint8 [bytes]."""
        return self._shard(shard).bytes

    def _shard(self, number: int) -> _OpenShard:
        opened = self._open.get(number)
        if opened is not None:
            self._open.move_to_end(number)
            return opened
        record = self.manifest.shards[number]
        path = self.folder / record.name
        spans = None
        if record.layout is None:
            spans = _read_index(self.folder, record, len(self.manifest.members))
        try:
            opened = _OpenShard(os.open(path, os.O_RDONLY), spans, np.asarray(np.memmap(path, np.uint8, "r")))
        except OSError as error:
            raise UserError(f"{path}: cannot be read ({error.strerror})") from None
        self._open[number] = opened
        if len(self._open) > _OPEN_AT_ONCE:
            os.close(self._open.popitem(last=False)[1].descriptor)
        return opened

    def close(self) -> None:
        """Close the files; the object opens them again when it is read."""
        while self._open:
            os.close(self._open.popitem()[1].descriptor)

    def __del__(self) -> None:
        self.close()


def _read_index(folder: Path, record: ShardRecord, members: int) -> NDArray[np.uint64]:
    path = folder / index_name(record.name)
    try:
        spans: NDArray[np.uint64] = np.asarray(np.load(path, mmap_mode="r", allow_pickle=False))
    except (OSError, ValueError) as error:
        raise UserError(
            f"{path}: the index cannot be read ({error}); make it again with: llamagen shards index {folder}"
        ) from None
    if spans.dtype != np.uint64 or spans.shape != (record.samples, members, 2):
        raise UserError(
            f"{path}: holds {spans.dtype} {spans.shape}, not uint64 {(record.samples, members, 2)}; make it "
            f"again with: llamagen shards index {folder}"
        )
    return spans


def open_shards(folder: str | Path, kind: str | None = None) -> Shards:
    """Open a folder of shards after comparing every shard's size with the manifest.

    kind: ``images`` or ``tokens`` where only that will do. Raises UserError: no manifest, another kind, no
    samples, a shard missing, cut short or grown (named with both sizes and the recorded sha256).
    """
    folder = Path(folder)
    manifest = read_manifest(folder)
    if kind is not None and manifest.kind != kind:
        hint = "extract tokens from them first" if kind == "tokens" else "name the image shards instead"
        raise UserError(f"{folder}: holds {manifest.kind}, but {kind} are needed here; {hint}")
    if manifest.count == 0:
        raise UserError(f"{folder}: the shards hold no samples")
    problems = [text for record in manifest.shards if (text := _size_problem(folder, record))]
    if problems:
        raise UserError("\n".join(problems))
    return Shards(folder, manifest)


def _size_problem(folder: Path, record: ShardRecord) -> str | None:
    path = folder / record.name
    try:
        found = path.stat().st_size
        if record.layout is None:
            (folder / index_name(record.name)).stat()
    except OSError as error:
        return f"{error.filename}: {error.strerror}, but {MANIFEST} lists {record.name}; copy it here again"
    if found == record.bytes:
        return None
    return (
        f"{path}: {found} bytes, but {MANIFEST} records {record.bytes} (sha256 {record.sha256}): the shard "
        "was cut short or changed; copy or make it again"
    )


def verify(shards: Shards, advance: Callable[[int, str], None] = lambda count, text: None) -> None:
    """Read every byte and compare sha256 with the manifest.

    advance: called with (samples, shard name) after each shard. Raises UserError with one line for each
    damaged file, naming both hashes.
    """
    problems = []
    for record in shards.manifest.shards:
        expected = [(record.name, record.sha256)]
        if record.index_sha256 is not None:
            expected.append((index_name(record.name), record.index_sha256))
        for name, recorded in expected:
            found = sha256_file(shards.folder / name)
            if found != recorded:
                problems.append(
                    f"{shards.folder / name}: sha256 {found}, but {MANIFEST} records {recorded}: its bytes "
                    "have changed; copy or make it again"
                )
        advance(record.samples, record.name)
    if problems:
        raise UserError("\n".join(problems))
