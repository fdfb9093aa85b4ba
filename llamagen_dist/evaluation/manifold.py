"""Improved precision and recall (Kynkaanniemi et al. 2019): is an image inside the other set's manifold?

The manifold of a set is the union of balls around its images, each reaching to the k-th nearest other image of the
set (k = 3, distance <= radius, as ADM's evaluator has it). Precision: the share of generated images inside the real
manifold; recall: the share of real images inside the generated one.
"""

import torch
from torch import Tensor

from llamagen_dist.evaluation.finite import require_finite
from llamagen_dist.parallel.topology import Topology

BLOCK = 1024  # rows of the distance matrix in memory at a time


def squared_distances(a: Tensor, b: Tensor) -> Tensor:
    """float64 [n, m] for float64 [n, d] and [m, d]; exactly 0 for equal images, whatever the rounding."""
    norm_a, norm_b = a.square().sum(1)[:, None], b.square().sum(1)[None, :]
    distances = torch.addmm(norm_a + norm_b, a, b.T, alpha=-2.0)
    return torch.where(distances <= 1e-12 * (norm_a + norm_b), 0.0, distances)


def squared_radii(features: Tensor, k: int, topology: Topology | None = None, block: int = BLOCK) -> Tensor:
    """float64 [n]: squared distance to the k-th nearest other image (collective: the ranks share out the rows).

    features: floats [n, d], all of them on every rank. Raises ValueError for n <= k and for features that are not
    finite.
    """
    require_finite("features", features)
    if len(features) <= k:
        raise ValueError(f"{len(features)} images have no {k}-th neighbour")
    topology = topology or Topology()
    wide = features.double()
    radii = torch.zeros(len(wide), dtype=torch.float64, device=wide.device)
    for rows in _blocks(len(wide), block, topology):
        distances = squared_distances(wide[rows], wide)
        distances[torch.arange(len(distances)), torch.arange(rows.start, rows.stop)] = torch.inf  # not one's own
        radii[rows] = distances.kthvalue(k, dim=1).values
    return topology.sum(radii)


def precision_recall(
    generated: Tensor,
    reference: Tensor,
    k: int = 3,
    topology: Topology | None = None,
    block: int = BLOCK,
    radii: tuple[Tensor, Tensor] | None = None,
) -> tuple[float, float]:
    """(precision, recall) in [0, 1]. One reference x generated pass serves both directions; the ranks share out its
    rows (collective).

    generated, reference: floats [n, d], all of them on every rank.
    k: an image's ball reaches to its k-th nearest neighbour in its own set.
    block: rows of the distance matrix that are in memory at a time.
    radii: ``squared_radii`` of both sets, where they are known.
    Raises ValueError for features that are not finite and for sets of at most k images.
    """
    require_finite("features", generated, reference)
    topology = topology or Topology()
    radii_generated, radii_reference = radii or tuple(
        squared_radii(features, k, topology, block) for features in (generated, reference)
    )
    a, b = reference.double(), generated.double()
    covered_generated = torch.zeros(len(b), dtype=torch.float64, device=b.device)
    covered_reference = torch.zeros(len(a), dtype=torch.float64, device=b.device)
    for rows in _blocks(len(a), block, topology):
        distances = squared_distances(a[rows], b)
        covered_generated += (distances <= radii_reference[rows, None]).any(0)
        covered_reference[rows] = (distances <= radii_generated[None, :]).any(1).double()
    precision = (topology.sum(covered_generated) > 0).double().mean()
    return float(precision), float(topology.sum(covered_reference).mean())


def _blocks(count: int, block: int, topology: Topology) -> list[slice]:
    """The blocks of rows that this rank works on."""
    block = min(block, max(1, -(-count // topology.world)))
    starts = range(0, count, block)
    return [slice(start, min(start + block, count)) for start in starts][topology.rank :: topology.world]
