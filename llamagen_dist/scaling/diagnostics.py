"""How far a fit hangs on single points, on delta, and how well the points determine one of its parameters."""

from dataclasses import replace
from typing import Any

import numpy as np

from llamagen_dist.scaling import solve
from llamagen_dist.scaling.fit import Fit

DROPPED = (0, 1, 2, 3, 5, 8, 12)
DELTAS = (1e-4, 1e-3, 1e-2, float("inf"))
_CHI2 = 3.841  # 95% quantile of chi-squared with one degree of freedom


def without_worst(fit: Fit) -> list[dict[str, Any]]:
    """Parameters without the j points farthest from the law, as long as k + 3 points stay."""
    counts = [j for j in DROPPED if len(fit.points) - j >= fit.law.k + 3 or j == 0]
    worst = np.argsort(-np.abs(fit.residuals), kind="stable")
    weights = np.ones((len(counts), len(worst)))
    for row, j in enumerate(counts):
        weights[row, worst[:j]] = 0.0
    params = fit.in_units(fit.refit(fit.problem(weights=weights), len(counts)))
    return [
        {"dropped": j, "runs": [fit.points.runs[i] for i in worst[:j]], **_row(params, row)}
        for row, j in enumerate(counts)
    ]


def by_delta(fit: Fit) -> list[dict[str, Any]]:
    """Parameters of Huber's loss at other deltas; the last row, without one, is least squares."""
    problem = replace(fit.problem(), sides=(1.0, 1.0))
    rows = []
    for delta in sorted({*DELTAS, fit.delta} - {0.0}):
        params = fit.in_units(fit.refit(problem, 1, delta))
        rows.append({"delta": delta if np.isfinite(delta) else None, **_row(params, 0)})
    return rows


def _row(params: dict[str, Any], row: int) -> dict[str, Any]:
    return {"params": {name: float(values[row]) for name, values in params.items()}}


def profile(fit: Fit, name: str, values: int = 61) -> dict[str, Any]:
    """The 95% likelihood interval of E, R_D or R_N: where fixing it costs less than the chi-squared quantile.

    An end is None where the interval is open: at the end of the search, no value is refused.
    """
    i = fit.law.names.index(name)
    problem = fit.problem()
    # a floor cannot reach the lowest measurement, and the others are searched on their logs
    high = float(np.exp(problem.target.min())) if name == "E" else float(problem.high[0, i])
    low = float(problem.low[0, i])
    grid = np.sort(np.append(np.linspace(low, high, values, endpoint=name != "E"), fit.theta[i]))
    fixed_low, fixed_high = (np.repeat(b, len(grid), axis=0) for b in (problem.low, problem.high))
    fixed_low[:, i] = fixed_high[:, i] = grid
    fixed = replace(problem, low=fixed_low, high=fixed_high)
    theta = fit.refit(fixed, len(grid))
    objective = solve.objective(fixed, theta, fit.delta)
    cost = 2 * (fit.log_likelihood - np.array([fit.how.log_likelihood(o, len(fit.points)) for o in objective]))
    theta[:, i] = grid
    shown = fit.in_units(theta)[name]
    inside = np.flatnonzero(cost <= _CHI2)
    ends: list[float | None] = [None, None]
    for side, (at, step) in enumerate(((inside[0], -1), (inside[-1], 1))):
        if 0 <= at + step < len(grid):
            share = (_CHI2 - cost[at]) / (cost[at + step] - cost[at])
            ends[side] = float(np.interp(share, [0, 1], [shown[at], shown[at + step]]))
    return {"ci95": ends, "values": shown.tolist(), "cost": cost.tolist()}


def all_of(fit: Fit) -> dict[str, Any]:
    """``without_worst``, ``by_delta`` and the ``profile`` of E, R_D and R_N, for the result's diagnostics."""
    profiles = {name: profile(fit, name) for name in ("E", "R_D", "R_N") if name in fit.law.names}
    return {"without_worst": without_worst(fit), "by_delta": by_delta(fit), "profile": profiles}
