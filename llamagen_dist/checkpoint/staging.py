"""What a rank holds of the state on its way to disk: copied at one moment, gathered where it is written, written."""

import hashlib
import itertools
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from llamagen_dist.checkpoint.plan import Plan, Round, ShardFile
from llamagen_dist.errors import UserError
from llamagen_dist.parallel.entries import TensorEntry

BLOCK = 8 << 20  # bytes hashed and written at once
ALIGNMENT = 64  # of a tensor's bytes within the host buffer


class HostBuffer:
    """Host memory that stays from one save to the next: the page faults of fresh memory cost as much as the copy.

    pinned: page-locked, for copies from a GPU at full speed.
    """

    def __init__(self, pinned: bool = False) -> None:
        self._pinned = pinned
        self._memory = torch.empty(0, dtype=torch.uint8)

    def take(self, size: int) -> Tensor:
        """uint8, at least ``size`` long; the same memory as last time where that suffices. Raises UserError."""
        if self._memory.numel() < size:
            self._memory = torch.empty(0, dtype=torch.uint8)  # free the old one first
            try:
                if self._pinned:
                    self._memory = torch.empty(size, dtype=torch.uint8, pin_memory=True)
                else:  # numpy asks for huge pages: the first copy is 3 times as fast
                    self._memory = torch.from_numpy(np.empty(size, np.uint8))
            except (MemoryError, RuntimeError) as error:
                raise UserError(
                    f"checkpoint: no host memory for the {size / 1e9:.2f} GB that this rank copies ({error}); set "
                    "checkpoint.background=false, which copies nothing"
                ) from None
        return self._memory

    @property
    def size(self) -> int:
        """Bytes allocated."""
        return self._memory.numel()


class LocalCopy:
    """This rank's share of the state as it is at this moment: the shards and whole tensors that it has to contribute.

    Taken on the training thread without any communication; later, beside training, ``gather`` sends the shards to the
    ranks that write them, over a process group of its own.

    entries: all tensors of the checkpoint.
    plan: which rank writes which of them.
    rank: this one.
    rounds: of ``plan``, that this is for.
    buffer: where to copy to. None: nothing is copied, for a caller that changes nothing until all is written.

    Raises UserError where there is no memory for the copy.
    """

    def __init__(
        self,
        entries: Sequence[TensorEntry],
        plan: Plan,
        rank: int,
        rounds: Sequence[Round],
        buffer: HostBuffer | None = None,
    ) -> None:
        self._entries, self._plan, self._rank = entries, plan, rank
        self._local: dict[int, Tensor] = {}
        for number in range(rounds[0].first, rounds[-1].last):
            entry, owner = entries[number], plan.owners[number]
            # of a tensor that all ranks have whole the writer takes its own
            needed = owner == rank if entry.sharding is None else entry.sharding.contributes(rank, owner)
            if needed:
                self._local[number] = entry.local().detach()
        if buffer is not None:
            self._copy_to(buffer)

    def _copy_to(self, buffer: HostBuffer) -> None:
        # one block for all tensors, each at a multiple of ALIGNMENT: views of any type may begin there
        ends = list(itertools.accumulate(-(-t.nbytes // ALIGNMENT) * ALIGNMENT for t in self._local.values()))
        memory = buffer.take(ends[-1] if ends else 0)
        for (number, tensor), begin in zip(self._local.items(), [0, *ends], strict=False):
            copy = memory[begin : begin + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
            copy.copy_(tensor, non_blocking=memory.is_pinned())
            self._local[number] = copy
        if memory.is_pinned():  # copies from a GPU return before they are done, and training is about to continue
            torch.cuda.synchronize()

    def gather(self, part: Round, group: dist.ProcessGroup | None) -> tuple[dict[int, Tensor], list[Exception]]:
        """Exchange the shards of one round (all ranks call it, round by round).

        A rank that is gone is no reason to let the others wait: what fails is returned, and the rest exchanged.

        part: the round.
        group: gloo, to send over; None where nothing is sharded.

        Returns (the full tensors that this rank writes, by number; what failed).
        """
        whole: dict[int, Tensor] = {}
        sent: list[Any] = []
        failed: list[Exception] = []
        for number in range(part.first, part.last):
            entry, owner = self._entries[number], self._plan.owners[number]
            try:
                tensor = self._local.get(number)
                if entry.sharding is not None:
                    # gloo sends from host memory; an empty shard is not sent, but ``gather`` takes its type from it
                    mine = torch.empty(0, dtype=entry.dtype) if tensor is None else tensor.reshape(-1).cpu()
                    tensor, sending = entry.sharding.gather(mine, self._rank, owner, group, number)
                    if sending is not None:  # waited for at the end, so that this rank's sends overlap
                        sent.append(sending)
                if owner == self._rank:
                    if tensor is None or tuple(tensor.shape) != tuple(entry.shape) or tensor.dtype != entry.dtype:
                        got = "nothing" if tensor is None else f"{tensor.dtype} {tuple(tensor.shape)}"
                        raise AssertionError(f"{entry.key}: its writer got {got}, not {entry.dtype} {entry.shape}")
                    whole[number] = tensor
            except Exception as error:  # also a bug: the others wait for the rest all the same
                failed.append(error)
        for request in sent:
            try:
                request.wait()
            except Exception as error:  # also a bug: the others wait for the rest all the same
                failed.append(error)
        return whole, failed


def write_file(folder: Path, file: ShardFile, tensors: Mapping[int, Tensor]) -> str:
    """Write and sync one safetensors file; returns its sha256, taken of the bytes that were meant.

    tensors: the full ones, by number. Raises OSError, with the file's name in it.
    """
    digest = hashlib.sha256()
    path = folder / file.name
    try:
        with open(path, "wb", buffering=0) as target:
            for block in blocks(file, tensors):
                digest.update(block)
                written = 0
                while written < len(block):  # a disk that is nearly full takes a part
                    written += target.write(block[written:])
            os.fsync(target.fileno())
    except OSError as error:
        raise OSError(error.errno, error.strerror or str(error), str(path)) from error
    return digest.hexdigest()


def blocks(file: ShardFile, tensors: Mapping[int, Tensor]) -> Iterator[memoryview]:
    """The bytes of a file, at most BLOCK at once."""
    yield memoryview(file.header())
    for number, _ in file.members:
        flat = tensors[number].cpu().contiguous().view(-1)
        content = flat.view(torch.uint8).numpy().data if flat.numel() else memoryview(b"")
        for begin in range(0, len(content), BLOCK):
            yield content[begin : begin + BLOCK]
