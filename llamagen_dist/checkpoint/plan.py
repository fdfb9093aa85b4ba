"""Who writes which tensor into which file: worked out alike on every rank before anything is read."""

import itertools
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from llamagen_dist.parallel.entries import TensorEntry

SHARD_BYTES = 1 << 30  # what a rank gathers before it writes it, which is the size at which it starts another file

_NAMES = {  # safetensors' names of the types
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


@dataclass(frozen=True)
class ShardFile:
    """One safetensors file. members: (number, entry) of its tensors, one behind the other."""

    name: str
    group: str
    members: tuple[tuple[int, TensorEntry], ...]

    @property
    def size(self) -> int:
        """Bytes of its tensors."""
        return sum(size_of(entry) for _, entry in self.members)

    def header(self) -> bytes:
        """What stands before the data: its length (uint64), then JSON of types, shapes and offsets."""
        content, end = {}, 0
        for _, entry in self.members:
            begin, end = end, end + size_of(entry)
            content[entry.key] = {"dtype": _NAMES[entry.dtype], "shape": entry.shape, "data_offsets": [begin, end]}
        text = json.dumps(content, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)  # so that the data behind it is aligned
        return len(text).to_bytes(8, "little") + text


@dataclass(frozen=True)
class Round:
    """Entries ``first`` to ``last - 1`` are gathered together; ``files[rank]`` is what the rank then writes."""

    first: int
    last: int
    files: tuple[tuple[ShardFile, ...], ...]

    def staged(self, rank: int) -> int:
        """Bytes that the rank gathers."""
        return sum(file.size for file in self.files[rank])


@dataclass(frozen=True)
class Plan:
    """The same on all ranks, since it is computed from the entries' shapes alone: nobody has to be asked."""

    owners: tuple[int, ...]
    """The writer rank of each entry."""
    rounds: tuple[Round, ...]

    def file_names(self, rank: int) -> list[str]:
        return [file.name for part in self.rounds for file in part.files[rank]]

    def where(self) -> dict[str, str]:
        """``group:key`` -> file, over all ranks."""
        files = [file for part in self.rounds for mine in part.files for file in mine]
        return {f"{file.group}:{entry.key}": file.name for file in files for _, entry in file.members}


def size_of(entry: TensorEntry) -> int:
    """Bytes of the full tensor."""
    return math.prod(entry.shape) * entry.dtype.itemsize


def deal(entries: Sequence[TensorEntry], world: int) -> tuple[int, ...]:
    """The writer rank of each entry: always the least loaded so far, so that all ranks write about as much.

    In the entries' order, not the largest first: then a round is a run of neighbours, and memory stays bounded.
    """
    load_of = [0] * world
    owners = []
    for entry in entries:
        owner = load_of.index(min(load_of))
        load_of[owner] += size_of(entry)
        owners.append(owner)
    return tuple(owners)


def make_plan(entries: Sequence[TensorEntry], world: int, limit: int | None = None) -> Plan:
    """Cut the entries into rounds in which no rank gathers more than ``limit`` bytes (or one tensor).

    All ranks gather a round and then write it at the same time; were each tensor written as it comes, gathering the
    next one would make the ranks write one after another.

    entries: all tensors of the checkpoint.
    world: ranks.
    limit: bytes; None: SHARD_BYTES.
    """
    limit = SHARD_BYTES if limit is None else limit
    owners = deal(entries, world)
    cuts, load_of = [0], [0] * world  # where rounds begin; bytes of each rank in the present one
    for number, (entry, owner) in enumerate(zip(entries, owners, strict=True)):
        if load_of[owner] and load_of[owner] + size_of(entry) > limit:
            cuts.append(number)
            load_of = [0] * world
        load_of[owner] += size_of(entry)
    cuts.append(len(entries))
    count_of = [0] * world
    rounds = []
    for first, last in itertools.pairwise(cuts):
        files = tuple(_files(entries, owners, first, last, rank, count_of[rank]) for rank in range(world))
        count_of = [count + len(mine) for count, mine in zip(count_of, files, strict=True)]
        rounds.append(Round(first, last, files))
    return Plan(owners, tuple(rounds))


def _files(
    entries: Sequence[TensorEntry], owners: Sequence[int], first: int, last: int, rank: int, count: int
) -> tuple[ShardFile, ...]:
    """One file per group, its widest types first: every tensor is then aligned to its own type."""
    groups: dict[str, list[int]] = {}
    for number in range(first, last):
        if owners[number] == rank:
            groups.setdefault(entries[number].group, []).append(number)
    return tuple(
        ShardFile(
            f"{group}-{rank:05d}-{count + position:03d}.safetensors",
            group,
            tuple((n, entries[n]) for n in sorted(numbers, key=lambda n: -entries[n].dtype.itemsize)),
        )
        for position, (group, numbers) in enumerate(groups.items())
    )
