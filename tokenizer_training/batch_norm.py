"""Batch normalisation whose statistics are those of all ranks, on CPU and GPU."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn


class _SumOverRanks(torch.autograd.Function):
    """All-reduce whose gradient is summed likewise: every rank's loss depends on every rank's part.

    Its backward pass is the function itself, so it has derivatives of every order (R1 needs the second).
    """

    @staticmethod
    def forward(ctx: Any, part: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        total = part.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return _SumOverRanks.apply(gradient, ctx.group), None


class SynchronisedBatchNorm2d(nn.BatchNorm2d):
    """nn.BatchNorm2d over the batches of all ranks together, which must be of one size.

    One all-reduce of two sums per channel forward, one backward. torch's SyncBatchNorm needs a GPU, and has no second
    derivative. Sums are taken in fp64: the variance is a difference of two of them.

    group: the ranks; None: one rank, which computes as nn.BatchNorm2d does, to the last bit.
    """

    def __init__(self, channels: int, group: dist.ProcessGroup | None = None) -> None:
        super().__init__(channels)
        self.group = group

    def forward(self, images: Tensor) -> Tensor:
        """(B, C, H, W) -> the same shape; in eval mode by the running statistics."""
        if self.group is None or not self.training:
            return super().forward(images)
        count = images.numel() // images.shape[1] * dist.get_world_size(self.group)
        parts = [x.sum((0, 2, 3), dtype=torch.float64) for x in (images.float(), images.float().square())]
        mean, square = _SumOverRanks.apply(torch.stack(parts), self.group) / count
        variance = (square - mean.square()).clamp(min=0.0)
        unbiased = variance * (count / max(1, count - 1))
        momentum = self.momentum
        assert momentum is not None  # None would be a cumulative average, which __init__ does not offer
        with torch.no_grad():
            self.get_buffer("num_batches_tracked").add_(1)
            for name, now in (("running_mean", mean), ("running_var", unbiased)):
                running = self.get_buffer(name)
                running.lerp_(now.to(running), momentum)
        scale = (variance + self.eps).rsqrt() * self.weight
        shift = self.bias - mean * scale
        return images * scale.to(images)[:, None, None] + shift.to(images)[:, None, None]
