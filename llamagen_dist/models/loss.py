"""The mean cross-entropy over a large vocabulary, with one copy of the logits and no second one for their gradient."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from llamagen_dist.models.cost import LOSS_CHUNK

TokenNLL = Callable[[Tensor, Tensor], Tensor]
CPU_CHUNK = 1 << 20  # as many as stay in a CPU's cache


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
        return _WeightedNLL.apply(logits, tokens, weights, nll)
    parts = _chunks(logits, tokens, weights)
    return torch.stack([(nll(chunk, targets) * weight).sum() for chunk, targets, weight in parts]).sum()


def _chunks(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """A few rows of each at a time; the first tensor is the logits."""
    rows = max(1, (CPU_CHUNK if tensors[0].device.type == "cpu" else LOSS_CHUNK) // tensors[0].shape[-1])
    return zip(*(tensor.split(rows) for tensor in tensors), strict=True)


class _WeightedNLL(torch.autograd.Function):
    """Logits are the largest tensor of a step (8 x 256 tokens: 128 MiB in fp32). Cross-entropy's gradient is known as
    soon as its value is, so it is written over them, instead of keeping a second such tensor until the backward pass.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, tokens: Tensor, weights: Tensor, nll: TokenNLL) -> Tensor:
        total = torch.zeros((), dtype=torch.float32, device=logits.device)
        gradient = logits.detach()  # the same memory
        for logits_chunk, targets, weight in _chunks(gradient, tokens, weights):
            if nll is token_nll:
                total += _gradient_in_place(logits_chunk, targets, weight)
                continue
            with torch.enable_grad():  # nll may hold collectives, whose gradients only autograd knows
                leaf = logits_chunk.detach().requires_grad_()
                part = (nll(leaf, targets) * weight).sum()
            (grad_chunk,) = torch.autograd.grad(part, leaf)
            total += part.detach()
            logits_chunk.copy_(grad_chunk)
        ctx.gradient = gradient
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        (upstream,) = gradients
        gradient, ctx.gradient = ctx.gradient, None  # not save_for_backward: the memory is given away, and once
        if gradient is None:
            raise RuntimeError("the loss can be differentiated once: its gradient has overwritten the logits")
        if upstream.device.type != "cpu" or upstream != 1:  # on a GPU the question would wait for the device
            gradient.mul_(upstream)
        return gradient, None, None, None


def _gradient_in_place(logits: Tensor, tokens: Tensor, weights: Tensor) -> Tensor:
    """logits (n, V) become weights x (softmax - one-hot); returns the weighted nll. One exponential per logit."""
    targets = tokens[:, None]
    max_logit, target_logit = logits.amax(dim=-1, keepdim=True), logits.gather(1, targets)
    probs = torch.softmax(logits, dim=-1, dtype=torch.float32)
    # log sum exp = max_logit - log(the largest probability), which is at least 1 / V and so exact enough
    nll = (max_logit.float() - target_logit.float() - probs.amax(dim=-1, keepdim=True).log()).flatten()
    # d nll / d logits = softmax - one-hot, of each row times its weight
    probs.scatter_add_(1, targets, torch.full_like(nll[:, None], -1.0))
    logits.copy_(probs.mul_(weights[:, None]))
    return (nll * weights).sum()
