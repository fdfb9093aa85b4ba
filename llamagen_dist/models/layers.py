"""Layers whose weights are zero until ``initialize`` or ``load_state_dict``.

torch's own constructors would fill every weight once for nothing, and from the global generator.
"""

import torch
from torch import Tensor, nn

from llamagen_dist.models import ops


class Linear(nn.Linear):
    """x W^T, no bias."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs, bias=False)

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.weight)


class Embedding(nn.Embedding):
    def reset_parameters(self) -> None:
        nn.init.zeros_(self.weight)


class RMSNorm(nn.Module):
    """Normalises in fp32, casts back, then scales."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        return ops.rms_norm(x, self.weight, self.eps)
