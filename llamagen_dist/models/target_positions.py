"""Which token a position predicts, where sequences are not in raster order (``order: rar``; arXiv 2411.00776)."""

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

    def forward(self, x: Tensor, targets: Tensor) -> Tensor:
        """x (B, n, dim), targets (B, n) or (n,) int64 -> the same shape as x."""
        vectors = super().forward(targets)
        return x + (vectors if self.shown else vectors * 0.0)
