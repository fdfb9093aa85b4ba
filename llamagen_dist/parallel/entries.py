"""One tensor of a checkpoint, whatever engine holds it: how to get it whole, how to put it back."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn


@dataclass(frozen=True)
class Pieces:
    """How a tensor is spread over ranks, for those who copy the pieces first and put them together later.

    local() is what this rank holds: a flat, live view, maybe empty. spread(writer) lists (rank, elements) of the pieces
    that a writer needs, the same list on every rank; merge(flat pieces in that order) is the full tensor.
    """

    local: Callable[[], Tensor]
    spread: Callable[[int], list[tuple[int, int]]]
    merge: Callable[[list[Tensor]], Tensor]

    def contributes(self, rank: int, writer: int) -> bool:
        return any(holder == rank for holder, _ in self.spread(writer))

    def gather(
        self, mine: Tensor, rank: int, writer: int, group: dist.ProcessGroup | None = None, tag: int = 0
    ) -> tuple[Tensor | None, Any]:
        """(the full tensor on the writer, None elsewhere; what a sender has to wait for, or None). Collective.

        mine: this rank's piece, or a copy of it. Pieces go straight to the writer over ``group`` (None: all ranks).
        """
        if rank != writer:
            return None, dist.isend(mine, writer, group=group, tag=tag) if self.contributes(rank, writer) else None
        parts: list[Tensor] = []
        coming: list[Any] = []
        for holder, size in self.spread(writer):
            parts.append(mine if holder == rank else mine.new_empty(size))
            if holder != rank:
                coming.append(dist.irecv(parts[-1], holder, group=group, tag=tag))
        for request in coming:
            request.wait()
        return self.merge(parts), None


@dataclass(frozen=True)
class Entry:
    """group: the file family (``weights``, ``optimizer``, ``discriminator``…). key: its name in the file.

    read(writer) is collective over all ranks and returns the full, TP-merged tensor on global rank ``writer`` (fp32
    for parameters and moments, the module's dtype for buffers); other ranks may get None. write(full) takes the
    full tensor on every rank and keeps this rank's part. pieces: None where every rank holds the whole tensor, so that
    read(writer) communicates nothing.
    """

    group: str
    key: str
    shape: tuple[int, ...]
    read: Callable[[int], Tensor | None]
    write: Callable[[Tensor], None]
    dtype: torch.dtype = torch.float32
    pieces: Pieces | None = None


def replicated(group: str, key: str, tensor: Tensor) -> Entry:
    """A tensor that every rank holds whole and equal (DDP weights, buffers)."""

    def write(full: Tensor) -> None:
        with torch.no_grad():
            tensor.copy_(full)

    return Entry(group, key, tuple(tensor.shape), lambda writer: tensor.detach(), write, tensor.dtype)


def in_pieces(
    group: str, key: str, shape: tuple[int, ...], pieces: Pieces, write: Callable[[Tensor], None], rank: int
) -> Entry:
    """A tensor that no rank holds whole; rank: this one."""

    def read(writer: int) -> Tensor | None:
        full, sending = pieces.gather(pieces.local().contiguous(), rank, writer)
        if sending is not None:
            sending.wait()
        return full

    return Entry(group, key, shape, read, write, pieces=pieces)


def buffers(group: str, module: nn.Module) -> list[Entry]:
    """The persistent buffers of a module (batch statistics, LlamaGen's untrained uncond_embedding…)."""
    persistent = module.state_dict()
    return [replicated(group, name, buffer) for name, buffer in module.named_buffers() if name in persistent]
