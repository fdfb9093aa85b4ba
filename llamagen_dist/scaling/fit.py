"""fit_law: the parameters of a scaling law at the optimum of a stated objective, checked to be one."""

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from llamagen_dist.errors import UserError
from llamagen_dist.scaling import solve
from llamagen_dist.scaling.laws import LAWS, Floats, Law, evaluate
from llamagen_dist.scaling.points import Points

Loss = Literal["huber", "l2"]
_ILL = 1e5  # condition of the scaled Jacobian above which parameters mean little


@dataclass(frozen=True, eq=False)
class Fit:
    """A fitted law.

    objective: the sum over points of the loss of log residuals. theta [k]: coefficients and exponents at N and D in
    units of exp(centre) and loss in units of exp(level). stationarity: projected gradient relative to what it sums
    (0 at an optimum). condition: of the Jacobian with unit columns. at_bound: parameters at a bound of the search,
    such as an E of zero. optima: how many different local optima the starts led to.
    """

    law: Law
    loss: Loss
    delta: float
    params: dict[str, float]
    objective: float
    stationarity: float
    condition: float
    at_bound: tuple[str, ...]
    optima: int
    residuals: Floats
    theta: Floats
    centre: Floats
    level: float
    points: Points
    warnings: tuple[str, ...]

    def in_units(self, theta: Floats) -> dict[str, float]:
        """Parameters by name in the points' own units, from theta [k]."""
        return _parameters(self.law, theta, self.centre, self.level)

    def problem(self, target: Floats | None = None, weights: Floats | None = None) -> solve.Problem:
        """The optimisation problem of these points; other centred log losses or weights [r, n] make a batch of it."""
        logs = self.law.logs(self.points.params, self.points.tokens) - self.centre
        own = np.log(self.points.loss)[None] - self.level
        ones = np.ones((1, len(self.points)))
        return solve.Problem(self.law, logs, own if target is None else target, ones if weights is None else weights)

    def predict(self, params: Floats | float, tokens: Floats | float) -> Floats:
        """Loss at (params, tokens), which broadcast; in the units of the points' loss."""
        return self.predict_with(self.theta[None], params, tokens)[0]

    def predict_with(self, theta: Floats, params: Floats | float, tokens: Floats | float) -> Floats:
        """The same for many parameter sets [r, k] -> [r, ...]."""
        n, d = np.broadcast_arrays(np.asarray(params, float), np.asarray(tokens, float))
        logs = self.law.logs(n.ravel(), d.ravel()) - self.centre
        return np.exp(self.level + evaluate(self.law, logs, theta)[0]).reshape(len(theta), *n.shape)


def fit_law(points: Points, form: str = "chinchilla", loss: Loss = "huber", delta: float = 1e-3) -> Fit:
    """Minimise sum huber_delta(log loss - log L(N, D)) (Hoffmann et al. 2022, eq. 3); ``loss="l2"``: the squares.

    Deterministic. Raises UserError where the form, or the points, cannot give a law: too few, one size only, sizes
    and tokens in lockstep, or a loss that does not change. Raises ArithmeticError if no optimum was reached (a bug).
    """
    law = _law(form)
    if loss not in ("huber", "l2"):
        raise UserError(f"loss {loss!r} is unknown; use huber or l2")
    if not (np.isfinite(delta) and delta > 0):
        raise UserError(f"delta {delta:g}: give a positive number, such as 1e-3")
    delta = float("inf") if loss == "l2" else float(delta)
    check_identifiable(points, law)
    # Around the means of log N, log D and log loss all unknowns are of order one, whatever the units, and a coefficient
    # and its exponent are nearly independent: without it, moving alpha by 0.01 moves A by a fifth at N = 10^8.
    logs = law.logs(points.params, points.tokens)
    centre = logs.mean(axis=0)
    level = float(np.log(points.loss).mean())
    problem = solve.Problem(law, logs - centre, np.log(points.loss)[None] - level, np.ones((1, len(points))))
    optima = solve.minimise(problem, solve.starts(problem, delta), delta)
    values = solve.objective(problem, optima, delta)
    # The objective is not convex: from several starts, the lowest end is kept, and it has to be a stationary point.
    best = int(values.argmin())
    theta = optima[best : best + 1]
    slope = float(solve.stationarity(problem, theta, delta)[0])
    if slope > solve.STATIONARY:
        raise ArithmeticError(
            f"the fit of {form} stopped where the objective still falls (relative gradient {slope:g})"
        )
    parameters = _parameters(law, theta[0], centre, level)
    if not np.isfinite(list(parameters.values())).all():
        raise UserError(f"the parameters of {form} leave the range of numbers; give params and tokens in larger units")
    condition = _condition(problem, theta)
    low, high = problem.bounds()
    bound = tuple(name for i, name in enumerate(law.names) if theta[0, i] <= low[i] or theta[0, i] >= high[i])
    return Fit(
        law=law,
        loss=loss,
        delta=delta,
        params=parameters,
        objective=float(values[best]),
        stationarity=slope,
        condition=condition,
        at_bound=bound,
        optima=_distinct(values),
        residuals=(problem.target - evaluate(law, problem.logs, theta)[0])[0],
        theta=theta[0],
        centre=centre,
        level=level,
        points=points,
        warnings=_warnings(condition, bound, law),
    )


def _law(form: str) -> Law:
    if form not in LAWS:
        raise UserError(f"form {form!r} is unknown; there are {', '.join(LAWS)}")
    return LAWS[form]


def check_identifiable(points: Points, law: Law) -> None:
    """Raises UserError if no fit of ``law`` to ``points`` could mean anything."""
    n = len(points)
    if n <= law.k:
        raise UserError(
            f"{n} points are too few for {law.name}, which has {law.k} parameters: at least {law.k + 1} are needed, "
            f"and {law.k + 3} for a confidence interval"
        )
    logs = law.logs(points.params, points.tokens)
    for i, (coefficient, variable, exponent) in enumerate(law.terms):
        if np.ptp(logs[:, i]) < 1e-9:
            other = "power_irr_tokens" if variable == "params" else "power_irr"
            hint = f"; fit {other} instead" if len(law.terms) > 1 else ""
            raise UserError(
                f"every point has the same {variable}, so {coefficient} and {law.exponents[exponent]} of {law.name} "
                f"cannot be told from E{hint}"
            )
    if len(law.terms) == 2:  # 1 - r^2 of the two logs: at 0 one is a function of the other
        x, y = (logs[:, i] - logs[:, i].mean() for i in range(2))
        if 1 - (x @ y) ** 2 / ((x @ x) * (y @ y)) < 1e-9:
            raise UserError(
                "params and tokens move in lockstep (as with a fixed number of tokens per parameter), so their terms "
                "cannot be told apart; vary them independently, or fit power_irr"
            )
    if np.ptp(np.log(points.loss)) < 1e-9:
        raise UserError("the loss is the same at every point; there is nothing to fit")


def _parameters(law: Law, theta: Floats, centre: Floats, level: float) -> dict[str, float]:
    """In the caller's units: c (x / e^centre)^-a is c e^(a centre) / x^a."""
    values = dict(zip(law.names, (float(value) for value in theta), strict=True))
    for (coefficient, _, exponent), middle in zip(law.terms, centre, strict=True):
        values[coefficient] *= float(np.exp(level + values[law.exponents[exponent]] * middle))
    return {**values, "E": values["E"] * float(np.exp(level))}


def _condition(problem: solve.Problem, theta: Floats) -> float:
    """Of the Jacobian of log L with unit columns, without coefficients at zero and what hangs on them."""
    jacobian = evaluate(problem.law, problem.logs, theta)[1][0]
    lengths = np.sqrt((jacobian**2).sum(axis=0))
    free = (lengths > 0) & ~((theta[0] == 0) & (np.arange(len(lengths)) < len(problem.law.coefficients)))
    return float(np.linalg.cond(jacobian[:, free] / lengths[free]))


def _distinct(values: Floats) -> int:
    """How many different objective values the starts ended at, to 1e-6 of the best."""
    ordered = np.sort(values)
    return 1 + int((np.diff(ordered) > 1e-6 * abs(ordered[0]) + 1e-12).sum())


def _warnings(condition: float, bound: tuple[str, ...], law: Law) -> tuple[str, ...]:
    warnings = []
    if condition > _ILL:
        warnings.append(
            f"the points hardly tell the parameters of {law.name} apart (condition {condition:.1e}): predictions near "
            "the points can be used, the parameters themselves cannot"
        )
    zero = [name for name in bound if name in law.coefficients]
    if zero:
        warnings.append(f"{' and '.join(zero)} came out as zero: the points do not show that term")
    edge = [name for name in bound if name in law.exponents]
    if edge:
        warnings.append(f"{' and '.join(edge)} ended at a bound of the search {solve.EXPONENTS}: the form does not fit")
    return tuple(warnings)


def describe(fit: Fit) -> dict[str, Any]:
    """The fit as JSON-serialisable values."""
    return {
        "form": fit.law.name,
        "formula": fit.law.formula,
        "loss": fit.loss,
        "delta": fit.delta if fit.loss == "huber" else None,
        "objective": fit.objective,
        "params": fit.params,
        "n": len(fit.points),
        "diagnostics": {
            "stationarity": fit.stationarity,
            "condition": fit.condition,
            "at_bound": list(fit.at_bound),
            "local_optima": fit.optima,
            "runs": len(set(fit.points.runs)),
            "rms_log_residual": float(np.sqrt((fit.residuals**2).mean())),
            "warnings": list(fit.warnings),
        },
    }
