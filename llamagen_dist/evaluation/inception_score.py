"""Inception Score (Salimans et al. 2016) over all images at once: exp of the mean KL(p(y|x) || p(y)).

One split, so neither the order of the images nor the number of ranks matters. Published scores average splits of
5,000 consecutive images and read a little lower.
"""

import torch
from torch import Tensor

from llamagen_dist.evaluation.finite import require_finite
from llamagen_dist.parallel.topology import Topology


class ScoreSums:
    """What the score needs, streamed batch by batch."""

    def __init__(self, classes: int, device: torch.device | None = None) -> None:
        self.sums = torch.zeros(classes + 2, dtype=torch.float64, device=device)
        """sum of p per class, sum of p log p, number of images."""

    def update(self, logits: Tensor) -> None:
        """logits: floats [n, classes] without bias."""
        log_p = torch.log_softmax(logits.double(), dim=1)
        p = log_p.exp()
        negative_entropy = (p * log_p).sum().reshape(1)
        self.sums += torch.cat([p.sum(0), negative_entropy, negative_entropy.new_tensor([float(len(p))])])

    def score(self, topology: Topology | None = None) -> float:
        """Over the images of all ranks (collective). Raises ValueError where a logit was not finite."""
        sums = topology.sum(self.sums) if topology is not None else self.sums
        require_finite("logits", sums)
        n = sums[-1]
        marginal = sums[:-2] / n
        return float((sums[-2] / n - torch.xlogy(marginal, marginal).sum()).exp())
