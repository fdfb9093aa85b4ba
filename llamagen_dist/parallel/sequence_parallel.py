"""Sequence parallelism: between the split layers each tensor-parallel rank holds a part of the sequence.

Where plain tensor parallelism all-reduces the output of a row layer, here it is reduce-scattered along the sequence,
and gathered again in front of the next column layers: the same bytes on the wire, and the norms, dropouts and the
residual stream cost 1/tp of the memory and time (Korthikanti et al. 2022, section 4.2.2). Activations are (B, S, D); S
is padded to a multiple of tp while it is split. Megatron-core's own operations of this kind want a CUDA device and the
sequence in front, so these are ours; they run the same on gloo and NCCL.
"""

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from llamagen_dist.models.gpt import GPT
from llamagen_dist.parallel.topology import Topology


def _padded(x: Tensor, tensor: int) -> Tensor:
    return F.pad(x, (0, 0, 0, -x.shape[1] % tensor))


def _own(x: Tensor, t: Topology) -> Tensor:
    """This rank's positions of (B, S, D), padded: (B, ceil(S / tp), D)."""
    return _padded(x, t.tensor).chunk(t.tensor, 1)[t.tp_rank].contiguous()


def _all_gather(part: Tensor, t: Topology, length: int) -> Tensor:
    """(B, S / tp, D) of every rank -> (B, length, D)."""
    pieces = [torch.empty_like(part) for _ in range(t.tensor)]
    dist.all_gather(pieces, part.contiguous(), group=t.tp_group)
    return torch.cat(pieces, 1)[:, :length].contiguous()


def _reduce_scatter(x: Tensor, t: Topology) -> Tensor:
    """The sum over the ranks of (B, S, D), of which this rank gets its positions."""
    pieces = [piece.contiguous() for piece in _padded(x, t.tensor).chunk(t.tensor, 1)]
    out = torch.empty_like(pieces[0])
    dist.reduce_scatter(out, pieces, group=t.tp_group)
    return out


class _Cut(torch.autograd.Function):
    """Replicated -> this rank's positions; gradients are gathered."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, t: Topology) -> Tensor:
        ctx.t, ctx.length = t, x.shape[1]
        return _own(x, t)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return _all_gather(gradients[0], ctx.t, ctx.length), None


class _GatherForColumn(torch.autograd.Function):
    """Positions -> replicated, for layers that each use it in part; the gradients' parts are summed and scattered."""

    @staticmethod
    def forward(ctx: Any, part: Tensor, t: Topology, length: int) -> Tensor:
        ctx.t = t
        return _all_gather(part, t, length)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        return _reduce_scatter(gradients[0], ctx.t), None, None


class _GatherReplicated(torch.autograd.Function):
    """Positions -> replicated, for what every rank computes alike; this rank's part of the gradient is enough."""

    @staticmethod
    def forward(ctx: Any, part: Tensor, t: Topology, length: int) -> Tensor:
        ctx.t = t
        return _all_gather(part, t, length)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        return _own(gradients[0], ctx.t), None, None


class _ReduceScatter(torch.autograd.Function):
    """Partial sums of a row layer -> this rank's positions of their sum; gradients are gathered."""

    @staticmethod
    def forward(ctx: Any, partial: Tensor, t: Topology) -> Tensor:
        ctx.t, ctx.length = t, partial.shape[1]
        return _reduce_scatter(partial, t)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return _all_gather(gradients[0], ctx.t, ctx.length), None


class _Copy(torch.autograd.Function):
    """Identity whose gradient is summed over the tensor-parallel ranks."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, t: Topology) -> Tensor:
        ctx.t = t
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        total = gradients[0].contiguous().clone()
        dist.all_reduce(total, group=ctx.t.tp_group)
        return total, None


def reduce_scatter(partial: Tensor, topology: Topology) -> Tensor:
    """(B, S, D) partial sums -> (B, ceil(S / tp), D)."""
    return _ReduceScatter.apply(partial, topology)


def share_input_reduction(model: GPT, topology: Topology) -> None:
    """Plain tensor parallelism: one gradient all-reduce for all column layers behind a norm (w1 and w3 share it)."""

    def hook(module: nn.Module, arguments: Any, output: Tensor) -> Tensor:
        return _Copy.apply(output, topology)

    blocks: Any = model.layers  # to mypy a ModuleList holds modules of no particular kind
    for block in blocks:
        block.attention_norm.register_forward_hook(hook)
        block.ffn_norm.register_forward_hook(hook)


def install(model: GPT, topology: Topology) -> None:
    """Hooks that cut the sequence in front of the first block, gather it where a block needs all of it, and after the
    last one. The blocks' dropout masks are told where in the sequence they are."""
    length = [0]  # of the whole sequence; set by the first block, read by the others in the same pass

    def enter(module: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        x, table, mask, random, *rest = arguments
        if module is model.layers[0]:
            length[0] = x.shape[1]
            x = _Cut.apply(x, topology)
        if random is not None:
            share = -(-length[0] // topology.tensor)
            random = random.at(share * topology.tp_rank)
        return (x, table, mask, random, *rest)

    def gather(module: nn.Module, arguments: Any, output: Tensor) -> Tensor:
        return _GatherForColumn.apply(output, topology, length[0])

    def leave(module: nn.Module, arguments: Any, output: Tensor) -> Tensor:
        return _GatherReplicated.apply(output, topology, length[0])

    def sum_over_ranks(gradient: Tensor) -> Tensor:
        total = gradient.contiguous().clone()
        dist.all_reduce(total, group=topology.tp_group)
        return total

    blocks: Any = model.layers
    for block in blocks:
        block.register_forward_pre_hook(enter)
        for norm in (block.attention_norm, block.ffn_norm):
            norm.register_forward_hook(gather)
            norm.weight.register_hook(sum_over_ranks)  # it saw only this rank's positions
    model.layers[-1].register_forward_hook(leave)
