"""Whether one score orders a few things as another does: rank correlations, and how often chance alone gives as much.

Spearman's rho is Pearson's correlation of the ranks (equal values share the mean of theirs), Kendall's tau-b counts
pairs in the same order against pairs in opposite orders. Their p-values are those of the permutation test, two-sided:
the share of all orders of one score with a correlation at least as far from 0. Up to EXACT things all orders are
counted, beyond that DRAWN of them.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.stats import rankdata

from llamagen_dist import prng

EXACT = 8
"""8! = 40,320 orders."""
DRAWN = 20_000
FEWEST = 3
_ROUNDING = 1e-9


@dataclass(frozen=True)
class RankCorrelation:
    """n: of things. exact: whether all orders were counted for the p-values."""

    n: int
    spearman: float
    spearman_p: float
    kendall: float
    kendall_p: float
    exact: bool


def rank_correlation(x: Sequence[float], y: Sequence[float], seed: int = 0) -> RankCorrelation | None:
    """None for fewer than FEWEST things, and where all values of a score are equal: there is no order to compare.

    seed: of the orders that are drawn, where there are too many to count.
    """
    if len(x) != len(y):
        raise ValueError(f"{len(x)} values and {len(y)}")
    n, ranks = len(x), (rankdata(x), rankdata(y))
    if n < FEWEST or any(np.ptp(one) == 0 for one in ranks):
        return None
    orders = np.array(list(itertools.permutations(range(n)))) if n <= EXACT else _drawn(n, seed)
    values, chances = [], []
    for measure in (_spearman, _kendall):
        value = float(measure(*ranks, np.arange(n)[None])[0])
        as_far = int((np.abs(measure(*ranks, orders)) >= abs(value) - _ROUNDING).sum())
        # the order that was measured is one of all; of a sample it has to be counted beside those that were drawn
        chances.append(as_far / len(orders) if n <= EXACT else (as_far + 1) / (len(orders) + 1))
        values.append(value)
    return RankCorrelation(n, values[0], chances[0], values[1], chances[1], n <= EXACT)


def _drawn(n: int, seed: int) -> NDArray[np.int64]:
    """[DRAWN, n]: orders by a hash of (seed, draw, thing)."""
    bits = prng.bits(seed, "permutation-test", torch.arange(DRAWN)[:, None], torch.arange(n))
    return bits.to(torch.int64).argsort(dim=1, stable=True).numpy()


def _spearman(x: NDArray[np.float64], y: NDArray[np.float64], orders: NDArray[np.int64]) -> NDArray[np.float64]:
    """[m]: of x and each of the orders [m, n] of y; both are ranks."""
    x, y = x - x.mean(), y - y.mean()
    return y[orders] @ x / np.sqrt((x @ x) * (y @ y))


def _kendall(x: NDArray[np.float64], y: NDArray[np.float64], orders: NDArray[np.int64]) -> NDArray[np.float64]:
    """As ``_spearman``."""
    permuted, total, pairs = y[orders], np.zeros(len(orders)), np.zeros(2)
    for i in range(len(x) - 1):
        mine = np.sign(x[i + 1 :] - x[i])
        total += np.sign(permuted[:, i + 1 :] - permuted[:, i : i + 1]) @ mine
        pairs += np.abs(mine).sum(), np.abs(np.sign(y[i + 1 :] - y[i])).sum()
    return total / np.sqrt(pairs[0] * pairs[1])
