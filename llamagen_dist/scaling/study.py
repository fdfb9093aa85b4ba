"""A whole study as one JSON object: fit without the held-out run, predict it, compare, and follow the frontier."""

import hashlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np

from llamagen_dist import __version__
from llamagen_dist.errors import UserError
from llamagen_dist.scaling import diagnostics
from llamagen_dist.scaling.bootstrap import Bootstrap, attempt, interval, parameter_intervals
from llamagen_dist.scaling.fit import Fit, describe, fit_law, other_forms
from llamagen_dist.scaling.frontier import Best, closed_form, exponent, has_optimum, over_shapes
from llamagen_dist.scaling.ladder import COUNTS, Ladder
from llamagen_dist.scaling.points import Points

_CURVE = 24
_FRONTIER = 13
_BEYOND = 10.0  # the frontier ends at this multiple of the largest measured compute, and extrapolation begins
_RIVALS = ("chinchilla", "chinchilla_tied", "kaplan_nd")  # whose disagreement widens an extrapolated band


@dataclass(frozen=True)
class Options:
    form: str = "chinchilla"
    loss: str = "huber"
    delta: float | Literal["auto"] = 1e-3
    hold_out: str | None = None
    """``largest`` (every run of the largest size), the name of a run, or None."""
    tau: float = 0.1


def study(
    points: Points, options: Options, ladder: Ladder | None = None, dropped: Sequence[dict[str, str]] = ()
) -> dict[str, Any]:
    """ladder: where ``points`` came from, for exact FLOPs and counts; without it C = 6 N D. dropped: what was left out
    of what was read, for the record. Raises UserError."""
    apart = _held_out(points, options.hold_out)
    held = np.array([run in apart for run in points.runs])
    fit = fit_law(points.where(~held), options.form, options.loss, options.delta, options.tau)
    resampled, refused = attempt(fit)
    fitted = fit.at(points)
    rows = [
        {
            "name": points.runs[i],
            "params": _params(points, ladder, i),
            "params_fit": float(points.params[i]),
            "tokens": float(points.tokens[i]),
            "flops": float(points.flops[i]),
            **{name: float(values[i]) for name, values in fit.beside(points).items() if name != "flops"},
            "loss": float(points.loss[i]),
            "fitted": float(fitted[i]),
            "held_out": bool(held[i]),
        }
        for i in range(len(points))
    ]
    record = {
        "versions": {"llamagen_dist": __version__, "numpy": np.__version__},
        "metric": points.metric,
        "points_sha256": hashlib.sha256(repr(rows).encode()).hexdigest(),
    }
    result: dict[str, Any] = {**describe(fit), "dropped": list(dropped), "points": rows}
    if resampled is not None:
        result |= parameter_intervals(fit, resampled)
        record["bootstrap"] = {"method": resampled.method, "seed": resampled.seed, "stationary": resampled.stationary}
        result["diagnostics"] |= diagnostics.all_of(fit)
    else:
        result["absent"] = {"ci95": refused}
    if held.any():
        result["predictions"] = _predictions(points, held, fit, resampled, ladder)
        result["prediction"] = result["predictions"][-1]
    result["curves"] = _curves(points, fit)
    result["frontier"] = _frontier(points, fit, resampled, ladder)
    result["definitions"] = _definitions(ladder, points.metric)
    result["record"] = record
    return result


def _held_out(points: Points, wanted: str | None) -> set[str]:
    """The runs that are kept from the fit; ``largest``: all of the largest size, such as one for every seed."""
    if wanted is None:
        return set()
    if wanted == "largest":
        return {run for run, n in zip(points.runs, points.params, strict=True) if n == points.params.max()}
    if wanted not in points.runs:
        raise UserError(f"hold-out {wanted!r}: no such run; there are {', '.join(sorted(set(points.runs))[:20])}")
    return {wanted}


def _params(points: Points, ladder: Ladder | None, i: int) -> float:
    return float(ladder.rung(points.runs[i]).params) if ladder else float(points.params[i])


def _predictions(
    points: Points, held: np.ndarray, fit: Fit, resampled: Bootstrap | None, ladder: Ladder | None
) -> list[dict[str, Any]]:
    """One per held-out point, fewest tokens first. naive: the next smaller size's loss after the same tokens, the mean
    where several runs have it."""
    predictions = []
    order = sorted(np.flatnonzero(held).tolist(), key=lambda i: points.tokens[i])
    smaller = points.params[(~held) & (points.params < points.params[held].max())]
    before = smaller.max() if len(smaller) else None
    # only laws of the same columns are rivals
    others = [form for form in _RIVALS if form != fit.law.name] if fit.law.name in _RIVALS else []
    rivals = other_forms(fit, others, fit.points)
    for i in order:
        here = points.where(np.arange(len(points)) == i)
        measured = float(points.loss[i])
        one: dict[str, Any] = {
            "name": points.runs[i],
            "params": _params(points, ladder, i),
            "params_fit": float(points.params[i]),
            "tokens": float(points.tokens[i]),
            "predicted": float(fit.at(here)[0]),
            "measured": measured,
            "extrapolated": bool(points.flops[i] > _BEYOND * fit.points.flops.max()),
        }
        same = np.flatnonzero((points.params == before) & (points.tokens == points.tokens[i]) & ~held)
        if len(same):
            runs = points.runs[same[0]] if len(same) == 1 else f"the mean of {len(same)} runs of the next smaller size"
            one |= {"naive": float(points.loss[same].mean()), "naive_from": runs}
        if resampled is not None:
            ends = [float(end[0]) for end in resampled.band(fit, here.params, here.tokens, also=fit.beside(here))]
            band = f"95% prediction band; {resampled.method}, with the scatter of the points"
            if one["extrapolated"] and rivals:
                said = [float(rival.at(here)[0]) for rival in rivals.values()]
                ends = [min(ends[0], *said), max(ends[1], *said)]
                band += (
                    f", widened to what {', '.join(rivals)} say more than {_BEYOND:g} times beyond the largest compute"
                )
            one |= {"ci95": ends, "inside": ends[0] <= measured <= ends[1], "band": band}
        predictions.append(one)
    return predictions


def _curves(points: Points, fit: Fit) -> list[dict[str, Any]]:
    """The law drawn over size, one line per token budget that several runs share (at most five)."""
    if "val_loss" in fit.law.columns:
        return []
    budgets = [t for t in np.unique(points.tokens) if (points.tokens == t).sum() > 1]
    if len(budgets) > 5:
        budgets = [budgets[i] for i in sorted({round(x) for x in np.linspace(0, len(budgets) - 1, 5)})]
    sizes = np.geomspace(points.params.min() / 1.3, points.params.max() * 2, _CURVE)
    return [{"tokens": float(t), "params_fit": sizes.tolist(), "loss": fit.predict(sizes, t).tolist()} for t in budgets]


def _frontier(points: Points, fit: Fit, resampled: Bootstrap | None, ladder: Ladder | None) -> dict[str, Any]:
    """a of N* ~ C^a, and the best sizes over the measured compute and ten times more; without any where the law has
    no optimum."""
    best: list[Best] = []
    result: dict[str, Any] = {}
    if has_optimum(fit):
        result["exponent"] = float(exponent(fit, fit.theta[None])[0])
        if resampled is not None:
            result["exponent_ci95"] = interval(exponent(fit, resampled.theta))
        # without models to count by, the best sizes are those of C = 6 N D, whatever a table's column says
        spent = 6 * points.params * points.tokens if ladder is None else points.flops
        budgets = np.geomspace(spent.min(), spent.max() * _BEYOND, _FRONTIER)
        if ladder is None:
            best = closed_form(fit, budgets, resampled)
        else:
            best = over_shapes(fit, ladder.rungs[-1].config, budgets, ladder.count == "total", resampled)
    result["best"] = [{k: v for k, v in asdict(one).items() if v is not None} for one in best]
    return result


def _definitions(ladder: Ladder | None, metric: str) -> dict[str, str]:
    if ladder is None:
        given = "as given in the file"
        return {"params": given, "params_fit": given, "tokens": given, "loss": given, "flops": "6 params tokens"}
    return {
        "params": COUNTS["total"],
        "params_fit": f"N of the law: {COUNTS[ladder.count]}",
        "tokens": "D of the law: image tokens trained on, counted every time they were seen",
        "loss": (f"{metric} of metrics.jsonl, " if metric != "loss" else "held-out loss, nats per token, true label, ")
        + ("after the cooldown of the learning rate" if ladder.decayed else "at a constant learning rate")
        + (", of the moving average of the weights" if ladder.averaged else ""),
        "flops": "training FLOPs counted exactly: matrix products of blocks, causal attention and head, times three",
    }
