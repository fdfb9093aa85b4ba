"""Which token a position predicts, where sequences are not in raster order (``order: rar``; arXiv 2411.00776)."""

import torch
from torch import Tensor

from llamagen_dist.models.layers import Embedding
from llamagen_dist.models.sizes import GPTConfig


class TargetPositions(Embedding):
    """A learned vector for every position of the grid, added to the input that predicts the token there.

    shown: whether it is added. Without a random order every input has the same target always, so the table is switched
        off, exactly: its vectors are multiplied by 0, which keeps its gradient (zero) where the engines expect one.
    """

    def __init__(self, config: GPTConfig) -> None:
        super().__init__(config.image_tokens, config.dim)
        self.shown = True

    def forward(self, x: Tensor, prefix: int, targets: Tensor | None = None) -> Tensor:  # type: ignore[override]
        """x (B, S, dim) -> the same shape; the last of its ``prefix`` first positions and all behind predict a token.

        targets: (B, S - prefix + 1) or (S - prefix + 1,) int64, of which tokens; None: 0, 1, … of the image.
        """
        if targets is None:
            targets = torch.arange(x.shape[1] - prefix + 1, device=x.device)
        vectors = super().forward(targets)
        vectors = vectors if self.shown else vectors * 0.0
        if prefix == 1:
            return x + vectors
        return torch.cat([x[:, : prefix - 1], x[:, prefix - 1 :] + vectors], dim=1)
