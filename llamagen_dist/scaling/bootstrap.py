"""Confidence and prediction intervals of a fitted law by resampling; the method that was used is named."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from llamagen_dist.errors import UserError
from llamagen_dist.scaling import solve
from llamagen_dist.scaling.fit import Fit
from llamagen_dist.scaling.laws import Floats
from llamagen_dist.scaling.refusals import too_few

SEED = 20240606
REPLICATES = 4000
_CHUNK = 250
NONE: Mapping[str, Floats] = {}
_CASES = 20  # from so many points on they are drawn themselves


@dataclass(frozen=True, eq=False)
class Bootstrap:
    """theta [r, k]: refits, as Fit.theta. noise [m]: log residuals a new measurement may have."""

    method: str
    theta: Floats
    noise: Floats
    seed: int
    stationary: float
    """Share of the refits that ended at a stationary point."""

    def draws(self, fit: Fit, params: Floats, tokens: Floats, also: Mapping[str, Floats] = NONE) -> Floats:
        """What a new measurement at (params, tokens) [...] may be: the refits' spread and the scatter of the points
        around the law together, [r, ...]."""
        predicted = fit.predict_with(self.theta, params, tokens, **also)
        scatter = np.random.default_rng(self.seed + 1).choice(self.noise, len(self.theta))
        return predicted * np.exp(scatter).reshape(-1, *[1] * (predicted.ndim - 1))

    def band(
        self, fit: Fit, params: Floats, tokens: Floats, level: float = 0.95, also: Mapping[str, Floats] = NONE
    ) -> tuple[Floats, Floats]:
        """Prediction interval of a new measurement at (params, tokens) [n]. Returns (low [n], high [n])."""
        return quantiles(self.draws(fit, params, tokens, also), level)

    def curve(
        self, fit: Fit, params: Floats, tokens: Floats, level: float = 0.95, also: Mapping[str, Floats] = NONE
    ) -> tuple[Floats, Floats]:
        """Confidence interval of the law itself, without scatter."""
        return quantiles(fit.predict_with(self.theta, params, tokens, **also), level)


def quantiles(values: Floats, level: float = 0.95) -> tuple[Floats, Floats]:
    """The middle ``level`` of values [r, ...]."""
    low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2], axis=0)
    return low, high


def interval(values: Floats) -> list[float]:
    """The middle 95 % of values [r]."""
    return [float(end) for end in quantiles(values)]


def attempt(fit: Fit) -> tuple[Bootstrap | None, str | None]:
    """``bootstrap``, or why there is none."""
    try:
        return bootstrap(fit), None
    except UserError as error:
        return None, str(error)


def bootstrap(fit: Fit, replicates: int = REPLICATES, seed: int = SEED) -> Bootstrap:
    """Refit resampled data: points, where there are 20 of as many runs; whole runs, where some have several points;
    else the fitted values with noise of the density that the loss belongs to, as wide as the residuals (inflated by
    n / (n - k) for the fit's flexibility).

    Deterministic per seed. Raises TooFewPointsError below k + 3 points, where an interval would be an illusion.
    """
    n, k = len(fit.points), fit.law.k
    if n < k + 3:
        raise too_few(n, fit.law)
    random = np.random.default_rng(seed)
    # A fit with k parameters bends towards its points, so its residuals are smaller than the noise they come from;
    # for least squares their variance is (n - k) / n of it.
    inflated = fit.residuals * np.sqrt(n / (n - k))
    inflated = inflated - inflated.mean()
    names = sorted(set(fit.points.runs))
    if len(names) >= max(k + 3, _CASES if len(names) == n else 0):
        kind = "case" if len(names) == n else "cluster"
        what = "points" if len(names) == n else "whole runs"
        method = f"{kind} bootstrap: {replicates:,} draws of {len(names)} {what}"
        members = np.array([[run == name for run in fit.points.runs] for name in names], float)
        # Losses along one run share its initial weights and data order: drawn one by one they would look like
        # independent evidence and the interval would be too narrow. A run drawn twice has weight two.
        weights = random.multinomial(len(names), np.full(len(names), 1 / len(names)), size=replicates) @ members
        problems = [fit.problem(weights=weights[i : i + _CHUNK]) for i in range(0, replicates, _CHUNK)]
    else:
        why = f"{len(names)} runs are too few to draw {'them' if len(names) == n else 'whole runs'}"
        if len(names) < n:
            why += "; points of one run are treated as independent"
        method = f"parametric bootstrap: {replicates:,} draws of {fit.loss} noise for the {n} points ({why})"
        fitted = np.log(fit.points.loss) - fit.level - fit.residuals
        inflated = fit.how.draw(inflated, (replicates, n), random)
        problems = [fit.problem(target=fitted + inflated[i : i + _CHUNK]) for i in range(0, replicates, _CHUNK)]
    refits, stationary = [], []
    for problem in problems:
        theta = fit.refit(problem, max(len(problem.target), len(problem.weights)))
        refits.append(theta)
        stationary.append(solve.stationarity(problem, theta, fit.smooth) < 1e-3)
    share = float(np.concatenate(stationary).mean())
    return Bootstrap(method, np.concatenate(refits), inflated.ravel(), seed, share)


def parameter_intervals(fit: Fit, resampled: Bootstrap) -> dict[str, dict[str, Any]]:
    """``ci95``: percentile intervals, ``se``: standard errors; both in the caller's units."""
    values = fit.in_units(resampled.theta)
    return {
        "ci95": {name: interval(v) for name, v in values.items()},
        "se": {name: float(v.std(ddof=1)) for name, v in values.items()},
    }
