"""Weights of eight bits: a quarter of fp32's memory, half of bf16's, for what the rounding costs in quality.

The linear layers of the blocks and the head are kept as whole numbers from -127 to 127 with one fp32 scale for each
output channel (symmetric, round to nearest: W8A16 of LLM.int8, arXiv 2208.07339, section 2.1, without its outliers).
Activations, embeddings, norms and the cache stay as they are. ``tests/bench/int8.py`` measures what it costs.
"""

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from llamagen_dist.checkpoint.checkpoint import ALONE
from llamagen_dist.models.gpt import GPT
from llamagen_dist.parallel.tensor_parallel import split_of
from llamagen_dist.parallel.topology import Topology

LARGEST = 127
FEW_ROWS = 4  # up to here torch's own product of bf16 and int8 is the faster one on a CPU (never in fp32)


class Int8Linear(nn.Module):
    """x W^T with W = scale x int8, no bias.

    weight: (outputs, inputs) of any floating type; this rank's part of it.
    group: the ranks that each hold some of the inputs; their products are added up. None: this rank has them all.
    """

    weight: Tensor
    scale: Tensor

    def __init__(self, weight: Tensor, group: dist.ProcessGroup | None = None) -> None:
        super().__init__()
        self.group = group
        wide = weight.detach().float()
        largest = wide.abs().amax(dim=1)
        if group is not None:  # of the whole row, so that a weight has the same eight bits on any number of ranks
            dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=group)
        scale = torch.where(largest == 0, 1.0, largest / LARGEST)
        self.register_buffer("weight", (wide / scale[:, None]).round().to(torch.int8))
        self.register_buffer("scale", scale)

    def _apply(self, fn: Any, recurse: bool = True) -> "Int8Linear":
        exact = self.scale  # in bf16 it would be as coarse as the weights that it scales
        super()._apply(fn, recurse)
        self.scale = exact.to(self.scale.device)
        return self

    def forward(self, x: Tensor) -> Tensor:
        """(…, inputs) -> (…, outputs) in the same type. Every int8 number is exact in bf16."""
        rows = x.flatten(0, -2)
        if x.dtype == torch.bfloat16 and x.device.type == "cpu" and len(rows) <= FEW_ROWS:
            # reads the bytes as they are; the scales are multiplied in below, since here they would have to be in bf16
            ones = torch.ones_like(self.scale, dtype=x.dtype)
            out = torch._weight_int8pack_mm(rows.contiguous(), self.weight, ones).unflatten(0, x.shape[:-1])
        else:
            out = F.linear(x, self.weight.to(x.dtype))
        if self.group is not None:
            dist.all_reduce(out, group=self.group)
        return (out * self.scale).type_as(x)


def quantize(model: GPT, topology: Topology = ALONE) -> GPT:
    """Replace the linear layers of the blocks and the head, in place (collective over a tensor-parallel group).

    model: with its weights, plain or as ``tensor_parallel.apply`` leaves it, in fp32.
    """
    for name, p in list(model.named_parameters()):
        if p.dim() != 2 or not name.startswith(("layers.", "output.")):
            continue
        split = split_of(name)
        rows = topology.tensor > 1 and split is not None and split.kind == "row"
        parent, _, last = name.removesuffix(".weight").rpartition(".")
        setattr(model.get_submodule(parent), last, Int8Linear(p, topology.tp_group if rows else None))
    return model
