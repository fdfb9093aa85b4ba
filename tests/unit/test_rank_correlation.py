"""Rank correlations and their permutation tests: scipy's numbers, values by hand, and what has no order."""

import itertools

import numpy as np
import pytest
from scipy import stats

from llamagen_dist.evaluation import correlation
from llamagen_dist.evaluation.correlation import rank_correlation

CASES = {
    "few": ([3.0, 1.0, 2.0, 5.0], [30.0, 12.0, 11.0, 29.0]),
    "ties": ([1.0, 2.0, 2.0, 4.0, 5.0, 5.0, 5.0], [9.0, 7.0, 7.5, 7.5, 3.0, 2.0, 2.5]),
    "eight": ([0.1, 0.5, 0.3, 0.9, 0.7, 0.2, 0.8, 0.4], [14.0, 60.0, 21.0, 75.0, 90.0, 20.0, 80.0, 33.0]),
    "more": ([float(9 * i % 14) for i in range(14)], [np.sin(9 * i % 14 / 3) for i in range(14)]),
}


def agrees(x: list[float], y: list[float]) -> bool:
    """With scipy's correlations, and its permutation test where all orders are counted."""
    found = rank_correlation(x, y)
    assert found is not None
    rho, tau = stats.spearmanr(x, y).statistic, stats.kendalltau(x, y).statistic
    same = found.spearman == pytest.approx(rho, abs=1e-12) and found.kendall == pytest.approx(tau, abs=1e-12)
    if not found.exact:
        return bool(same)
    for p, value, measure in (
        (found.spearman_p, rho, stats.spearmanr),
        (found.kendall_p, tau, stats.kendalltau),
    ):
        n = len(x)
        orders = itertools.permutations(range(n)) if n < 5 else []
        every = [abs(measure(x, np.array(y)[list(order)]).statistic) >= abs(value) - 1e-9 for order in orders]
        same = same and (not every or p == pytest.approx(np.mean(every), abs=1e-12))
    return bool(same)


@pytest.mark.parametrize("name", CASES)
def test_correlations_are_scipys(name, monkeypatch):
    assert agrees(*CASES[name])
    monkeypatch.setattr(correlation, "rankdata", lambda values: np.argsort(values).astype(float))
    assert not agrees(*CASES[name]), "sabotage twin: positions in the sorted list are no ranks"


def test_kendalls_exact_p_is_scipys_without_ties():
    x, y = CASES["eight"]
    found = rank_correlation(x, y)
    assert found is not None
    assert found.exact
    assert found.kendall_p == pytest.approx(stats.kendalltau(x, y, method="exact").pvalue, abs=1e-12)
    weaker = rank_correlation(x, [*y[:-1], 100.0])
    assert weaker is not None
    assert weaker.kendall_p != pytest.approx(found.kendall_p, abs=1e-6), "twin: another order has another p"


def test_values_by_hand():
    same = rank_correlation([1, 2, 3], [10, 20, 90])
    assert same is not None
    assert (same.n, same.spearman, same.kendall) == (3, 1.0, 1.0)
    assert same.spearman_p == same.kendall_p == pytest.approx(2 / 6), "of six orders it and its reverse are as far"
    opposite = rank_correlation([1, 2, 3, 4], [4, 3, 2, 1])
    assert opposite is not None
    assert (opposite.spearman, opposite.kendall) == (-1.0, -1.0)
    assert opposite.spearman_p == pytest.approx(2 / 24)
    swapped = rank_correlation([1, 2, 3, 4], [1, 2, 4, 3])
    assert swapped is not None
    assert swapped.spearman == pytest.approx(1 - 6 * 2 / (4 * 15))
    assert swapped.kendall == pytest.approx((5 - 1) / 6)


def test_many_orders_are_drawn_alike_each_time():
    x, y = CASES["more"]
    found, again, other = (rank_correlation(x, y, seed) for seed in (0, 0, 1))
    assert found == again
    assert found is not None
    assert not found.exact
    assert other is not None
    assert other.kendall_p != found.kendall_p, "twin: another seed draws other orders"
    exact = stats.kendalltau(x, y, method="exact").pvalue
    # five standard errors of a share of 20,000 draws, and the one that is added
    assert abs(found.kendall_p - exact) < 5 * (exact * (1 - exact) / correlation.DRAWN) ** 0.5 + 1 / correlation.DRAWN


def test_where_there_is_no_order_there_is_no_correlation():
    assert rank_correlation([1, 2], [1, 2]) is None
    assert rank_correlation([1, 1, 1], [1, 2, 3]) is None
    assert rank_correlation([1, 2, 3], [5, 5, 5]) is None
    with pytest.raises(ValueError, match="3 values and 2"):
        rank_correlation([1, 2, 3], [1, 2])
