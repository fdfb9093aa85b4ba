"""IsoFLOP analysis: at each budget the best size by a parabola in log N, and how both grow with the budget.

Hoffmann et al. 2022, approach 2. A parabola is symmetric and the true valley is not, so N* comes out a few per cent off
(the exponent does not): Akima's and a cubic's lowest points, and a parametric law where one can be fitted, show by how
much.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from llamagen_dist.errors import UserError
from llamagen_dist.scaling.bootstrap import interval
from llamagen_dist.scaling.fit import fit_law
from llamagen_dist.scaling.laws import Floats
from llamagen_dist.scaling.points import Points
from llamagen_dist.scaling.valley import FEWEST, Valley, resampled, slope, valley

_SAME = 1.1  # neighbours in FLOPs closer than this belong to one budget ...
_WIDEST = 1.3  # ... which may not be wider than this


def isoflop(points: Points, at: Sequence[float] = ()) -> dict[str, Any]:
    """N*(C) and D*(C) with their exponents, as JSON-serialisable values.

    at: further budgets in FLOPs to extrapolate to. Raises UserError where fewer than two budgets have a valley.
    """
    groups, notes = _budgets(points)
    found: list[tuple[float, Valley, np.ndarray]] = []
    for members in groups:
        flops = float(np.exp(np.log(points.flops[members]).mean()))
        one = valley(np.log(points.params[members]), points.loss[members])
        if one.inside:
            found.append((flops, one, members))
        else:
            best = int(one.y.argmin())
            end = {0: "the smallest is best", len(one.y) - 1: "the largest is best"}.get(best, "they scatter too much")
            notes.append(f"{flops:.3g} FLOPs: no lowest point of a parabola between its sizes ({end}); left out")
    if len(found) < 2:
        raise UserError(
            f"isoflop needs two budgets of {FEWEST} sizes or more around a lowest loss, and there are {len(found)} "
            f"({'; '.join(notes[:3]) or 'all points have one budget'})"
        )
    log_c = np.log([flops for flops, _, _ in found])
    log_n = np.array([one.bottom for _, one, _ in found])
    log_d = np.array([_tokens_at(points, members, one.bottom) for _, one, members in found])
    laws = {"params": _line(log_c, log_n), "tokens": _line(log_c, log_d)}
    spread = _exponents(found, log_c)
    result: dict[str, Any] = {
        "budgets": [
            {
                "flops": flops,
                "sizes": len(members),
                "params": float(np.exp(one.bottom)),
                "tokens": float(np.exp(d)),
                "loss": one.floor,
                "checks": {name: float(np.exp(x)) for name, x in one.bottoms.items()},
            }
            for (flops, one, members), d in zip(found, log_d, strict=True)
        ],
        "exponents": {name: power for name, (power, _) in laws.items()},
        "at": [{"flops": c, **{name: _at(law, c) for name, law in laws.items()}} for c in at],
        "warnings": notes,
    }
    if spread is None:
        notes.append("no interval: too few sizes per budget to see how much the losses scatter")
    else:
        result["exponents_ci95"] = {"params": spread}
    result["parametric"] = _parametric(points, found[-1], at)
    notes += _bias(found, result["parametric"])
    return result


def _budgets(points: Points) -> tuple[list[np.ndarray], list[str]]:
    """Indices of the points of each budget with enough sizes, by FLOPs; and what was left out."""
    order = np.argsort(points.flops)
    steps = np.diff(np.log(points.flops[order]))
    groups, notes, lonely = [], [], 0
    for members in np.split(order, np.flatnonzero(steps > np.log(_SAME)) + 1):
        wide = points.flops[members].max() / points.flops[members].min()
        sizes = len(set(points.params[members]))
        if wide > _WIDEST:
            raise UserError(
                f"points from {points.flops[members].min():.3g} to {points.flops[members].max():.3g} FLOPs do not fall "
                "into budgets; isoflop needs several sizes trained with the same FLOPs (llamagen scaling ladder plans "
                "them), and llamagen scaling fit takes any points"
            )
        if sizes < len(members):
            raise UserError(
                f"{points.runs[members[0]]} and others at {points.flops[members[0]]:.3g} FLOPs: a size is there twice; "
                "average repeated runs first, or keep one of them"
            )
        if sizes < FEWEST:
            lonely += len(members)
        else:
            groups.append(members)
    if lonely:
        notes.append(f"{lonely} points belong to budgets of fewer than {FEWEST} sizes and were left out")
    return groups, notes


def _tokens_at(points: Points, members: np.ndarray, log_n: float) -> float:
    """log D at log N, along the budget's own points: no 6 N D is assumed."""
    order = members[np.argsort(points.params[members])]
    return float(np.interp(log_n, np.log(points.params[order]), np.log(points.tokens[order])))


def _line(x: Floats, y: Floats) -> tuple[float, float]:
    power, intercept = np.polyfit(x, y, 1)
    return float(power), float(intercept)


def _at(law: tuple[float, float], flops: float) -> float:
    return float(np.exp(law[1] + law[0] * np.log(flops)))


def _exponents(found: Sequence[tuple[float, Valley, np.ndarray]], log_c: Floats) -> list[float] | None:
    """95 % interval of the exponent of N*, by residuals of all parabolas drawn anew."""
    bottoms = resampled([one for _, one, _ in found])
    if bottoms is None:
        return None
    slopes = slope(log_c, bottoms)
    return interval(slopes[np.isfinite(slopes)])


def _parametric(points: Points, last: tuple[float, Valley, np.ndarray], at: Sequence[float]) -> dict[str, Any] | None:
    """What a Chinchilla law of the same points says of the largest budget; None where none can be fitted."""
    try:
        fit = fit_law(points, "chinchilla")
    except UserError:
        return None
    _, one, members = last
    log_n = np.linspace(one.x[0], one.x[-1], 2001)
    log_d = np.array([_tokens_at(points, members, x) for x in log_n])
    best = float(np.exp(log_n[fit.predict(np.exp(log_n), np.exp(log_d)).argmin()]))
    return {"form": "chinchilla", "params": best, "ratio": float(np.exp(one.bottom)) / best}


def _bias(found: Sequence[tuple[float, Valley, np.ndarray]], parametric: dict[str, Any] | None) -> list[str]:
    """Always something: noise-free data with a wide grid are off too."""
    _, one, _ = found[-1]
    span = float(np.exp((one.x[-1] - one.x[0]) / 2))
    others = [f"{name} {np.exp(x - one.bottom) - 1:+.1%}" for name, x in one.bottoms.items()]
    if parametric is not None:
        others.append(f"a Chinchilla law {1 / parametric['ratio'] - 1:+.1%}")
    return [
        f"a parabola is symmetric and the valley is not: N* is biased by some per cent, more with a wider grid (here x "
        f"{span:.3g} each way), the exponent hardly; against it at the largest budget: {', '.join(others) or 'nothing'}"
    ]
