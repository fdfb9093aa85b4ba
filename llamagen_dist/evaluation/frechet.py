"""Frechet distance between two Gaussians fitted to features (Heusel et al. 2017, equation 6), in float64.

|mu1 - mu2|^2 + tr S1 + tr S2 - 2 tr (S1 S2)^(1/2), where the last trace is the nuclear norm of F1 F2^T for any
factors S = F^T F. No matrix square root is taken: for full rank the eigenvalues of L^T S2 L give it (L L^T = S1),
for fewer images than dimensions the centred features are the factors themselves, and the result is exact.
"""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from llamagen_dist.evaluation.finite import require_finite
from llamagen_dist.parallel.topology import Topology

ROUNDING = 1e-6
"""What a stored covariance may be off, in units of its largest variance, before it is no covariance at all: several
hundred times what storing it as float32 does to it."""


@dataclass
class Gaussian:
    """What the distance needs to know of one set of images."""

    mean: Tensor
    """float64 [d]."""
    covariance: Tensor | None
    """float64 [d, d], with n - 1; None where ``factor`` says it all."""
    factor: Tensor | None = None
    """float64 [k, d] with factor^T factor = covariance, where one is known exactly."""
    count: int | None = None
    """Images; None for published statistics."""

    def trace(self) -> Tensor:
        if self.factor is not None:
            return self.factor.square().sum()
        assert self.covariance is not None
        return self.covariance.diagonal().sum()


class Moments:
    """Sums of features and of their products, streamed batch by batch and added up over the ranks."""

    def __init__(self, dimensions: int, device: torch.device | None = None) -> None:
        self.count = torch.zeros((), dtype=torch.float64, device=device)
        self.sum = torch.zeros(dimensions, dtype=torch.float64, device=device)
        self.products = torch.zeros(dimensions, dimensions, dtype=torch.float64, device=device)

    def update(self, features: Tensor) -> None:
        """features: floats [n, d] on the device of the sums."""
        wide = features.double()
        self.count += len(wide)
        self.sum += wide.sum(0)
        self.products.addmm_(wide.T, wide)

    def gaussian(self, topology: Topology | None = None) -> Gaussian:
        """Over the images of all ranks (collective). Raises ValueError for fewer than two images."""
        add = topology.sum if topology is not None else lambda values: values
        count, total, products = add(self.count), add(self.sum), add(self.products)
        n = round(float(count))
        if n < 2:
            raise ValueError(f"a covariance needs at least two images, not {n}")
        mean = total / n
        return Gaussian(mean, (products - n * torch.outer(mean, mean)) / (n - 1), None, n)


def gaussian_of(features: Tensor) -> Gaussian:
    """From kept features, floats [n, d], n >= 2 (else ValueError)."""
    n, dimensions = features.shape
    if n < 2:
        raise ValueError(f"a covariance needs at least two images, not {n}")
    wide = features.double()
    mean = wide.mean(0)
    factor = (wide - mean) / (n - 1) ** 0.5
    if n <= dimensions:
        return Gaussian(mean, None, factor, n)
    return Gaussian(mean, factor.T @ factor, None, n)


def check_statistics(mean: NDArray[Any], covariance: NDArray[Any], dimensions: int, names: tuple[str, str]) -> None:
    """Raises ValueError, naming the array, where published statistics cannot be those of any features.

    mean, covariance: real numbers [dimensions] and [dimensions, dimensions]. names: what the two are called.
    A covariance is finite, symmetric and has no negative variance in any direction, all up to ROUNDING.
    """
    for name, array, shape in zip(names, (mean, covariance), ((dimensions,), (dimensions, dimensions)), strict=True):
        if array.shape != shape or array.dtype.kind not in "fiu":
            raise ValueError(f"{name} is {array.dtype} {list(array.shape)}, not real numbers {list(shape)}")
        require_finite(name, torch.from_numpy(np.array(array, np.float64)))
    name, sigma = names[1], np.asarray(covariance, np.float64)
    variances = sigma.diagonal()
    allowed = ROUNDING * float(variances.max())
    if variances.min() < -allowed:
        raise ValueError(f"{name} is no covariance: it holds a negative variance ({variances.min():.3g})")
    if (skew := float(np.abs(sigma - sigma.T).max())) > allowed:
        raise ValueError(f"{name} is no covariance: it is not symmetric (entries differ by {skew:.3g})")
    # A Cholesky factor exists where all eigenvalues are positive; the shift leaves room for those that rounding has
    # moved below zero. It takes a tenth of the time of the eigenvalues themselves.
    shifted = torch.from_numpy(sigma + max(allowed, 1e-300) * np.eye(dimensions))
    if bool(torch.linalg.cholesky_ex(shifted)[1]):
        raise ValueError(f"{name} is no covariance: a weighted sum of the features would have a negative variance")


def frechet_distance(a: Gaussian, b: Gaussian) -> float:
    """The distance; 0 (never below) for equal Gaussians.

    Raises ValueError where the dimensions differ, or where the distance comes out as NaN, infinite or (by more than
    rounding) negative, which it is for no two Gaussians.
    """
    if a.mean.shape != b.mean.shape:
        raise ValueError(f"features of {len(a.mean)} and of {len(b.mean)} dimensions cannot be compared")
    known = [part for g in (a, b) for part in (g.mean, g.covariance, g.factor) if part is not None]
    require_finite("means and covariances", *known)
    spread = a.trace() + b.trace()
    distance = float((a.mean - b.mean).square().sum() + spread - 2 * _trace_of_root(a, b))
    # half the digits are left where a singular covariance comes from moments (see factor_of); a negative distance
    # beyond that is not rounding
    if not math.isfinite(distance) or distance < -1e-4 * float(spread):
        raise ValueError(f"the distance came out as {distance:g}, so the statistics are not those of images")
    return max(0.0, distance)


def _trace_of_root(a: Gaussian, b: Gaussian) -> Tensor:
    """tr (S1 S2)^(1/2)."""
    if a.factor is None and b.factor is None:
        for first, second in ((a, b), (b, a)):
            lower = _cholesky(first)
            if lower is not None and _full_rank(second):
                assert second.covariance is not None
                return torch.linalg.eigvalsh(_congruent(lower, second.covariance)).clamp_min(0).sqrt().sum()
    return torch.linalg.svdvals(factor_of(a) @ factor_of(b).T).sum()


def _congruent(lower: Tensor, covariance: Tensor, block: int = 256) -> Tensor:
    """The lower triangle of L^T S L, all that eigvalsh reads; products with L's zeros are left out. [d, d] each."""
    product = torch.zeros_like(covariance)
    starts = range(0, len(covariance), block)
    for top in starts:
        rows = slice(top, top + block)
        half = lower[top:, rows].T @ covariance[top:]
        for left in (start for start in starts if start <= top):
            columns = slice(left, left + block)
            product[rows, columns] = half[:, left:] @ lower[left:, columns]
    return product


def _full_rank(g: Gaussian) -> bool:
    return g.count is None or g.count > len(g.mean)


def _cholesky(g: Gaussian) -> Tensor | None:
    """Lower triangle with L L^T = S; None where S is singular, also where rounding would let it pass."""
    if g.covariance is None or not _full_rank(g):
        return None
    lower, failed = torch.linalg.cholesky_ex(g.covariance)
    smallest, largest = lower.diagonal().abs().aminmax()
    return None if bool(failed) or smallest <= 1e-7 * largest else lower


def is_rough(g: Gaussian) -> bool:
    """Whether the covariance is singular and no factor of it is known, so that distances lose half the digits."""
    return g.factor is None and (not _full_rank(g) or (g.count is None and _cholesky(g) is None))


def factor_of(g: Gaussian) -> Tensor:
    """float64 [k, d] with factor^T factor = S, for any S."""
    if g.factor is not None:
        return g.factor
    lower = _cholesky(g)
    if lower is not None:
        return lower.T
    assert g.covariance is not None
    values, vectors = torch.linalg.eigh(g.covariance)
    kept = values > values[-1] * len(values) * torch.finfo(torch.float64).eps
    return values[kept].sqrt()[:, None] * vectors[:, kept].T
