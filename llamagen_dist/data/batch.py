"""What a GPT step is fed with."""

from dataclasses import dataclass

import torch
from torch import Tensor

from llamagen_dist.models.gpt import Condition


@dataclass(frozen=True)
class TokenBatch:
    """tokens: int64 (B, N). condition: labels int64 (B,), the null class where dropped, or a caption's (features
    (B, T, C) left-padded, present (B, T) bool). positions: int64 (B,), global."""

    tokens: Tensor
    condition: Condition
    positions: Tensor

    @property
    def labels(self) -> Tensor:
        """Of a class-conditional batch."""
        assert isinstance(self.condition, Tensor)
        return self.condition

    def rows(self, chosen: slice) -> "TokenBatch":
        """Some of the samples (views)."""
        if isinstance(self.condition, tuple):
            features, present = self.condition
            return TokenBatch(self.tokens[chosen], (features[chosen], present[chosen]), self.positions[chosen])
        return TokenBatch(self.tokens[chosen], self.condition[chosen], self.positions[chosen])

    def split(self, size: int) -> "list[TokenBatch]":
        """Micro-batches of ``size`` samples (the last may be smaller)."""
        return [self.rows(slice(start, start + size)) for start in range(0, len(self.tokens), size)]

    def to(self, device: torch.device) -> "TokenBatch":
        if isinstance(self.condition, tuple):
            features, present = self.condition
            moved: Condition = (features.to(device), present.to(device))
        else:
            moved = self.condition.to(device)
        return TokenBatch(self.tokens.to(device), moved, self.positions.to(device))
