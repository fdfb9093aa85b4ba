"""Confidence and prediction intervals of a fitted law by resampling; the method that was used is named."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from llamagen_dist.errors import UserError
from llamagen_dist.scaling import solve
from llamagen_dist.scaling.fit import Fit
from llamagen_dist.scaling.laws import Floats

SEED = 20240606
_CHUNK = 250


@dataclass(frozen=True, eq=False)
class Bootstrap:
    """theta [r, k]: refits, as Fit.theta. noise [m]: log residuals a new measurement may have."""

    method: str
    theta: Floats
    noise: Floats
    seed: int
    stationary: float
    """Share of the refits that ended at a stationary point."""

    def band(self, fit: Fit, params: Floats, tokens: Floats, level: float = 0.95) -> tuple[Floats, Floats]:
        """Prediction interval of a new measurement at (params, tokens) [n]: the refits' spread and the scatter of the
        points around the law together. Returns (low [n], high [n])."""
        predicted = fit.predict_with(self.theta, params, tokens)
        scatter = np.random.default_rng(self.seed + 1).choice(self.noise, len(self.theta))
        return _quantiles(predicted * np.exp(scatter)[:, None], level)

    def curve(self, fit: Fit, params: Floats, tokens: Floats, level: float = 0.95) -> tuple[Floats, Floats]:
        """Confidence interval of the law itself, without scatter."""
        return _quantiles(fit.predict_with(self.theta, params, tokens), level)


def _quantiles(values: Floats, level: float) -> tuple[Floats, Floats]:
    low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2], axis=0)
    return low, high


def bootstrap(fit: Fit, replicates: int = 1000, seed: int = SEED) -> Bootstrap:
    """Refit resampled data. With at least k + 3 runs whole runs are drawn, because the points of one run are not
    independent; with fewer, the log residuals are drawn (inflated by sqrt(n / (n - k)) for the fit's flexibility).

    Deterministic per seed. Raises UserError below k + 3 points, where an interval would be an illusion.
    """
    n, k = len(fit.points), fit.law.k
    if n < k + 3:
        raise UserError(
            f"{n} points are too few for a confidence interval of {fit.law.name}: "
            f"its {k} parameters need at least {k + 3}"
        )
    random = np.random.default_rng(seed)
    # A fit with k parameters bends towards its points, so its residuals are smaller than the noise they come from;
    # for least squares their variance is (n - k) / n of it.
    inflated = fit.residuals * np.sqrt(n / (n - k))
    inflated = inflated - inflated.mean()
    names = sorted(set(fit.points.runs))
    if len(names) >= k + 3:
        method = f"cluster bootstrap: {replicates:,} draws of {len(names)} whole runs"
        members = np.array([[run == name for run in fit.points.runs] for name in names], float)
        # Losses along one run share its initial weights and data order: drawn one by one they would look like
        # independent evidence and the interval would be too narrow. A run drawn twice has weight two.
        weights = random.multinomial(len(names), np.full(len(names), 1 / len(names)), size=replicates) @ members
        problems = [fit.problem(weights=weights[i : i + _CHUNK]) for i in range(0, replicates, _CHUNK)]
    else:
        method = (
            f"residual bootstrap: {replicates:,} draws of the {n} log residuals ({len(names)} runs are too few "
            f"to draw whole runs, which takes {k + 3}; points of one run are treated as independent)"
        )
        fitted = np.log(fit.points.loss) - fit.level - fit.residuals
        drawn = fitted + random.choice(inflated, (replicates, n))
        problems = [fit.problem(target=drawn[i : i + _CHUNK]) for i in range(0, replicates, _CHUNK)]
    refits, stationary = [], []
    for problem in problems:
        # From the fit itself: a resample's optimum is near it. First at a wider delta, where the loss is smoother.
        theta = _start(fit, len(problem.target) if len(problem.target) > 1 else len(problem.weights))
        theta = solve.newton(problem, theta, max(fit.delta, 1e-2), 40)
        theta = solve.newton(problem, theta, fit.delta, 200)
        refits.append(theta)
        stationary.append(solve.stationarity(problem, theta, fit.delta) < 1e-3)
    share = float(np.concatenate(stationary).mean())
    return Bootstrap(method, np.concatenate(refits), inflated, seed, share)


def _start(fit: Fit, rows: int) -> Floats:
    """The fit itself; a coefficient at zero begins a little above it, so that a resample can raise it."""
    theta = np.tile(fit.theta, (rows, 1))
    count = len(fit.law.coefficients)
    theta[:, :count] = np.maximum(theta[:, :count], 0.02)
    return theta


def parameter_intervals(fit: Fit, resampled: Bootstrap, level: float = 0.95) -> dict[str, dict[str, Any]]:
    """``ci95``: percentile intervals (of ``level``), ``se``: standard errors; both in the caller's units."""
    rows = [fit.in_units(theta) for theta in resampled.theta]
    values = {name: np.array([row[name] for row in rows]) for name in fit.law.names}
    return {
        "ci95": {n: [float(x) for x in np.quantile(v, [(1 - level) / 2, (1 + level) / 2])] for n, v in values.items()},
        "se": {n: float(v.std(ddof=1)) for n, v in values.items()},
    }
