"""One tensor of a checkpoint, whatever engine holds it: how to get it whole, how to put it back."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
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


def buffers(group: str, module: nn.Module) -> list[Entry]:
    """The persistent buffers of a module (batch statistics, LlamaGen's untrained uncond_embedding…)."""
    persistent = module.state_dict()
    return [replicated(group, name, buffer) for name, buffer in module.named_buffers() if name in persistent]
