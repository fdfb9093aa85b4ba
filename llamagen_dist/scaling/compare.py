"""Several forms on the same points: information criteria, and how far off each is on large runs it did not see."""

from collections.abc import Sequence
from contextlib import suppress
from typing import Any, Literal

import numpy as np

from llamagen_dist.errors import UserError
from llamagen_dist.scaling.bootstrap import bootstrap
from llamagen_dist.scaling.fit import Fit, fit_law, law_named
from llamagen_dist.scaling.points import Points

REPLICATES = 200  # of each band; a coverage over a few points needs no more
_SHARES = (0.1, 0.2, 0.35)  # of the points, most compute first, that are held out
_SIZES = (1, 2)  # largest sizes that are held out
CRITERIA = {"aic": "AIC", "aicc": "AICc", "bic": "BIC"}


def compare(
    points: Points, forms: Sequence[str], loss: str = "huber", delta: float | Literal["auto"] = 1e-3, tau: float = 0.1
) -> dict[str, Any]:
    """Forms as JSON-serialisable rows with criteria and held-out errors, their ranks, and whether the two agree.

    Raises UserError where a form is unknown, or fewer than two can be fitted.
    """
    for form in sorted(forms, key=lambda form: -law_named(form).k):
        if delta == "auto":  # one likelihood for all: that of the form with most parameters
            with suppress(UserError):
                delta = fit_law(points, form, loss, delta, tau).delta
    delta = 1e-3 if delta == "auto" else delta
    rows: list[dict[str, Any]] = []
    refused: dict[str, str] = {}
    for form in dict.fromkeys(forms):
        law_named(form)
        try:
            fit = fit_law(points, form, loss, delta, tau)
        except UserError as error:
            refused[form] = str(error)
            continue
        held = [_held_out(points, cut, keep, form, loss, delta, tau) for cut, keep in _cuts(points)]
        rows.append({"form": form, "k": fit.law.k, "objective": fit.objective, **criteria(fit), "held_out": held})
    if len(rows) < 2:
        reasons = "; ".join(f"{form}: {why}" for form, why in refused.items())
        raise UserError(f"a comparison needs two forms that can be fitted{': ' if reasons else ''}{reasons}")
    return {
        "loss": loss,
        "delta": delta if loss == "huber" else None,
        "n": len(points),
        "forms": rows,
        "refused": refused,
        **_ranked(rows),
    }


def criteria(fit: Fit) -> dict[str, float | None]:
    """AIC, AICc (None where the points are too few for it) and BIC, with the likelihood of the fit's own loss, whose
    scale counts as a parameter."""
    n, k, twice = len(fit.points), fit.law.k + 1, -2 * fit.log_likelihood
    aic = twice + 2 * k
    corrected = aic + 2 * k * (k + 1) / (n - k - 1) if n > k + 1 else None
    return {"log_likelihood": fit.log_likelihood, "aic": aic, "aicc": corrected, "bic": twice + k * float(np.log(n))}


def _cuts(points: Points) -> list[tuple[str, np.ndarray]]:
    """What is held out, and which points are kept [n]: the largest sizes, then the points of most compute."""
    cuts: list[tuple[str, np.ndarray]] = []
    sizes = np.unique(points.params)
    for count in _SIZES:
        if count < len(sizes):
            cuts.append((f"N >= {sizes[-count]:.3g}", points.params < sizes[-count]))
    spent = np.sort(points.flops)
    for share in _SHARES:
        first = spent[-max(1, round(share * len(spent)))]
        if not any((keep == (points.flops < first)).all() for _, keep in cuts):
            cuts.append((f"C >= {first:.3g}", points.flops < first))
    return [(name, keep) for name, keep in cuts if keep.any()]


def _held_out(
    points: Points, cut: str, keep: np.ndarray, form: str, loss: str, delta: float, tau: float
) -> dict[str, Any]:
    """Relative errors on the points that were not kept: their mean (predicted too high is positive), the mean of their
    absolute values, and the share inside the 95% band."""
    rest = points.where(~keep)
    found: dict[str, Any] = {"cut": cut, "fitted": int(keep.sum()), "held_out": len(rest)}
    try:
        fit = fit_law(points.where(keep), form, loss, delta, tau)
    except UserError as refusal:
        return found | {"refused": str(refusal)}
    error = fit.at(rest) / rest.loss - 1
    found |= {"error": float(error.mean()), "absolute_error": float(np.abs(error).mean())}
    try:
        low, high = bootstrap(fit, REPLICATES).band(fit, rest.params, rest.tokens, also=fit.beside(rest))
    except UserError as refusal:
        return found | {"no_band": str(refusal)}
    return found | {"coverage": float(((low <= rest.loss) & (rest.loss <= high)).mean())}


def _ranked(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Ranks from 1 by each criterion and by the absolute error over the cuts that all forms could be fitted to."""
    cuts = [[row["held_out"][i].get("absolute_error") for row in rows] for i in range(len(rows[0]["held_out"]))]
    shared = [errors for errors in cuts if None not in errors]
    scores: dict[str, list[Any]] = {name: [row[name] for row in rows] for name in CRITERIA}
    if shared:
        scores["held_out"] = np.mean(shared, axis=0).tolist()
    ranks = {
        name: {rows[i]["form"]: rank + 1 for rank, i in enumerate(np.argsort(values, kind="stable").tolist())}
        for name, values in scores.items()
        if None not in values
    }
    first = {name: next(form for form, rank in of.items() if rank == 1) for name, of in ranks.items()}
    by = "aicc" if "aicc" in first else "aic"
    name, chosen = CRITERIA[by], first[by]
    if "held_out" not in first:
        verdict = "too few points to hold any out: only the criteria are known"
    elif chosen == first["held_out"]:
        verdict = f"{chosen} is first by {name} and on the runs held out"
    else:
        verdict = (
            f"they disagree: {name} prefers {chosen}, the runs held out {first['held_out']}; for larger models "
            "trust the second, for the measured range the first"
        )
    return {"ranks": ranks, "agree": first.get("held_out") == chosen, "verdict": verdict}
