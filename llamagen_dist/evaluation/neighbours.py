"""Which training images lie nearest to a sample, and whether they lie nearer than real images lie to each other."""

from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from llamagen_dist.evaluation.finite import require_finite
from llamagen_dist.evaluation.inception import Inception
from llamagen_dist.evaluation.manifold import squared_distances
from llamagen_dist.parallel.topology import Topology

PIXEL_SIDE = 32
LEVEL = 0.01  # of the real distances: what lies nearer than this share of them is near
CLOSER = 0.5  # a suspected copy lies within this times the distance at LEVEL
Describe = Callable[[NDArray[np.uint8]], Tensor]
"""uint8 [n, H, W, 3] -> float32 [n, d]."""


def pixel_features(pixels: NDArray[np.uint8]) -> Tensor:
    """float32 [n, 3072] in [0, 1]: the pictures averaged down (or enlarged) to PIXEL_SIDE."""
    images = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255
    return F.interpolate(images, size=(PIXEL_SIDE, PIXEL_SIDE), mode="area").flatten(1)


def inception_features(network: Inception, batch: int, device: torch.device) -> Describe:
    """``Features.pool``, always computed as ``batch`` images: the last bits depend on the batch's shape."""

    @torch.inference_mode()
    def describe(pixels: NDArray[np.uint8]) -> Tensor:
        filled = np.zeros((batch, *pixels.shape[1:]), np.uint8)
        filled[: len(pixels)] = pixels
        return network(torch.from_numpy(filled).to(device)).pool[: len(pixels)]

    return describe


class Nearest:
    """The nearest images of a stream to some queries: memory for the queries alone, however long the stream is."""

    def __init__(self, queries: Tensor, own: Tensor, k: int) -> None:
        """
        queries: floats [q, d].
        own: int64 [q], the number in the stream of the very image that a query is, which is passed over; -1 for none.
        k: how many are kept of each query.
        Raises ValueError for features that are not finite.
        """
        require_finite("features", queries)
        self._queries, self._own, self.k = queries.double(), own.to(queries.device), k
        self._squared = torch.full((len(queries), k), torch.inf, dtype=torch.float64, device=queries.device)
        self._numbers = torch.full((len(queries), k), -1, device=queries.device)

    def add(self, features: Tensor, numbers: Tensor) -> None:
        """The next images of the stream: floats [n, d], and their numbers int64 [n]. Raises ValueError: not finite."""
        require_finite("features", features)
        numbers = numbers.to(self._numbers)
        squared = squared_distances(self._queries, features.double())
        squared = squared.masked_fill(numbers[None, :] == self._own[:, None], torch.inf)
        self._keep(squared, numbers.expand(len(squared), -1))

    def _keep(self, squared: Tensor, numbers: Tensor) -> None:
        """Of what there was and these, [q, n] each, the nearest k; of equal ones the lowest number."""
        squared, numbers = torch.cat([self._squared, squared], 1), torch.cat([self._numbers, numbers], 1)
        order = numbers.argsort(dim=1, stable=True)
        order = order.gather(1, squared.gather(1, order).argsort(dim=1, stable=True))[:, : self.k]
        self._squared, self._numbers = squared.gather(1, order), numbers.gather(1, order)

    def over_ranks(self, topology: Topology) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
        """(distances, numbers), [q, k] each, nearest first, of what all ranks have seen (collective).

        A distance is infinite and its number -1 where the stream had fewer than k images.
        """
        for rank, (squared, numbers) in enumerate(topology.gather((self._squared.cpu(), self._numbers.cpu()))):
            if rank != topology.rank:
                self._keep(squared.to(self._squared), numbers.to(self._numbers))
        return self._squared.sqrt().cpu().numpy(), self._numbers.cpu().numpy()


def nearness(distances: NDArray[np.float64], real: NDArray[np.float64]) -> tuple[float, NDArray[np.float64]]:
    """(the distance within which a sample is a suspected copy, float64 [n]: the share of the real distances that are
    no larger than each sample's).

    distances: [n], of samples to their nearest training image.
    real: [m], of training images to the nearest other one.
    """
    ordered = np.sort(real)
    shares = np.searchsorted(ordered, distances, side="right") / len(ordered)
    return float(CLOSER * np.quantile(ordered, LEVEL)), shares
