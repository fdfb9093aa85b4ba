"""How far a Fréchet distance would move with other pictures of the same kind: the bootstrap over images.

A replicate draws n of the n pictures with replacement. Its distance needs no new covariance of 2,048 dimensions and no
new factorisation of the reference: with F^T F the reference's covariance and Y = X F^T the centred features X seen
through it (once), tr (S1 S2)^(1/2) is the sum of singular values of Y's drawn and centred rows. Their eigenvalues are
those of the smaller of two products: of dimensions, or of the pictures that were drawn at least once (63 %).

The distances themselves read high, since a replicate has fewer different pictures; their spread is what is used.
"""

import numpy as np
import torch
from torch import Tensor

from llamagen_dist import prng
from llamagen_dist.evaluation.finite import require_finite
from llamagen_dist.evaluation.frechet import Gaussian, factor_of
from llamagen_dist.parallel.topology import Topology


def drawn(number: int, count: int) -> Tensor:
    """float64 [count]: how often replicate ``number`` takes each picture; a hash decides, the same for every set."""
    indices = prng.bits(0, "bootstrap-images", number, torch.arange(count)).to(torch.int64) % count
    return torch.bincount(indices, minlength=count).double()


def bootstrap_fid(pool: Tensor, reference: Gaussian, replicates: int, topology: Topology | None = None) -> list[float]:
    """The distance of every replicate; the ranks share them out (collective).

    pool: floats [n, d], all of them on every rank. reference: of d dimensions.
    Raises ValueError for features that are not finite and for fewer than two pictures.
    """
    require_finite("features", pool)
    topology = topology or Topology()
    n = len(pool)
    if n < 2:
        raise ValueError(f"a covariance needs at least two images, not {n}")
    wide = pool.double()
    mean = wide.mean(0)
    centred, factor = wide - mean, factor_of(reference).to(wide)
    shift, squares = mean - reference.mean.to(wide), centred.square().sum(1)
    seen = centred @ factor.T
    by_pictures = n <= seen.shape[1]
    products = seen @ seen.T if by_pictures else None
    distances = torch.zeros(replicates, dtype=torch.float64, device=pool.device)
    for number in range(topology.rank, replicates, topology.world):
        weights = drawn(number, n).to(wide.device)
        moved = weights @ centred / n
        if products is not None:
            rows = weights.nonzero()[:, 0]
            means = products[rows] @ weights / n  # of each drawn row with the mean of the drawn
            block = products[rows][:, rows] - means[:, None] - means[None, :] + weights[rows] @ means / n
            root = weights[rows].sqrt()
            block *= root[:, None] * root[None, :]
        else:
            middle = weights @ seen / n
            block = (seen * weights[:, None]).T @ seen - n * torch.outer(middle, middle)
        trace = torch.linalg.eigvalsh(block).clamp_min(0).sqrt().sum() / (n - 1) ** 0.5
        spread = (weights @ squares - n * moved.square().sum()) / (n - 1) + reference.trace()
        distances[number] = (shift + moved).square().sum() + spread - 2 * trace
    return np.maximum(topology.sum(distances).cpu().numpy(), 0).tolist()
