"""Precision and recall (Kynkaanniemi et al. 2019), density and coverage (Naeem et al. 2020).

The manifold of a set is the union of balls around its images, each reaching to the k-th nearest other image of the
set. Precision: the share of generated images inside the real manifold; recall: the share of real images inside the
generated one. Density: in how many real balls a generated image lies on average, divided by k (it may exceed 1);
coverage: the share of real balls with a generated image inside. Others count with their own k, border and arithmetic:
see CONVENTIONS.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from llamagen_dist.evaluation.finite import require_finite
from llamagen_dist.parallel.topology import Topology

BLOCK = 1024  # rows of the distance matrix in memory at a time


class Convention(NamedTuple):
    k: int = 3
    border: bool = True
    """Whether an image on the border of a ball, at distance = radius, is inside it."""
    dtype: torch.dtype = torch.float64

    def describe(self) -> dict[str, object]:
        """For a record."""
        relation = "<=" if self.border else "<"
        return {"k": self.k, "inside": f"distance {relation} radius, {str(self.dtype).removeprefix('torch.')}"}


CONVENTIONS = {
    "exact": Convention(),
    "adm": Convention(dtype=torch.float32),  # where its half-precision product overflows; else that differs by rounding
    "torch-fidelity": Convention(dtype=torch.float32),  # 0.4.0; older versions print the two swapped
    "dgm-eval": Convention(k=5, border=False),
}


class Scores(NamedTuple):
    precision: float
    recall: float
    density: float
    coverage: float


def squared_distances(a: Tensor, b: Tensor) -> Tensor:
    """[n, m] for floats [n, d] and [m, d] of one dtype, never negative. In float64 exactly 0 for equal images, whatever
    the rounding; in float32 what others compute in it.
    """
    norm_a, norm_b = a.square().sum(1)[:, None], b.square().sum(1)[None, :]
    distances = torch.addmm(norm_b, a, b.T, alpha=-2.0).add_(norm_a)
    rounding = 1e-12 if a.dtype == torch.float64 else 0.0
    return F.threshold(distances, rounding * float(norm_a.max() + norm_b.max()), 0.0, inplace=True)


def squared_radii(
    features: Tensor, convention: Convention, topology: Topology | None = None, block: int = BLOCK
) -> Tensor:
    """[n] of the convention's dtype: squared distance to the k-th nearest other image (collective: the ranks share out
    the rows).

    features: floats [n, d], all of them on every rank. Raises ValueError for n <= k and for features that are not
    finite.
    """
    k = convention.k
    require_finite("features", features)
    if len(features) <= k:
        raise ValueError(f"{len(features)} images have no {k}-th neighbour")
    topology = topology or Topology()
    wide = features.to(convention.dtype)
    nearest = torch.zeros(topology.world, len(wide), k, dtype=wide.dtype, device=wide.device)
    mine = nearest[topology.rank].fill_(torch.inf)
    for rows in _blocks(len(wide), block, topology):
        # a distance serves both of its images: what lies before this block has been computed with the blocks before
        distances = squared_distances(wide[rows], wide[rows.start :])
        distances.fill_diagonal_(torch.inf)  # not one's own
        mine[rows] = _smallest(k, mine[rows], distances)
        if rows.stop < len(wide):
            mine[rows.stop :] = _smallest(k, mine[rows.stop :], distances[:, len(distances) :].T.contiguous())
    return topology.sum(nearest).transpose(0, 1).flatten(1).topk(k, largest=False).values[:, -1]


def _smallest(k: int, known: Tensor, more: Tensor) -> Tensor:
    """[n, k]: the k smallest of each row of both, [n, k] and [n, m]."""
    candidates = more.topk(min(k, more.shape[1]), largest=False).values  # several times as fast as kthvalue
    return torch.cat([known, candidates], 1).topk(k, largest=False).values


def manifold_scores(
    generated: Tensor,
    reference: Tensor,
    convention: Convention = CONVENTIONS["exact"],
    topology: Topology | None = None,
    block: int = BLOCK,
    radii: tuple[Tensor, Tensor] | None = None,
) -> Scores:
    """One reference x generated pass serves all four; the ranks share out its rows (collective).

    generated, reference: floats [n, d], all of them on every rank.
    convention: k, border and arithmetic.
    block: rows of the distance matrix that are in memory at a time.
    radii: ``squared_radii`` of both sets in this convention, where they are known.
    Raises ValueError for features that are not finite and for sets of at most k images.
    """
    require_finite("features", generated, reference)
    topology = topology or Topology()
    radii_generated, radii_reference = radii or tuple(
        squared_radii(features, convention, topology, block) for features in (generated, reference)
    )
    inside = torch.le if convention.border else torch.lt
    a, b = reference.to(convention.dtype), generated.to(convention.dtype)
    balls = torch.zeros(len(b), dtype=torch.float64, device=b.device)  # real ones around every generated image
    recalled, covered = (torch.zeros(len(a), dtype=torch.float64, device=b.device) for _ in range(2))
    for rows in _blocks(len(a), block, topology):
        distances = squared_distances(a[rows], b)
        in_real = inside(distances, radii_reference[rows, None])
        balls += in_real.view(torch.uint8).sum(0, dtype=torch.int32)  # a sum of bools is ten times as slow
        covered[rows] = in_real.any(1).double()
        recalled[rows] = inside(distances, radii_generated[None, :]).any(1).double()
    balls, recalled, covered = (topology.sum(counts) for counts in (balls, recalled, covered))
    return Scores(
        float((balls > 0).double().mean()),
        float(recalled.mean()),
        float(balls.mean()) / convention.k,
        float(covered.mean()),
    )


def _blocks(count: int, block: int, topology: Topology) -> list[slice]:
    """The blocks of rows that this rank works on."""
    block = min(block, max(1, -(-count // topology.world)))
    starts = range(0, count, block)
    return [slice(start, min(start + block, count)) for start in starts][topology.rank :: topology.world]
