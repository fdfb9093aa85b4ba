"""FID-infinity: the Fréchet distance of infinitely many generated images (Chong and Forsyth 2020, arXiv 1911.07023).

The bias of FID is c / N to first order, with a c that depends on the generator: two models at equal N may stand in
the wrong order. So the distance is measured at several N, each on images drawn anew, and a straight line over 1 / N is
read at 0. The reference stays as it is, and so does what its own number of images adds.
"""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from llamagen_dist import prng
from llamagen_dist.evaluation.finite import require_finite
from llamagen_dist.evaluation.frechet import Gaussian, frechet_distance, gaussian_of
from llamagen_dist.parallel.topology import Topology

SMALLEST = 5000
"""Images of the first point, as in the paper; below them higher powers of 1 / N bend the line."""
FEWEST_IMAGES = 4
"""Images that a line can be drawn from."""


@dataclass(frozen=True)
class Extrapolation:
    counts: NDArray[np.int64]
    """[points], images at each point."""
    distances: NDArray[np.float64]
    """[points], the distance at each."""
    value: float
    """At 1 / N = 0. It may be negative."""


def counts_of(images: int, points: int) -> NDArray[np.int64]:
    """int64 [points]: evenly from SMALLEST, or half of the images where there are fewer than twice as many, to all.

    Raises ValueError for fewer than four images or two points, where there is no line.
    """
    if images < FEWEST_IMAGES or points < 2:
        raise ValueError(f"no line over 1 / N from {points} points and {images} images")
    return np.linspace(min(SMALLEST, images // 2), images, points).round().astype(np.int64)


def at_infinity(counts: NDArray[np.int64], distances: NDArray[np.float64]) -> float:
    """Least squares over 1 / N, read at 0."""
    return float(np.polyfit(1.0 / counts, distances, 1)[1])


def fid_infinity(
    generated: Tensor, reference: Gaussian, points: int, seed: int, topology: Topology | None = None
) -> Extrapolation:
    """generated: floats [n, d], all of them on every rank; the ranks share out the points (collective).

    Raises ValueError as ``counts_of`` does, and for features or distances that are not finite.
    """
    require_finite("features", generated)
    topology = topology or Topology()
    counts = counts_of(len(generated), points)
    distances = torch.zeros(points, dtype=torch.float64, device=generated.device)
    for point in range(topology.rank, points, topology.world):
        keys = prng.bits(seed, "fid-infinity", point, torch.arange(len(generated))).view(torch.int32)
        drawn = torch.argsort(keys, stable=True)[: int(counts[point])].to(generated.device)
        try:
            distances[point] = frechet_distance(gaussian_of(generated[drawn]), reference)
        except ValueError:
            distances[point] = torch.nan  # raised on every rank below: none may wait for one that has stopped
    total = topology.sum(distances)
    require_finite("distances", total)
    measured = total.cpu().numpy()
    return Extrapolation(counts, measured, at_infinity(counts, measured))
