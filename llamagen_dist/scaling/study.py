"""A whole study as one JSON object: fit without the held-out run, predict it, compare, and follow the frontier."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from llamagen_dist import __version__
from llamagen_dist.errors import UserError
from llamagen_dist.scaling.bootstrap import Bootstrap, bootstrap, parameter_intervals
from llamagen_dist.scaling.fit import Fit, Loss, describe, fit_law
from llamagen_dist.scaling.frontier import Best, closed_form, over_shapes
from llamagen_dist.scaling.ladder import COUNTS, Ladder
from llamagen_dist.scaling.points import Points

_CURVE = 24
_FRONTIER = 13
_BEYOND = 10.0  # the frontier ends at this multiple of the largest measured compute


@dataclass(frozen=True)
class Options:
    form: str = "chinchilla"
    loss: Loss = "huber"
    delta: float = 1e-3
    hold_out: str | None = None
    """``largest``, the name of a run, or None."""


def study(points: Points, options: Options, ladder: Ladder | None = None) -> dict[str, Any]:
    """ladder: where ``points`` came from, for exact FLOPs and counts; without it C = 6 N D. Raises UserError."""
    held = np.array([run == _held_out(points, options.hold_out) for run in points.runs])
    fit = fit_law(points.where(~held), options.form, options.loss, options.delta)
    resampled, refused = None, None
    try:
        resampled = bootstrap(fit)
    except UserError as error:
        refused = str(error)
    fitted = fit.predict(points.params, points.tokens)
    rows = [
        {
            "name": points.runs[i],
            "params": _params(points, ladder, i),
            "params_fit": float(points.params[i]),
            "tokens": float(points.tokens[i]),
            "flops": float(points.flops[i]),
            "loss": float(points.loss[i]),
            "fitted": float(fitted[i]),
            "held_out": bool(held[i]),
        }
        for i in range(len(points))
    ]
    result: dict[str, Any] = {**describe(fit), "dropped": 0, "points": rows}
    record: dict[str, Any] = {"versions": {"llamagen_dist": __version__, "numpy": np.__version__}}
    if resampled is not None:
        result |= parameter_intervals(fit, resampled)
        record["bootstrap"] = {"method": resampled.method, "seed": resampled.seed, "stationary": resampled.stationary}
    else:
        result["absent"] = {"ci95": refused}
    if held.any():
        result["predictions"] = _predictions(points, held, fit, resampled, ladder)
        result["prediction"] = result["predictions"][-1]
    result["curves"] = _curves(points, fit)
    best = [{k: v for k, v in vars(one).items() if v is not None} for one in _frontier(points, fit, ladder)]
    result["frontier"] = {"best": best}
    result["definitions"] = _definitions(ladder)
    result["record"] = record
    return result


def _held_out(points: Points, wanted: str | None) -> str | None:
    if wanted is None:
        return None
    if wanted == "largest":
        largest = {run for run, n in zip(points.runs, points.params, strict=True) if n == points.params.max()}
        if len(largest) > 1:
            raise UserError(
                f"hold-out largest: {len(largest)} runs have the largest size ({', '.join(sorted(largest)[:5])}); "
                "name one of them, or give their points one name in the column run"
            )
        return largest.pop()
    if wanted not in points.runs:
        raise UserError(f"hold-out {wanted!r}: no such run; there are {', '.join(sorted(set(points.runs))[:20])}")
    return wanted


def _params(points: Points, ladder: Ladder | None, i: int) -> float:
    return float(ladder.rung(points.runs[i]).params) if ladder else float(points.params[i])


def _predictions(
    points: Points, held: np.ndarray, fit: Fit, resampled: Bootstrap | None, ladder: Ladder | None
) -> list[dict[str, Any]]:
    """One per held-out point, fewest tokens first. naive: the next smaller run's loss after the same tokens."""
    predictions = []
    order = sorted(np.flatnonzero(held).tolist(), key=lambda i: points.tokens[i])
    smaller = points.params[(~held) & (points.params < points.params[held].max())]
    before = smaller.max() if len(smaller) else None
    for i in order:
        one = {
            "name": points.runs[i],
            "params": _params(points, ladder, i),
            "params_fit": float(points.params[i]),
            "tokens": float(points.tokens[i]),
            "predicted": float(fit.predict(points.params[i], points.tokens[i])),
            "measured": float(points.loss[i]),
        }
        same = np.flatnonzero((points.params == before) & (points.tokens == points.tokens[i]) & ~held)
        if len(same):
            one |= {"naive": float(points.loss[same[0]]), "naive_from": points.runs[same[0]]}
        if resampled is not None:
            low, high = resampled.band(fit, points.params[i : i + 1], points.tokens[i : i + 1])
            one |= {
                "ci95": [float(low[0]), float(high[0])],
                "inside": bool(low[0] <= points.loss[i] <= high[0]),
                "band": f"95% prediction band; {resampled.method}, with the scatter of the points",
            }
        predictions.append(one)
    return predictions


def _curves(points: Points, fit: Fit) -> list[dict[str, Any]]:
    """The law drawn over size, one line per token budget that several runs share (at most five)."""
    budgets = [t for t in np.unique(points.tokens) if (points.tokens == t).sum() > 1]
    if len(budgets) > 5:
        budgets = [budgets[i] for i in sorted({round(x) for x in np.linspace(0, len(budgets) - 1, 5)})]
    sizes = np.geomspace(points.params.min() / 1.3, points.params.max() * 2, _CURVE)
    return [{"tokens": float(t), "params_fit": sizes.tolist(), "loss": fit.predict(sizes, t).tolist()} for t in budgets]


def _frontier(points: Points, fit: Fit, ladder: Ladder | None) -> list[Best]:
    """Empty where the law lacks one of its two terms: then more of one thing is always best, which no run showed."""
    if len(fit.law.terms) < 2 or min(fit.params["A"], fit.params["B"]) == 0:
        return []
    if ladder is None:
        spent = 6 * points.params * points.tokens
        return closed_form(fit, np.geomspace(spent.min(), spent.max() * _BEYOND, _FRONTIER))
    rungs = [ladder.rung(run) for run in points.runs]
    spent = np.array([r.flops_per_image / r.config.image_tokens for r in rungs]) * points.tokens
    budgets = np.geomspace(spent.min(), spent.max() * _BEYOND, _FRONTIER)
    return over_shapes(fit, ladder.rungs[-1].config, budgets, ladder.count == "total")


def _definitions(ladder: Ladder | None) -> dict[str, str]:
    if ladder is None:
        given = "as given in the file"
        return {"params": given, "params_fit": given, "tokens": given, "loss": given, "flops": "6 params tokens"}
    return {
        "params": COUNTS["total"],
        "params_fit": f"N of the law: {COUNTS[ladder.count]}",
        "tokens": "D of the law: image tokens trained on, counted every time they were seen",
        "loss": "held-out loss, nats per token, with the true label, "
        + ("after the cooldown of the learning rate" if ladder.decayed else "at a constant learning rate"),
        "flops": "training FLOPs counted exactly: matrix products of blocks, causal attention and head, times three",
    }
