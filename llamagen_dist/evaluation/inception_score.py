"""Inception Score (Salimans et al. 2016): exp of the mean KL(p(y|x) || p(y)), averaged over splits of the images.

What a split is decides the digits, so it has a name (``SPLITS``). ``whole`` depends on nothing but the images;
``torch-fidelity`` (0.4.0) and ``adm`` (its evaluator, and so LlamaGen) are what published scores come from. ``adm``
takes images as they come: an .npz that is ordered by class has few classes in each split and scores far too low.
"""

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from llamagen_dist.evaluation.finite import require_finite
from llamagen_dist.parallel.topology import Topology

SHUFFLED_SPLITS, SHUFFLE_SEED = 10, 2020
ADM_SPLIT = 5000


def _shuffled(count: int) -> NDArray[np.int64]:
    splits = min(SHUFFLED_SPLITS, count)
    order = np.random.RandomState(SHUFFLE_SEED).permutation(count)
    # split s is order[s * count // splits : (s + 1) * count // splits]
    ends = np.arange(1, splits + 1) * count // splits
    split = np.empty(count, np.int64)
    split[order] = np.searchsorted(ends, np.arange(count), side="right")
    return split


SPLITS: dict[str, Callable[[int], NDArray[np.int64]]] = {
    "whole": lambda count: np.zeros(count, np.int64),
    "torch-fidelity": _shuffled,
    "adm": lambda count: np.arange(count) // ADM_SPLIT,
}
"""Convention -> number of images -> int64 [count], the split of every image."""
MEANING = {
    "whole": "one split",
    "torch-fidelity": f"{SHUFFLED_SPLITS} splits, shuffled with seed {SHUFFLE_SEED}",
    "adm": f"splits of {ADM_SPLIT} consecutive images, the last of what is left",
}


class ScoreSums:
    """What the score needs, streamed batch by batch in any order.

    splits: int64 [n], the split of every image, as SPLITS gives it.
    classes: of the network.
    """

    def __init__(self, splits: NDArray[np.int64], classes: int, device: torch.device | None = None) -> None:
        self.splits = torch.from_numpy(splits).to(device)
        self.sums = torch.zeros(int(splits.max()) + 1, classes + 2, dtype=torch.float64, device=device)
        """For each split: sum of p per class, sum of p log p, number of images."""

    def update(self, rows: slice | Tensor, logits: Tensor) -> None:
        """rows: which n of the images these are. logits: floats [n, classes] without bias."""
        log_p = torch.log_softmax(logits.double(), dim=1)
        p = log_p.exp()
        terms = torch.cat([p, (p * log_p).sum(1, keepdim=True), torch.ones_like(p[:, :1])], 1)
        self.sums.index_add_(0, self.splits[rows], terms)

    def score(self, topology: Topology | None = None) -> tuple[float, float]:
        """(mean, standard deviation) over the splits of the images of all ranks (collective).

        The deviation divides by their number. Raises ValueError where a logit was not finite.
        """
        sums = topology.sum(self.sums) if topology is not None else self.sums
        require_finite("logits", sums)
        count = sums[:, -1]
        marginal = sums[:, :-2] / count[:, None]
        scores = (sums[:, -2] / count - torch.xlogy(marginal, marginal).sum(1)).exp()
        return float(scores.mean()), float(scores.std(correction=0))
