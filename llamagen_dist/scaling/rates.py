"""Learning rates: the best one per width, whether it moves with the width, and which runs are far from it."""

from typing import Any

import numpy as np

from llamagen_dist.errors import UserError
from llamagen_dist.scaling.bootstrap import interval
from llamagen_dist.scaling.points import Points
from llamagen_dist.scaling.valley import FEWEST, Valley, resampled, slope, valley

FAR = 2.0
"""A rate off by more than this factor is flagged: its run says more about the rate than about the size."""
_SLOPES = {"muP": 0.0, "standard parametrisation": -1.0}


def best_rates(points: Points, check: Points | None = None) -> dict[str, Any]:
    """lr*(width) of a sweep over learning rates, as JSON-serialisable values.

    points: with ``lr`` and ``width`` among ``also``; of each run the longest training that all runs of its width have.
    check: runs to compare with it, with the same columns.
    Raises UserError: no rates or widths, no width with enough rates.
    """
    _needs(points)
    valleys: dict[float, Valley] = {}
    notes = []
    for width in np.unique(points.also["width"]):
        chosen = _comparable(points, points.also["width"] == width)
        rates = np.log2(points.also["lr"][chosen])
        if len(set(rates)) < len(rates):
            raise UserError(f"width {width:g}: two runs have the same learning rate; average them, or keep one")
        if len(rates) < FEWEST:
            notes.append(
                f"width {width:g}: {len(rates)} rates are too few for a parabola, left out; {FEWEST} are enough"
            )
            continue
        one = valley(rates, np.log(points.loss[chosen]))
        if one.inside:
            valleys[float(width)] = one
        else:
            end = "lowest" if one.y.argmin() == 0 else "highest"
            notes.append(f"width {width:g}: its {end} rate is best, so lr* lies beyond; left out, add rates there")
    if not valleys:
        raise UserError(f"no width has a best learning rate between {FEWEST} or more others ({'; '.join(notes)})")
    drawn = resampled(list(valleys.values()))
    if drawn is not None:
        drawn = drawn[np.isfinite(drawn).all(axis=1)]
    result: dict[str, Any] = {
        "widths": [
            {"width": width, "rates": len(one.x), "lr": float(2**one.bottom), "loss": float(np.exp(one.floor))}
            for width, one in valleys.items()
        ],
        "warnings": notes,
    }
    if drawn is not None:
        for row, column in zip(result["widths"], drawn.T, strict=True):
            row["ci95"] = [float(2**x) for x in interval(column)]
    else:
        notes.append("no interval: too few rates to see how much the losses scatter")
    log_width = np.log2(list(valleys))
    moves = slope(log_width, np.array([[one.bottom for one in valleys.values()]]))[0] if len(valleys) > 1 else 0.0
    if len(valleys) > 1:
        result["slope"] = {"value": float(moves)}
        if drawn is not None:
            low, high = interval(slope(log_width, drawn))
            kept = [name for name, value in _SLOPES.items() if low <= value <= high]
            result["slope"] |= {"ci95": [low, high], "agrees_with": kept}
    else:
        notes.append("one width says nothing about transfer to another")
    if check is not None:
        result["checked"] = _checked(check, valleys, float(moves))
        far = [row["run"] for row in result["checked"] if row["flagged"]]
        if far:
            notes.append(f"{len(far)} runs are more than {FAR:g} x off lr*: {', '.join(far[:6])}")
    return result


def _needs(points: Points) -> None:
    for name, hint in (("lr", "lr or learning_rate"), ("width", "width, dim or d_model")):
        if name not in points.also or not np.isfinite(points.also[name]).all():
            raise UserError(f"the runs do not all say their {name}; a table needs a column {hint}")


def _comparable(points: Points, chosen: np.ndarray) -> np.ndarray:
    """Indices among ``chosen``: one of each run, after the most tokens that all of them have."""
    of_run = {run: {points.tokens[i] for i in np.flatnonzero(chosen) if points.runs[i] == run} for run in points.runs}
    shared = set.intersection(*(tokens for tokens in of_run.values() if tokens))
    if not shared:
        raise UserError("runs of one width were measured after different numbers of tokens, which cannot be compared")
    return np.flatnonzero(chosen & (points.tokens == max(shared)))


def _checked(check: Points, valleys: dict[float, Valley], moves: float) -> list[dict[str, Any]]:
    """Each run once: lr / lr* at its width, and the loss that this costs by the parabolas' curvature."""
    _needs(check)
    log_width, bottoms = np.log2(list(valleys)), np.array([one.bottom for one in valleys.values()])
    curvature = float(np.mean([one.curvature for one in valleys.values()]))
    rows = []
    for run in dict.fromkeys(check.runs):
        i = check.runs.index(run)
        expected = bottoms.mean() + moves * (np.log2(check.also["width"][i]) - log_width.mean())
        off = float(np.log2(check.also["lr"][i]) - expected)
        excess = float(check.loss[i] * -np.expm1(-curvature * off**2))
        row = {"run": run, "lr": float(check.also["lr"][i]), "best": float(2**expected), "factor": float(2**off)}
        rows.append({**row, "excess_loss": excess, "flagged": abs(off) > np.log2(FAR)})
    return rows
