"""The mean cross-entropy over a large vocabulary, with one copy of the logits and no second one for their gradient.

z-loss (PaLM, arXiv 2204.02311, section 5) adds the squared log-partition of every row, with a small weight.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from llamagen_dist.models.cost import LOSS_CHUNK

TokenNLL = Callable[[Tensor, Tensor], Tensor]
LogPartition = Callable[[Tensor], Tensor]
CPU_CHUNK = 1 << 20  # as many as stay in a CPU's cache


@dataclass(frozen=True)
class ZLoss:
    """weight: of the squared log-partition beside a row's nll. log_partition: fp32 logits (n, V) -> (n,)."""

    weight: float
    log_partition: LogPartition


def token_nll(logits: Tensor, tokens: Tensor) -> Tensor:
    """Cross-entropy of each row: logits (n, V), tokens (n,) int64 -> (n,) nats in fp32."""
    return F.cross_entropy(logits.float(), tokens, reduction="none")


def weighted_nll(logits: Tensor, tokens: Tensor, weights: Tensor, nll: TokenNLL = token_nll) -> Tensor:
    """sum of weights x nll(logits, tokens), 0-d fp32.

    logits: (n, V). Where a gradient is wanted it is made in the forward pass, a few rows at a time, and *replaces the
        logits*: they must not be used again.
    tokens: (n,) int64.
    weights: (n,) fp32.
    nll: must treat every row by itself (tensor parallelism has one over slices of V).
    """
    if torch.is_grad_enabled() and logits.requires_grad:
        total: Tensor = _WeightedNLL.apply(logits, tokens, weights, nll, None)[0]
        return total
    parts = _chunks(logits, tokens, weights)
    return torch.stack([(nll(chunk, targets) * weight).sum() for chunk, targets, weight in parts]).sum()


def weighted_nll_and_z(
    logits: Tensor, tokens: Tensor, weights: Tensor, nll: TokenNLL, z: ZLoss
) -> tuple[Tensor, Tensor]:
    """(sum of weights x (nll + z.weight x log-partition^2), sum of weights x log-partition^2), 0-d fp32.

    The first is differentiable, the second for reports. Arguments as in ``weighted_nll``; needs a gradient.
    """
    total, squares = _WeightedNLL.apply(logits, tokens, weights, nll, z)
    return total, squares


def _chunks(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """A few rows of each at a time; the first tensor is the logits."""
    rows = max(1, (CPU_CHUNK if tensors[0].device.type == "cpu" else LOSS_CHUNK) // tensors[0].shape[-1])
    return zip(*(tensor.split(rows) for tensor in tensors), strict=True)


class _WeightedNLL(torch.autograd.Function):
    """Logits are the largest tensor of a step (8 x 256 tokens: 128 MiB in fp32). Cross-entropy's gradient is known as
    soon as its value is, so it is written over them, instead of keeping a second such tensor until the backward pass.
    """

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, tokens: Tensor, weights: Tensor, nll: TokenNLL, z: ZLoss | None
    ) -> tuple[Tensor, Tensor]:
        total, squares = (torch.zeros((), dtype=torch.float32, device=logits.device) for _ in range(2))
        gradient = logits.detach()  # the same memory
        for logits_chunk, targets, weight in _chunks(gradient, tokens, weights):
            if nll is token_nll:
                part, square = _gradient_in_place(logits_chunk, targets, weight, z.weight if z else 0.0)
            else:
                with torch.enable_grad():  # nll may hold collectives, whose gradients only autograd knows
                    leaf = logits_chunk.detach().requires_grad_()
                    # first, since Megatron-core's nll writes over the logits that it is given
                    square = (z.log_partition(leaf.float()).square() * weight).sum() if z else squares.new_zeros(())
                    part = (nll(leaf, targets) * weight).sum()
                    part = part + z.weight * square if z else part
                (grad_chunk,) = torch.autograd.grad(part, leaf)
                logits_chunk.copy_(grad_chunk)
            total += part.detach()
            squares += square.detach()
        ctx.gradient = gradient
        ctx.mark_non_differentiable(squares)
        return total, squares

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None, None]:
        upstream = gradients[0]
        gradient, ctx.gradient = ctx.gradient, None  # not save_for_backward: the memory is given away, and once
        if gradient is None:
            raise RuntimeError("the loss can be differentiated once: its gradient has overwritten the logits")
        if upstream.device.type != "cpu" or upstream != 1:  # on a GPU the question would wait for the device
            gradient.mul_(upstream)
        return gradient, None, None, None, None


def _gradient_in_place(logits: Tensor, tokens: Tensor, weights: Tensor, z_weight: float) -> tuple[Tensor, Tensor]:
    """logits (n, V) become weights x (softmax - one-hot), with z-loss softmax x (1 + 2 z_weight log-partition).

    Returns (the weighted sum, z-loss included; that of the squared log-partition, 0 without). One exponential per
    logit.
    """
    targets = tokens[:, None]
    max_logit, target_logit = logits.amax(dim=-1, keepdim=True), logits.gather(1, targets)
    probs = torch.softmax(logits, dim=-1, dtype=torch.float32)
    # log sum exp = max_logit - log(the largest probability), which is at least 1 / V and so exact enough
    largest = probs.amax(dim=-1, keepdim=True).log()
    nll = (max_logit.float() - target_logit.float() - largest).flatten()
    squares = nll.new_zeros(())
    if z_weight:
        partition = max_logit.float() - largest
        probs.mul_(1 + 2 * z_weight * partition)
        square = partition.square().flatten()
        nll, squares = nll + z_weight * square, (square * weights).sum()
    # d nll / d logits = softmax - one-hot, of each row times its weight
    probs.scatter_add_(1, targets, torch.full_like(nll[:, None], -1.0))
    logits.copy_(probs.mul_(weights[:, None]))
    return (nll * weights).sum(), squares
