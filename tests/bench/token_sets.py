"""Made-up token sets for the data benches: our shards, one file per image as LlamaGen has it, and shards of any size
that hold nothing but the samples somebody is about to read.
"""

import os
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import Dataset

from llamagen_dist.data.manifest import Manifest, ShardRecord, write_manifest
from llamagen_dist.data.shards import LABEL_MEMBER, Shards
from llamagen_dist.data.tokens import CODES_MEMBER, codes_bytes
from llamagen_dist.data.writer import label_text, shard_name, write_shard

MEMBERS = (LABEL_MEMBER, CODES_MEMBER)  # in the order in which they lie in a tar


def codes_of(sample: int, crops: int, tokens: int, vocabulary: int) -> NDArray[np.uint16]:
    """uint16 [crops, tokens]; the same for the same sample."""
    return np.random.default_rng(sample).integers(vocabulary, size=(crops, tokens), dtype=np.uint16)


def manifest(records: Iterable[ShardRecord], crops: int, side: int, classes: int, vocabulary: int) -> Manifest:
    records = tuple(records)
    return Manifest(
        kind="tokens",
        count=sum(record.samples for record in records),
        members=MEMBERS,
        shards=records,
        classes=[f"class {c}" for c in range(classes)],
        image_size=16 * side,
        vocab_size=vocabulary,
        grid=(side, side),
        crops=crops,
        tokenizer_sha256="0" * 64,
    )


def write_ours(
    folder: Path, count: int, crops: int, side: int, classes: int, vocabulary: int, per_shard: int = 10_000
) -> Path:
    """Shards as extraction writes them."""
    folder.mkdir()

    def sample(number: int) -> tuple[str, dict[str, bytes]]:
        codes = codes_bytes(codes_of(number, crops, side**2, vocabulary))
        return f"{number:09d}", {CODES_MEMBER: codes, LABEL_MEMBER: label_text(number % classes, classes)}

    records = [
        write_shard(folder, shard_name(n), map(sample, range(first, min(first + per_shard, count))), MEMBERS)
        for n, first in enumerate(range(0, count, per_shard))
    ]
    write_manifest(folder, manifest(records, crops, side, classes, vocabulary))
    return folder


def write_files(folder: Path, count: int, crops: int, side: int, classes: int, vocabulary: int) -> Path:
    """LlamaGen's way: int64 files, the label's one and one for the codes of (at most) ten crops, in a folder for each
    range of crops."""
    for name in ("labels", *(f"codes{n}" for n in range(-(-crops // 10)))):
        (folder / name).mkdir(parents=True)
    for number in range(count):
        codes = codes_of(number, crops, side**2, vocabulary).astype(np.int64)
        for first in range(0, crops, 10):
            np.save(folder / f"codes{first // 10}" / f"{number}.npy", codes[None, first : first + 10])
        np.save(folder / "labels" / f"{number}.npy", np.array([number % classes]))
    return folder


class Files(Dataset[tuple[torch.Tensor, torch.Tensor]]):
    """Two np.load for every sample, as in LlamaGen's dataset: (a random crop's codes int64 [N], label int64 [1])."""

    def __init__(self, folder: Path, count: int) -> None:
        self.folder, self.count, self.ranges = folder, count, len(list(folder.glob("codes*")))

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, number: int) -> tuple[torch.Tensor, torch.Tensor]:
        chosen = int(torch.randint(self.ranges, ()))
        codes = np.load(self.folder / f"codes{chosen}" / f"{number}.npy")[0]
        label = np.load(self.folder / "labels" / f"{number}.npy")
        return torch.from_numpy(codes[int(torch.randint(len(codes), ()))]), torch.from_numpy(label)


def record_bytes(crops: int, tokens: int, classes: int) -> int:
    """Bytes of one sample in a tar: a header of 512 for each of its two members, and both filled up to 512s."""
    parts = (len(label_text(0, classes)), len(codes_bytes(np.zeros((crops, tokens), np.uint16))))
    return sum(512 + -(-size // 512) * 512 for size in parts)


def write_sparse(folder: Path, shards: int, per_shard: int, crops: int, side: int, classes: int, vocab: int) -> Path:
    """Shards of any size that take no room on disk: their files are one hole, until ``fill`` puts samples there."""
    folder.mkdir()
    stride, codes = record_bytes(crops, side**2, classes), len(codes_bytes(np.zeros((crops, side**2), np.uint16)))
    layout = ((512, len(label_text(0, classes))), (1536, codes))
    records = [
        ShardRecord(shard_name(n), per_shard, per_shard * stride, "0" * 64, stride, layout) for n in range(shards)
    ]
    for record in records:
        with open(folder / record.name, "wb") as file:
            os.truncate(file.fileno(), record.bytes)
    write_manifest(folder, manifest(records, crops, side, classes, vocab))
    return folder


def fill(shards: Shards, samples: NDArray[np.int64]) -> None:
    """Write these samples of a sparse set."""
    whole = shards.manifest
    assert whole.crops is not None
    assert whole.grid is not None
    assert whole.vocab_size is not None
    for sample in samples.tolist():
        shard, row = shards.locate(sample)
        record = whole.shards[shard]
        assert record.stride is not None
        assert record.layout is not None
        codes = codes_bytes(codes_of(sample, whole.crops, whole.grid[0] ** 2, whole.vocab_size))
        with open(shards.folder / record.name, "r+b") as file:
            for (offset, _), data in zip(
                record.layout, (label_text(sample % whole.num_classes, whole.num_classes), codes), strict=True
            ):
                file.seek(row * record.stride + offset)
                file.write(data)
