"""One tensor of a checkpoint, whatever engine owns it: how to get it whole, how to put it back."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn


@dataclass(frozen=True)
class Sharding:
    """How a tensor is spread over ranks, for a checkpoint that copies the shards first and puts them together later.

    owners(writer): (rank, elements) of the shards that a writer needs, the same list on every rank.
    merge(shards): flat shards in that order -> the full tensor.
    """

    owners: Callable[[int], list[tuple[int, int]]]
    merge: Callable[[list[Tensor]], Tensor]

    def contributes(self, rank: int, writer: int) -> bool:
        return any(holder == rank for holder, _ in self.owners(writer))

    def gather(
        self, mine: Tensor, rank: int, writer: int, group: dist.ProcessGroup | None = None, tag: int = 0
    ) -> tuple[Tensor | None, Any]:
        """Send the shards to the rank that writes the tensor (collective over the owners and the writer).

        mine: this rank's shard, flat, or a copy of it.
        rank: this one's.
        writer: the rank that gets the full tensor.
        group: to send over; None: the default group.
        tag: tells the messages of tensors apart that are under way together.

        Returns (the full tensor on the writer, None elsewhere; what a sender has to wait for, or None).
        """
        if rank != writer:
            return None, dist.isend(mine, writer, group=group, tag=tag) if self.contributes(rank, writer) else None
        parts: list[Tensor] = []
        coming: list[Any] = []
        for holder, size in self.owners(writer):
            parts.append(mine if holder == rank else mine.new_empty(size))
            if holder != rank:
                coming.append(dist.irecv(parts[-1], holder, group=group, tag=tag))
        for request in coming:
            request.wait()
        return self.merge(parts), None


@dataclass(frozen=True)
class TensorEntry:
    """One tensor of a checkpoint.

    group: the file family (``weights``, ``optimizer``, ``discriminator``…).
    key: its name in the file.
    shape: of the full tensor.
    local(): what this rank has of it, a live view: the whole tensor, or its shard, flat and maybe empty.
    write(full): takes the full tensor on every rank and keeps this rank's part.
    dtype: fp32 for parameters and moments, the module's for buffers.
    sharding: None where every rank has the whole tensor.
    """

    group: str
    key: str
    shape: tuple[int, ...]
    local: Callable[[], Tensor]
    write: Callable[[Tensor], None]
    dtype: torch.dtype = torch.float32
    sharding: Sharding | None = None

    def read(self, writer: int) -> Tensor | None:
        """The full tensor on global rank ``writer``; other ranks may get None. Collective where it is sharded."""
        if self.sharding is None:
            return self.local()
        full, sending = self.sharding.gather(self.local().contiguous(), dist.get_rank(), writer)
        if sending is not None:
            sending.wait()
        return full


def replicated(group: str, key: str, tensor: Tensor) -> TensorEntry:
    """A tensor that every rank has whole and equal (DDP weights, buffers)."""

    def write(full: Tensor) -> None:
        with torch.no_grad():
            tensor.copy_(full)

    return TensorEntry(group, key, tuple(tensor.shape), tensor.detach, write, tensor.dtype)


def all_entries(
    module: nn.Module,
    entry: Callable[[str, str, str, Tensor, str | None], TensorEntry],
    averaged: Sequence[str],
    moments: Callable[[str], Sequence[str]],
    group: str = "weights",
    optimizer_group: str = "optimizer",
) -> list[TensorEntry]:
    """What a checkpoint holds of a module and its optimizer, in the order of its parameters, the same on all ranks.

    entry(group, key, name, parameter, kind): of one tensor; kind: None for the weight, else a key of the optimizer's
        state.
    averaged: keys of the moving averages, which are also their file families.
    moments(name): keys of the moments that the optimizer's state has of a parameter.
    group, optimizer_group: file families.
    """
    entries: list[TensorEntry] = []
    for name, p in module.named_parameters():
        entries.append(entry(group, name, name, p, None))
        entries += [entry(key, name, name, p, key) for key in averaged]
        if p.requires_grad:
            entries += [entry(optimizer_group, f"{moment}/{name}", name, p, moment) for moment in moments(name)]
    # buffers are not trained and have no average; a copy stands with each, so that the average is a whole model
    return entries + [one for family in (group, *averaged) for one in buffers(family, module)]


def buffers(group: str, module: nn.Module) -> list[TensorEntry]:
    """The persistent buffers of a module (batch statistics, LlamaGen's untrained uncond_embedding…)."""
    persistent = module.state_dict()
    return [replicated(group, name, buffer) for name, buffer in module.named_buffers() if name in persistent]
