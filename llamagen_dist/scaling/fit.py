"""fit_law: the parameters of a scaling law at the optimum of a stated objective, checked to be one."""

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

from llamagen_dist.errors import UserError
from llamagen_dist.scaling import solve
from llamagen_dist.scaling.laws import LAWS, Floats, Law, evaluate, predict
from llamagen_dist.scaling.likelihood import Loss, loss_of
from llamagen_dist.scaling.points import Points
from llamagen_dist.scaling.refusals import check_identifiable, rising

AUTO = 1.345
"""``auto``: delta is this many standard deviations of the residuals, where Huber's estimate has 95% of the efficiency
of least squares under normal noise (Huber 1981); their standard deviation is 1.4826 times the median of |residuals|."""
_ILL = 1e5  # condition of the scaled Jacobian above which parameters mean little
_SMOOTH = 1e-4  # delta that stands for an absolute value until the last step


@dataclass(frozen=True, eq=False)
class Fit:
    """A fitted law.

    objective: the sum over points of the loss of log residuals. theta [k]: coefficients and shapes with features
    measured from centre and y in units of exp(level). stationarity: projected gradient relative to what it sums
    (0 at an optimum). condition: of the Jacobian with unit columns. at_bound: parameters at a bound of the search,
    such as an E of zero. optima: how many different local optima the starts led to. rising: features along which y
    grows, against what every law here can say.
    """

    law: Law
    how: Loss
    params: dict[str, float]
    objective: float
    stationarity: float
    condition: float
    at_bound: tuple[str, ...]
    optima: int
    rising: tuple[str, ...]
    residuals: Floats
    theta: Floats
    centre: Floats
    level: float
    points: Points
    warnings: tuple[str, ...]

    @property
    def loss(self) -> str:
        return self.how.kind

    @property
    def delta(self) -> float:
        return self.how.delta

    @property
    def log_likelihood(self) -> float:
        return self.how.log_likelihood(self.objective, len(self.points))

    @property
    def smooth(self) -> float:
        """delta of batched refits, which take a parabola narrower than the scatter for an absolute value."""
        return self.how.delta or max(_SMOOTH, 0.2 * _scatter(self.residuals))

    def in_units(self, theta: Floats) -> dict[str, Floats]:
        """Parameters [r] by name in the points' own units, from theta [r, k]."""
        return self.law.in_units(theta, self.centre, self.level)

    def problem(self, target: Floats | None = None, weights: Floats | None = None) -> solve.Problem:
        """The optimisation problem of these points; other centred log losses or weights [r, n] make a batch of it."""
        own = _problem(self.points, self.law, self.how, self.centre, self.level)
        return replace(
            own, target=own.target if target is None else target, weights=own.weights if weights is None else weights
        )

    def refit(self, problem: solve.Problem, rows: int, delta: float | None = None) -> Floats:
        """theta [rows, k] of a batch whose optima are near this fit's; absolute values are smoothed."""
        delta = self.smooth if delta is None else delta
        theta = np.tile(self.theta, (rows, 1))
        terms = len(self.law.terms)
        theta[:, :terms] = np.maximum(theta[:, :terms], 0.02)  # from zero itself none would rise
        if delta < 1e-2:  # first a wider delta, where the loss is smoother
            theta = solve.newton(problem, theta, 1e-2, 40)
        return solve.newton(problem, theta, delta, 200)

    def predict(self, params: Floats | float, tokens: Floats | float, **also: Floats | float) -> Floats:
        """y at (params, tokens), which broadcast; in the units of the points' loss.

        also: ``flops`` (without them 6 N D), ``unique`` tokens (without them all are) and ``val_loss``, for the laws
        that have them.
        """
        return self.predict_with(self.theta[None], params, tokens, **also)[0]

    def at(self, points: Points) -> Floats:
        """y [n] by the law where ``points`` are."""
        return self.predict(points.params, points.tokens, **self.beside(points))

    def beside(self, points: Points) -> dict[str, Floats]:
        """What the law needs to know of ``points`` beside params and tokens."""
        return {name: values for name, values in points.also.items() if name in self.law.columns}

    def predict_with(
        self, theta: Floats, params: Floats | float, tokens: Floats | float, **also: Floats | float
    ) -> Floats:
        """The same for many parameter sets [r, k] -> [r, ...]."""
        values = {
            "params": params,
            "tokens": tokens,
            "flops": 6.0 * np.asarray(params) * tokens,
            "unique": tokens,
            **also,
        }
        names = [name for name in values if name in self.law.columns]
        arrays = np.broadcast_arrays(*(np.asarray(values[name], float) for name in names))
        x = self.law.x({name: a.ravel() for name, a in zip(names, arrays, strict=True)}) - self.centre
        return np.exp(self.level + predict(self.law, x, theta)).reshape(len(theta), *arrays[0].shape)


def columns_of(points: Points, law: Law) -> dict[str, Floats]:
    """The columns that ``law`` needs. Raises UserError for one that the points do not have."""
    known = {"params": points.params, "tokens": points.tokens, **points.also}
    if "flops" in law.columns:
        known["flops"] = points.flops
    for name in law.columns:
        if name == "val_loss" and name not in known:
            raise UserError(
                f"form {law.name} is a metric as a function of the held-out loss: name the metric with --metric, of "
                "runs (or a table) that have both"
            )
        if name not in known:
            raise UserError(f"form {law.name} needs the column {name} of every point; add it, or fit another form")
        if not np.isfinite(known[name]).all():
            raise UserError(f"form {law.name} needs the column {name} of every point, and some have none; add them")
    return known


def _problem(points: Points, law: Law, how: Loss, centre: Floats, level: float) -> solve.Problem:
    x = law.x(columns_of(points, law)) - centre
    target, weights = np.log(points.loss)[None] - level, np.ones((1, len(points)))
    return solve.Problem(law, x, target, weights, *solve.bounds(law, x), how.sides)


def law_named(form: str) -> Law:
    """Raises UserError."""
    if form not in LAWS:
        raise UserError(f"form {form!r} is unknown; there are {', '.join(LAWS)}")
    return LAWS[form]


def fit_law(
    points: Points,
    form: str = "chinchilla",
    loss: str = "huber",
    delta: float | Literal["auto"] = 1e-3,
    tau: float = 0.1,
) -> Fit:
    """Minimise sum huber_delta(log y - log L(N, D)) (Hoffmann et al. 2022, eq. 3), or another loss of it.

    form: a name of LAWS. loss: ``huber``; ``l2``; ``lad``, absolute values; ``pinball``, the quantile ``tau``.
    delta: where huber turns linear; ``auto`` for what suits the scatter.
    Deterministic. Raises UserError (refusals) where the form, or the points, cannot give a law: too few, one size only,
    sizes and tokens in lockstep, a loss that does not change. Raises ArithmeticError if no optimum was reached (a bug).
    """
    law = law_named(form)
    how = loss_of(loss, 1e-3 if delta == "auto" else float(delta), tau)
    features = law.x(columns_of(points, law))
    check_identifiable(points, law, features)
    # Around the means of log N, log D and log loss all unknowns are of order one, whatever the units, and a coefficient
    # and its exponent are nearly independent: without it, moving alpha by 0.01 moves A by a fifth at N = 10^8.
    centre, level = law.centre(features), float(np.log(points.loss).mean())
    problem = _problem(points, law, how, centre, level)
    x, target = problem.x, problem.target
    theta, slope, optima = _optimum(problem, how)
    if delta == "auto" and loss == "huber":
        how = loss_of(loss, max(AUTO * _scatter(target - predict(law, x, theta[None])), 1e-6), tau)
        theta, slope, optima = _optimum(problem, how)
    if slope > solve.STATIONARY:
        raise ArithmeticError(
            f"the fit of {form} stopped where the objective still falls (relative gradient {slope:g})"
        )
    params = {name: float(values[0]) for name, values in law.in_units(theta[None], centre, level).items()}
    if not np.isfinite(list(params.values())).all():
        raise UserError(f"the parameters of {form} leave the range of numbers; give params and tokens in larger units")
    condition = _condition(problem, theta)
    bound = tuple(name for i, name in enumerate(law.names) if not problem.low[0, i] < theta[i] < problem.high[0, i])
    grows = tuple(f for f, up in zip(law.features, rising(x, target[0]), strict=True) if up and f != "U")
    return Fit(
        law=law,
        how=how,
        params=params,
        objective=float(solve.objective(problem, theta[None], how.delta)[0]),
        stationarity=slope,
        condition=condition,
        at_bound=bound,
        optima=optima,
        rising=grows,
        residuals=(target - predict(law, x, theta[None]))[0],
        theta=theta,
        centre=centre,
        level=level,
        points=points,
        warnings=_warnings(condition, bound, grows, law),
    )


def other_forms(fit: Fit, forms: Sequence[str], points: Points) -> dict[str, Fit]:
    """``points`` under those of ``forms`` that can be fitted, with the loss of ``fit``: far from the points they
    disagree more than resamples of one do."""
    fits = {}
    for form in forms:
        with suppress(UserError):
            fits[form] = fit_law(points, form, fit.loss, fit.delta)
    return fits


def _scatter(residuals: Floats) -> float:
    """Their standard deviation, if they were normal, from the median, which outliers do not move."""
    return 1.4826 * float(np.median(np.abs(residuals)))


def _optimum(problem: solve.Problem, how: Loss) -> tuple[Floats, float, int]:
    """theta [k], its stationarity, and how many different optima the starts led to."""
    smooth = how.delta or _SMOOTH
    ends = solve.minimise(problem, solve.starts(problem, smooth), smooth)
    values = solve.objective(problem, ends, smooth)
    # The objective is not convex: from several starts, the lowest end is kept, and it has to be a stationary point.
    theta = ends[values.argmin()]
    ordered = np.sort(values)
    optima = 1 + int((np.diff(ordered) > 1e-6 * abs(ordered[0]) + 1e-12).sum())
    if how.delta == 0:
        theta, slope = solve.on_kinks(problem, theta)
    else:
        slope = float(solve.stationarity(problem, theta[None], how.delta)[0])
    return theta, slope, optima


def _condition(problem: solve.Problem, theta: Floats) -> float:
    """Of the Jacobian of log L with unit columns, without coefficients at zero and what hangs on them."""
    jacobian = evaluate(problem.law, problem.x, theta[None]).gradient[0]
    lengths = np.sqrt((jacobian**2).sum(axis=0))
    free = (lengths > 0) & ~((theta == 0) & (np.arange(len(lengths)) < len(problem.law.terms)))
    return float(np.linalg.cond(jacobian[:, free] / lengths[free]))


def _warnings(condition: float, bound: tuple[str, ...], grows: tuple[str, ...], law: Law) -> tuple[str, ...]:
    warnings = []
    if grows:
        warnings.append(
            f"the loss rises with {' and '.join(grows)}, and no law here can: look for runs that diverged, stopped "
            "early or saw too few data; no optimal size follows from this fit"
        )
    if condition > _ILL:
        warnings.append(
            f"the points hardly tell the parameters of {law.name} apart (condition {condition:.1e}): predictions near "
            "the points can be used, the parameters themselves cannot"
        )
    zero = [name for name in bound if name in law.coefficients]
    if zero:
        warnings.append(f"{' and '.join(zero)} came out as zero: the points do not show that term")
    edge = [name for name in bound if name not in law.coefficients]
    if edge:
        warnings.append(f"{' and '.join(edge)} ended at a bound of the search: the points do not determine it")
    return tuple(warnings)


def describe(fit: Fit) -> dict[str, Any]:
    """The fit as JSON-serialisable values."""
    return {
        "form": fit.law.name,
        "formula": fit.law.formula,
        "loss": fit.how.kind,
        "delta": fit.how.delta if fit.how.kind == "huber" else None,
        "objective": fit.objective,
        "params": fit.params,
        "n": len(fit.points),
        "diagnostics": {
            "stationarity": fit.stationarity,
            "condition": fit.condition,
            "at_bound": list(fit.at_bound),
            "local_optima": fit.optima,
            "rising": list(fit.rising),
            "runs": len(set(fit.points.runs)),
            "rms_log_residual": float(np.sqrt((fit.residuals**2).mean())),
            "warnings": list(fit.warnings),
        },
    }
