"""Kernel Inception Distance (Binkowski et al. 2018): the unbiased squared MMD with a cubic kernel, over subsets."""

import numpy as np
import torch
from torch import Tensor

from llamagen_dist import prng
from llamagen_dist.evaluation.finite import require_finite
from llamagen_dist.parallel.topology import Topology

WHOLE_KERNEL = 4096  # features of so many images a side: the kernel is computed once and cut up (0.4 GB in float64)


def kernel(a: Tensor, b: Tensor) -> Tensor:
    """(a . b / d + 1)^3, float64 [n, m]. a: float64 [n, d], b: float64 [m, d]."""
    return (a @ b.T / a.shape[1] + 1.0) ** 3


def mmd2(within_a: Tensor, within_b: Tensor, between: Tensor) -> Tensor:
    """The unbiased estimate from kernels [m, m], [n, n] and [m, n]; it may be negative."""
    m, n = between.shape

    def off_diagonal(k: Tensor) -> Tensor:
        return (k.sum() - k.diagonal().sum()) / (len(k) * (len(k) - 1))

    return off_diagonal(within_a) + off_diagonal(within_b) - 2 * between.sum() / (m * n)


def subset(count: int, size: int, seed: int, side: str, number: int) -> Tensor:
    """int64 [size]: subset ``number`` of ``count`` images, without repetition; a function of its arguments only.

    Raises ValueError for fewer images than ``size``.
    """
    if count < size:
        raise ValueError(f"a KID subset of {size} images cannot be drawn from {count}")
    keys = prng.bits(seed, f"kid-{side}", number, torch.arange(count)).view(torch.int32)
    return torch.argsort(keys, stable=True)[:size]


Subsets = list[tuple[Tensor, Tensor]]
"""int64 [size] each: which generated and which reference images are compared."""
TORCH_FIDELITY_SEED = 2020


def hashed_subsets(generated: int, reference: int, number: int, size: int, seed: int) -> Subsets:
    """``number`` subsets of so many generated and reference images."""
    counts = {"generated": generated, "reference": reference}
    pairs = [[subset(count, size, seed, side, n) for side, count in counts.items()] for n in range(number)]
    return [(mine, theirs) for mine, theirs in pairs]


def torch_fidelity_subsets(generated: int, reference: int, number: int, size: int) -> Subsets:
    """Those that torch-fidelity 0.4.0 draws by default, with the generated images as its input 1."""
    r = np.random.RandomState(TORCH_FIDELITY_SEED)
    return [
        (
            torch.from_numpy(r.choice(generated, size, replace=False)),
            torch.from_numpy(r.choice(reference, size, replace=False)),
        )
        for _ in range(number)
    ]


def kid(
    generated: Tensor, reference: Tensor, subsets: Subsets, topology: Topology | None = None
) -> tuple[float, float]:
    """(mean, standard deviation) over the subsets; the deviation divides by their number.

    generated, reference: floats [n, d], all of them on every rank; the ranks share out the subsets (collective).
    Raises ValueError where a feature is not finite.
    """
    require_finite("features", generated, reference)
    topology = topology or Topology()
    a, b = generated.double(), reference.double()
    whole = max(len(a), len(b)) <= WHOLE_KERNEL
    aa, bb, ab = (kernel(a, a), kernel(b, b), kernel(a, b)) if whole else (None, None, None)
    values = torch.zeros(len(subsets), dtype=torch.float64, device=a.device)
    for number in range(topology.rank, len(subsets), topology.world):
        i, j = (indices.to(a.device) for indices in subsets[number])
        if aa is not None and bb is not None and ab is not None:
            values[number] = mmd2(aa[i][:, i], bb[j][:, j], ab[i][:, j])
        else:
            values[number] = mmd2(kernel(a[i], a[i]), kernel(b[j], b[j]), kernel(a[i], b[j]))
    values = topology.sum(values)
    return float(values.mean()), float(values.std(correction=0))
