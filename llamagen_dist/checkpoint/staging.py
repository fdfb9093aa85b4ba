"""Full tensors on their way to disk: host buffers laid out as the files will be, and the writing of one file."""

import hashlib
import itertools
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from llamagen_dist.checkpoint.plan import ALIGNMENT, Plan, Round, ShardFile
from llamagen_dist.errors import UserError
from llamagen_dist.parallel.entries import TensorEntry

BLOCK = 8 << 20  # bytes hashed and written at once


class Staging:
    """Host buffers that stay from one save to the next: the page faults of fresh memory cost as much as the copy.

    pinned: for copies from a GPU at full speed.
    """

    def __init__(self, pinned: bool = False) -> None:
        self._pinned = pinned
        self._buffers: list[Tensor] = []

    def buffer(self, number: int, size: int) -> Tensor:
        """uint8, at least ``size`` long; the same memory as at the last call with this number where that fits."""
        while len(self._buffers) <= number:
            self._buffers.append(torch.empty(0, dtype=torch.uint8))
        if self._buffers[number].numel() < size:
            self._buffers[number] = torch.empty(0, dtype=torch.uint8)  # free the old one first
            try:
                self._buffers[number] = _fresh(size, self._pinned)
            except (MemoryError, RuntimeError) as error:
                raise UserError(
                    f"checkpoint: no host memory for {size / 1e9:.2f} GB beside the {self.held / 1e9:.2f} GB copied so "
                    f"far ({error}); set checkpoint.background=false, which needs one file's worth"
                ) from None
        return self._buffers[number]

    def drop(self) -> None:
        self._buffers.clear()

    @property
    def held(self) -> int:
        """Bytes in all buffers."""
        return sum(buffer.numel() for buffer in self._buffers)


def _fresh(size: int, pinned: bool) -> Tensor:
    if pinned:
        return torch.empty(size, dtype=torch.uint8, pin_memory=True)
    return torch.from_numpy(np.empty(size, np.uint8))  # numpy asks for huge pages: the first copy is 3 times as fast


def stage(entries: Sequence[TensorEntry], plan: Plan, part: Round, rank: int, buffer: Tensor) -> None:
    """Gather the round's entries one by one (collective) and copy those dealt to this rank into ``buffer``.

    A copy in any case: what ``read`` returns may be the live tensor that the next step changes.
    """
    slots = {slot.number: slot for file in part.files[rank] for slot in file.slots}
    for number in range(part.first, part.last):
        tensor = entries[number].read(plan.owners[number])
        slot = slots.get(number)
        if slot is None:
            continue
        if tensor is None or tuple(tensor.shape) != slot.shape or tensor.dtype != slot.dtype:
            found = "nothing" if tensor is None else f"{tensor.dtype} {tuple(tensor.shape)}"
            raise AssertionError(f"{slot.key}: the writer rank got {found}, not {slot.dtype} {slot.shape}")
        if slot.size:
            target = buffer[slot.begin : slot.begin + slot.size].view(slot.dtype).view(slot.shape)
            target.copy_(tensor.detach(), non_blocking=buffer.is_pinned())
    if buffer.is_pinned():
        torch.cuda.synchronize()


class LocalCopy:
    """This rank's share of the state as it was at one moment, in host memory: what it holds itself of every tensor.

    Made on the training thread without any communication; later, beside training, ``fill`` sends the pieces to the
    ranks that write them, over a process group of its own.
    """

    def __init__(self, entries: Sequence[TensorEntry], plan: Plan, rank: int, staging: Staging) -> None:
        self._entries, self._plan, self._rank = entries, plan, rank
        live: dict[int, Tensor] = {}
        for number, (entry, owner) in enumerate(zip(entries, plan.owners, strict=True)):
            if entry.sharding is None:
                found = entry.read(owner) if owner == rank else None
                if found is not None:
                    live[number] = found.detach().reshape(-1)
            elif entry.sharding.contributes(rank, owner):
                live[number] = entry.sharding.local_shard()
        ends = list(itertools.accumulate(-(-tensor.nbytes // ALIGNMENT) * ALIGNMENT for tensor in live.values()))
        buffer = staging.buffer(0, ends[-1] if ends else 0)
        self._copies: dict[int, Tensor] = {}
        for (number, tensor), end in zip(live.items(), ends, strict=True):
            begin = end - -(-tensor.nbytes // ALIGNMENT) * ALIGNMENT
            copy = buffer[begin : begin + tensor.nbytes].view(tensor.dtype)
            copy.copy_(tensor, non_blocking=buffer.is_pinned())
            self._copies[number] = copy
        if buffer.is_pinned():
            torch.cuda.synchronize()

    def fill(self, part: Round, buffer: Tensor, group: dist.ProcessGroup | None) -> list[Exception]:
        """Put the round's tensors that this rank writes into ``buffer`` (all ranks call it, round by round).

        A rank that is gone is no reason to let the others wait: what fails is returned, and the rest exchanged.
        """
        slots = {slot.number: slot for file in part.files[self._rank] for slot in file.slots}
        sent: list[Any] = []
        failed: list[Exception] = []
        for number in range(part.first, part.last):
            try:
                whole = self._whole(number, group, sent)
                if number in slots and whole is not None:
                    slot = slots[number]
                    target = buffer[slot.begin : slot.begin + slot.size].view(slot.dtype)
                    target.copy_(whole.reshape(-1))
            except Exception as error:  # also a bug: the others wait for the rest all the same
                failed.append(error)
        for request in sent:
            try:
                request.wait()
            except Exception as error:  # also a bug: the others wait for the rest all the same
                failed.append(error)
        return failed

    def _whole(self, number: int, group: dist.ProcessGroup | None, sent: list[Any]) -> Tensor | None:
        entry, owner = self._entries[number], self._plan.owners[number]
        if entry.sharding is None:
            return self._copies.get(number)
        mine = self._copies.get(number, torch.empty(0, dtype=entry.dtype))
        whole, sending = entry.sharding.gather(mine, self._rank, owner, group, number)
        if sending is not None:
            sent.append(sending)
        return whole


def write_file(folder: Path, file: ShardFile, buffer: Tensor, pace: Callable[[int], None] | None = None) -> str:
    """Write and sync one safetensors file; returns its sha256, taken of the bytes that were meant.

    pace(bytes) is called after every block. Raises OSError, with the file's name in it.
    """
    digest = hashlib.sha256()
    path = folder / file.name
    try:
        with open(path, "wb", buffering=0) as target:
            for block in _blocks(file, buffer):
                digest.update(block)
                written = 0
                while written < len(block):  # a disk that is nearly full takes a part
                    written += target.write(block[written:])
                if pace is not None:
                    pace(len(block))
            os.fsync(target.fileno())
    except OSError as error:
        raise OSError(error.errno, error.strerror or str(error), str(path)) from error
    return digest.hexdigest()


def _blocks(file: ShardFile, buffer: Tensor) -> Iterator[memoryview]:
    yield memoryview(file.header())
    content = buffer.numpy().data
    for begin in range(file.begin, file.end, BLOCK):
        yield content[begin : min(begin + BLOCK, file.end)]
