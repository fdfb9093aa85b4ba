"""What a training step is fed with."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from llamagen_dist.models.condition import Caption, Condition


def left_padded(features: Sequence[Tensor], length: int) -> Caption:
    """Captions of different lengths as one condition, as LlamaGen lays them out: at the end, zeros before.

    features: (L, C) each, of one type, 1 <= L <= length.
    length: positions of the condition, T.
    Returns (features (B, T, C) of that type, present (B, T) bool). Raises ValueError for a caption that is empty or
    longer than ``length``.
    """
    sizes = [caption.shape[0] for caption in features]
    if not sizes or min(sizes) < 1 or max(sizes) > length:
        raise ValueError(f"captions of {sizes} tokens for {length} positions")
    # One concatenation writes every position once. A copy per caption costs several microseconds before the first
    # number moves, which for short captions was a quarter of a batch's time.
    blank = features[0].new_zeros(length, features[0].shape[1])
    before = {size: blank[size:] for size in set(sizes)}
    pieces = [piece for caption, size in zip(features, sizes, strict=True) for piece in (before[size], caption)]
    padded = torch.cat(pieces).view(len(sizes), length, -1)
    lengths = torch.tensor(sizes)
    return padded, torch.arange(length) >= length - lengths[:, None]


@dataclass(frozen=True)
class TokenBatch:
    """One rank's share of a global batch.

    tokens: int64 (B, N).
    condition: labels int64 (B,), or captions as (features (B, T, C) left-padded, present (B, T) bool).
    positions: int64 (B,), global.
    samples: int64 (B,), on the host, their numbers in the data set; None for a batch made by hand.
    dropped: bool (B,), whose condition the training task replaces by the null class or caption; None: nobody's. Only
    the model knows its null caption, and only the data knows the position, so each says its half.
    """

    tokens: Tensor
    condition: Condition
    positions: Tensor
    samples: Tensor | None = None
    dropped: Tensor | None = None

    def rows(self, chosen: slice) -> "TokenBatch":
        """Some of the samples (views)."""
        rows = self._each(lambda tensor: tensor[chosen])
        return rows if self.samples is None else replace(rows, samples=self.samples[chosen])

    def split(self, size: int) -> "list[TokenBatch]":
        """Micro-batches of ``size`` samples (the last may be smaller)."""
        return [self.rows(slice(start, start + size)) for start in range(0, len(self.tokens), size)]

    def to(self, device: torch.device) -> "TokenBatch":
        """On that device, but for ``samples``. From pinned memory the copy runs beside what the device computes."""
        return self._each(lambda tensor: tensor.to(device, non_blocking=True))

    def pinned(self) -> "TokenBatch":
        """In page-locked memory, but for ``samples``. Needs CUDA."""
        return self._each(Tensor.pin_memory)

    def _each(self, change: Callable[[Tensor], Tensor]) -> "TokenBatch":
        """Every tensor changed, but for ``samples``."""
        if isinstance(self.condition, tuple):
            features, present = self.condition
            condition: Condition = (change(features), change(present))
        else:
            condition = change(self.condition)
        dropped = None if self.dropped is None else change(self.dropped)
        return TokenBatch(change(self.tokens), condition, change(self.positions), self.samples, dropped)


@dataclass(frozen=True)
class ImageBatch:
    """images: float32 (B, 3, S, S) in [-1, 1]. samples: int64 (B,), their numbers in the data set."""

    images: Tensor
    samples: Tensor
