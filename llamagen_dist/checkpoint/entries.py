"""One tensor of a checkpoint, whatever engine holds it: how to get it whole, how to put it back."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Entry:
    """group: the file family (``weights``, ``optimizer``, ``discriminator``…). key: its name in the file.

    read(writer) is collective over all ranks and returns the full, TP-merged tensor on global rank ``writer`` (fp32
    for parameters and moments, the module's dtype for buffers); other ranks may get None. write(full) takes the
    full tensor on every rank and keeps this rank's part.
    """

    group: str
    key: str
    shape: tuple[int, ...]
    read: Callable[[int], Tensor | None]
    write: Callable[[Tensor], None]
    dtype: torch.dtype = torch.float32


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
