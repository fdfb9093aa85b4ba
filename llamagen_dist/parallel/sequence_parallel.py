"""Sequence parallelism: between the split layers each tensor-parallel rank holds a part of the sequence.

Where plain tensor parallelism all-reduces the output of a row layer, here it is reduce-scattered along the sequence,
and gathered again in front of the next column layers: the same bytes on the wire, and the norms, dropouts and the
residual stream cost 1/tp of the memory and time (Korthikanti et al. 2022, section 4.2.2). Activations are (B, S, D); S
is padded to a multiple of tp while it is split. Megatron-core's own operations of this kind want a CUDA device and the
sequence in front, so these are ours; they run the same on gloo and NCCL.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from llamagen_dist.models.gpt import GPT
from llamagen_dist.parallel.topology import Topology

Operation = Callable[[Tensor], Tensor]


def _padded(x: Tensor, t: Topology) -> tuple[Tensor, ...]:
    """(B, S, D) -> the tp pieces (B, ceil(S / tp), D) of the padded sequence."""
    return F.pad(x, (0, 0, 0, -x.shape[1] % t.tensor)).chunk(t.tensor, 1)


def _own(x: Tensor, t: Topology) -> Tensor:
    """This rank's positions."""
    return _padded(x, t)[t.tp_rank].contiguous()


def _all_gather(part: Tensor, t: Topology, length: int) -> Tensor:
    """(B, S / tp, D) of every rank -> (B, length, D)."""
    pieces = [torch.empty_like(part) for _ in range(t.tensor)]
    dist.all_gather(pieces, part.contiguous(), group=t.tp_group)
    return torch.cat(pieces, 1)[:, :length].contiguous()


def _reduce_scatter(x: Tensor, t: Topology) -> Tensor:
    """The sum over the ranks of (B, S, D), of which this rank gets its positions."""
    pieces = [piece.contiguous() for piece in _padded(x, t)]
    out = torch.empty_like(pieces[0])
    dist.reduce_scatter(out, pieces, group=t.tp_group)
    return out


def _all_reduce(x: Tensor, t: Topology) -> Tensor:
    total = x.contiguous().clone()
    dist.all_reduce(total, group=t.tp_group)
    return total


class _Exchange(torch.autograd.Function):
    """One operation forward and another one backward: which go together is the whole point of this file."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, ahead: Operation, back: Operation) -> Tensor:
        ctx.back = back
        return ahead(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        return ctx.back(gradients[0]), None, None


def cut(x: Tensor, t: Topology) -> Tensor:
    """Replicated -> this rank's positions; gradients are gathered."""
    return _Exchange.apply(x, partial(_own, t=t), partial(_all_gather, t=t, length=x.shape[1]))


def gather_for_columns(part: Tensor, t: Topology, length: int) -> Tensor:
    """Positions -> replicated, for layers that each use it in part: the parts of the gradient are summed, scattered."""
    return _Exchange.apply(part, partial(_all_gather, t=t, length=length), partial(_reduce_scatter, t=t))


def gather_replicated(part: Tensor, t: Topology, length: int) -> Tensor:
    """Positions -> replicated, for what every rank computes alike: this rank's part of the gradient is enough."""
    return _Exchange.apply(part, partial(_all_gather, t=t, length=length), partial(_own, t=t))


def reduce_scatter(partial_sum: Tensor, t: Topology) -> Tensor:
    """A row layer's (B, S, D) partial sums -> (B, ceil(S / tp), D) of their sum; gradients are gathered."""
    return _Exchange.apply(
        partial_sum, partial(_reduce_scatter, t=t), partial(_all_gather, t=t, length=partial_sum.shape[1])
    )


def copy(x: Tensor, t: Topology) -> Tensor:
    """Identity whose gradient is summed over the tensor-parallel ranks."""
    return _Exchange.apply(x, _same, partial(_all_reduce, t=t))


def total(x: Tensor, t: Topology) -> Tensor:
    """The sum over the tensor-parallel ranks, of which every rank computes the same; the gradient is each part's."""
    return _Exchange.apply(x, partial(_all_reduce, t=t), _same)


def _same(x: Tensor) -> Tensor:
    return x.view_as(x)


def share_input_reduction(model: GPT, topology: Topology) -> None:
    """Plain tensor parallelism: one gradient all-reduce for all column layers behind a norm (w1 and w3 share it)."""

    def hook(module: nn.Module, arguments: Any, output: Tensor) -> Tensor:
        return copy(output, topology)

    blocks: Any = model.layers  # to mypy a ModuleList holds modules of no particular kind
    for block in blocks:
        block.attention_norm.register_forward_hook(hook)
        block.ffn_norm.register_forward_hook(hook)


def share_head_norms(model: GPT, topology: Topology) -> None:
    """Norms of q and k, whose weights every rank has, saw this rank's heads only: their gradients are summed."""
    blocks: Any = model.layers
    for block in blocks:
        for norm in (block.attention.q_norm, block.attention.k_norm):
            if norm is not None:
                norm.weight.register_hook(partial(_all_reduce, t=topology))


def install(model: GPT, topology: Topology) -> None:
    """Hooks that cut the sequence in front of the first block, gather it where a block needs all of it, and after the
    last one. The blocks' dropout masks get the position of the rank's first row."""
    length = [0]  # of the whole sequence; set by the first block, read by the others in the same pass

    def enter(module: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        x, table, mask, random, *rest = arguments
        if module is model.layers[0]:
            length[0] = x.shape[1]
            x = cut(x, topology)
        if random is not None:
            share = -(-length[0] // topology.tensor)  # rounded up: the sequence is padded to a multiple
            random = random.at(share * topology.tp_rank)
        return (x, table, mask, random, *rest)

    def gather(module: nn.Module, arguments: Any, output: Tensor) -> Tensor:
        return gather_for_columns(output, topology, length[0])

    def leave(module: nn.Module, arguments: Any, output: Tensor) -> Tensor:
        return gather_replicated(output, topology, length[0])

    blocks: Any = model.layers
    for block in blocks:
        block.register_forward_pre_hook(enter)
        for norm in (block.attention_norm, block.ffn_norm):
            norm.register_forward_hook(gather)
            norm.weight.register_hook(partial(_all_reduce, t=topology))  # it saw only this rank's positions
    model.layers[-1].register_forward_hook(leave)
