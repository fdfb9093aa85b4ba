"""What a GPT step is fed with."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class TokenBatch:
    """tokens: int64 (B, N). labels: int64 (B,), the null class where dropped. positions: int64 (B,), global."""

    tokens: Tensor
    labels: Tensor
    positions: Tensor

    def split(self, size: int) -> "list[TokenBatch]":
        """Micro-batches of ``size`` samples (the last may be smaller)."""
        columns = (self.tokens.split(size), self.labels.split(size), self.positions.split(size))
        return [TokenBatch(*parts) for parts in zip(*columns, strict=True)]

    def to(self, device: torch.device) -> "TokenBatch":
        return TokenBatch(self.tokens.to(device), self.labels.to(device), self.positions.to(device))
