"""Guidance-free training (Chen et al. 2025, arXiv 2501.15420): one model for every strength of guidance.

With beta in [0, 1] a sample's logits in training are beta x conditional + (1 - beta) x null, without a gradient through
the null ones. What the conditional branch learns is then null + (data - null) / beta: guidance with scale 1 / beta, in
one pass. It knows beta by an embedding that is added to the condition.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llamagen_dist.models.cost import WAVES
from llamagen_dist.models.layers import Linear
from llamagen_dist.models.sizes import GPTConfig


class BetaEmbedding(nn.Module):
    """beta (B,) fp32 -> (B, 1, dim), which is added to every position of the condition: sines and cosines of beta of
    wave lengths from 2 pi / 1000 to ten thousand times that, and two layers, the second of which starts as zero."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.fc1 = Linear(WAVES, config.dim)
        self.fc2 = Linear(config.dim, config.dim)

    def forward(self, beta: Tensor) -> Tensor:
        numbers = torch.arange(WAVES // 2, dtype=torch.float32, device=beta.device)
        angles = 1000.0 * beta[:, None] * torch.exp(-math.log(10_000.0) / (WAVES // 2) * numbers)
        waves = torch.cat([angles.cos(), angles.sin()], dim=1).to(self.fc1.weight.dtype)
        return self.fc2(F.silu(self.fc1(waves))).unsqueeze(1)


def mixed(logits: Tensor, null: Tensor, beta: Tensor) -> Tensor:
    """beta x logits + (1 - beta) x null, in the memory of ``null``, which must not be used again.

    logits, null: (B, N, V), the second without a gradient.
    beta: (B,) fp32.
    """
    out: Tensor = _Mixed.apply(logits, null, beta[:, None, None])
    return out


class _Mixed(torch.autograd.Function):
    """Logits are the largest tensors of a step: a formula would make three more of them."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, null: Tensor, beta: Tensor) -> Tensor:
        ctx.beta = beta
        out = null.detach()  # the same memory
        for mine, scores, share in zip(out, logits, beta, strict=True):  # sample by sample, for the cache
            mine.mul_(1 - share).add_(scores * share)
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        # the loss has given this memory away (models/loss.py)
        return gradients[0].mul_(ctx.beta), None, None
