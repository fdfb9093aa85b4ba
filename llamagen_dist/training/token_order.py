"""``order: rar``: in which order a training sequence has its tokens, by its position in the data.

Randomised autoregressive training (Yu et al. 2024, arXiv 2411.00776, section 3.2): a sequence is permuted uniformly
with probability r, which is 1 up to image ``anneal_from``, falls linearly to 0 at ``anneal_until``, and stays there.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from llamagen_dist import prng


@dataclass(frozen=True)
class TokenOrder:
    """seed: of the run. tokens: N, of an image. anneal_from, anneal_until: in images; the step between where equal."""

    seed: int
    tokens: int
    anneal_from: int
    anneal_until: int

    def share(self, positions: Tensor) -> Tensor:
        """r at each position (B,) int64 of the data: float64 in [0, 1]."""
        length = max(1, self.anneal_until - self.anneal_from)
        return ((self.anneal_until - positions).double() / length).clamp(0, 1)

    def settled(self, images_seen: int) -> bool:
        """Whether every sequence from this image on is in raster order."""
        return images_seen >= self.anneal_until

    def at(self, positions: Tensor) -> Tensor:
        """(B, N) int64: at each position (B,) int64 of the data, the raster numbers of the tokens in their order."""
        raster = torch.arange(self.tokens, device=positions.device)
        # to a number of its own for every token: the hash is one-to-one, so that no two are equal
        keys = prng.bits32(prng.stream(self.seed, "token-order", positions).unsqueeze(1), raster)
        permuted = prng.uniform(self.seed, "random-order", positions).double() < self.share(positions)
        return torch.where(permuted.unsqueeze(1), keys.argsort(dim=1), raster)
