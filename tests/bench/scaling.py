"""The fitter against what a search from many starts costs: `OMP_NUM_THREADS=1 python -m tests.bench.scaling [STARTS]`.

240 made-up points of a Chinchilla law with heavy-tailed scatter: the time of the robust fit of five parameters, of
4,000 bootstrap refits, and of the usual 4,500-start grid of scipy's L-BFGS-B with finite differences (Hoffmann et al.
2022, Besiroglu et al. 2024), extrapolated from every 4500/STARTS-th of its starts.
"""

import sys
import time
from itertools import product

import numpy as np
from scipy.optimize import minimize

from llamagen_dist.scaling.bootstrap import REPLICATES, bootstrap
from llamagen_dist.scaling.fit import fit_law
from llamagen_dist.scaling.points import Points

DELTA = 1e-3
GRID = list(
    product(np.linspace(0, 25, 6), np.linspace(0, 25, 6), np.linspace(-1, 1, 5), *[np.linspace(0, 2, 5)] * 2)
)  # log A, log B, log E, alpha, beta


def made_up(seed: int = 0) -> Points:
    random = np.random.default_rng(seed)
    n, d = 10 ** random.uniform(7.6, 10.2, 240), 10 ** random.uniform(8.5, 11.5, 240)
    loss = 1.82 + 480 / n**0.35 + 2100 / d**0.37
    return Points(n, d, loss * np.exp(0.005 * random.standard_t(3, 240)), tuple(map(str, range(240))))


def grid(points: Points, starts: int) -> tuple[float, float, float]:
    """Seconds per start, the lowest objective, and the share of starts that end within 1e-4 of it."""
    logs = np.log([points.params, points.tokens, points.loss])

    def objective(theta: np.ndarray) -> float:
        a, b, e, alpha, beta = theta
        terms = np.stack([a - alpha * logs[0], b - beta * logs[1], np.full(240, e)])
        residual = np.abs(logs[2] - np.logaddexp.reduce(terms))
        return float(np.where(residual <= DELTA, residual**2 / 2, DELTA * (residual - DELTA / 2)).sum())

    before = time.perf_counter()
    chosen = [GRID[i] for i in np.linspace(0, len(GRID) - 1, starts).astype(int)]
    ends = np.array([minimize(objective, start, method="L-BFGS-B").fun for start in chosen])
    each = (time.perf_counter() - before) / starts
    return each, float(ends.min()), float((ends <= ends.min() * (1 + 1e-4)).mean())


def main() -> None:
    starts = int(sys.argv[1]) if len(sys.argv) > 1 else 150
    points = made_up()
    times = []
    for _ in range(15):
        before = time.perf_counter()
        fit = fit_law(points, delta=DELTA)
        times.append(time.perf_counter() - before)
    ours = float(np.median(times))
    print(f"fit of 5 parameters to 240 points, huber: {ours:.3f} s (median of 15), objective {fit.objective:.12g}")
    before = time.perf_counter()
    made = bootstrap(fit)
    print(f"{REPLICATES:,} bootstrap refits: {time.perf_counter() - before:.2f} s, {made.stationary:.1%} stationary")
    each, lowest, share = grid(points, starts)
    whole = each * len(GRID)
    print(
        f"{len(GRID):,}-start L-BFGS-B grid: {whole:.0f} s (from {starts} starts), objective {lowest:.12g}, "
        f"{share:.1%} of the starts end there"
    )
    print(f"ratio: {whole / ours:,.0f} x faster; objective {fit.objective / lowest - 1:+.2e} relative to the grid's")
    if fit.objective > lowest * (1 + 1e-12):
        sys.exit("the grid found a lower objective")


if __name__ == "__main__":
    main()
