"""The optimiser of the laws: variable projection for starts, then a bounded semismooth Newton method, all batched.

A Huber loss with a small delta is nearly an absolute value, so quasi-Newton searches from many random starts often
end early; here every start comes from an exact linear fit per choice of exponents, delta shrinks in steps, and the
Hessian is exact. A batch is many starts on one data set, or many resampled data sets from one start. Absolute values
themselves (lad, pinball) have their optimum on kinks, where Newton's method stalls: ``on_kinks`` ends those fits.
"""

from dataclasses import dataclass, replace
from itertools import combinations, product

import numpy as np
from numpy.typing import NDArray

from llamagen_dist.scaling.laws import Floats, Law, evaluate, factors, predict

STATIONARY = 1e-5  # relative size of a gradient that counts as none
_NEAR = 1e-7  # so close above a bound, and pushed towards it, an unknown is put on it
_PATIENCE = (4, 16)  # failed steps before the touching parabolas are tried, in turns: their steps can be tiny
_CONTINUATION = (3e-2, 1e-2, 3e-3)


@dataclass(frozen=True)
class Problem:
    """Data for r fits at once. x [n, f] and target = log y [r or 1, n], both centred; weights [r or 1, n].

    Unknowns theta [r, k]: coefficients (in units of the centred y), then shapes, between low and high [r or 1, k].
    sides: factors of the loss above and below the law; unequal for a quantile.
    """

    law: Law
    x: Floats
    target: Floats
    weights: Floats
    low: Floats
    high: Floats
    sides: tuple[float, float] = (1.0, 1.0)

    def rows(self, chosen: NDArray[np.int64]) -> "Problem":
        parts = {name: getattr(self, name) for name in ("target", "weights", "low", "high")}
        return replace(self, **{name: a if len(a) == 1 else a[chosen] for name, a in parts.items()})

    def side(self, residual: Floats) -> Floats:
        return self.weights * np.where(residual > 0, *self.sides)


def bounds(law: Law, x: Floats) -> tuple[Floats, Floats]:
    """Of theta, [1, k] each."""
    ranges, terms = law.ranges(x), len(law.terms)
    low = np.array([[0.0] * terms + [r.low for r in ranges]])
    return low, np.array([[np.inf] * terms + [r.high for r in ranges]])


def huber(residual: Floats, delta: float) -> tuple[Floats, Floats, Floats]:
    """Value, first and second derivative: r^2/2 within delta, delta (|r| - delta/2) beyond. delta = inf: squares,
    0: the absolute value."""
    if np.isinf(delta):
        return residual**2 / 2, residual, np.ones_like(residual)
    if delta == 0:
        return np.abs(residual), np.sign(residual), np.zeros_like(residual)
    inside = np.abs(residual) <= delta
    value = np.where(inside, residual**2 / 2, delta * (np.abs(residual) - delta / 2))
    return value, np.clip(residual, -delta, delta), inside.astype(float)


def objective(problem: Problem, theta: Floats, delta: float) -> Floats:
    """Weighted sum of losses of log residuals, [r]; infinite where the law is not positive."""
    residual = problem.target - predict(problem.law, problem.x, theta)
    return (problem.side(residual) * huber(residual, delta)[0]).sum(axis=1)


def derivatives(
    problem: Problem, theta: Floats, delta: float, majorise: NDArray[np.bool_] | None = None
) -> tuple[Floats, Floats, Floats, Floats]:
    """(objective [r], gradient [r, k], Hessian [r, k, k], sum of |contributions| to the gradient [r, k]).

    majorise [r]: rows whose Hessian takes the touching parabola of each residual in place of the loss's own curvature.
    """
    local = evaluate(problem.law, problem.x, theta)
    residual = problem.target - local.value
    value, slope, curvature = huber(residual, delta)
    if majorise is not None:  # psi(r) / r, the curvature of the parabola that touches the loss at r from above
        safe = np.where(residual == 0, 1.0, residual)
        curvature = np.where(majorise[:, None], np.where(residual == 0, 1.0, slope / safe), curvature)
    side = problem.side(residual)
    slope, curvature = slope * side, curvature * side
    gradient = -np.einsum("rn,rnk->rk", slope, local.gradient)
    size = np.einsum("rn,rnk->rk", np.abs(slope), np.abs(local.gradient))
    return (side * value).sum(axis=1), gradient, local.hessian(-slope, curvature), size


def newton(problem: Problem, theta: Floats, delta: float, iterations: int = 1500) -> Floats:
    """Minimise from theta [r, k] within the bounds; every row on its own. Returns [r, k].

    A step solves (|H| + shift) d = -g on the free unknowns, |H| having the absolute eigenvalues of the scaled
    Hessian; the shift grows after a step that does not descend and shrinks after one that does. After a few
    failed steps the next one uses the touching parabolas: where most residuals lie beyond delta the loss has hardly
    any curvature of its own, and plain Newton would jump back and forth over the kinks.
    """
    low, high = (np.broadcast_to(b, theta.shape) for b in (problem.low, problem.high))
    theta = np.clip(theta, low, high)
    shift = np.full(len(theta), 1e-6)
    value, gradient, hessian, _ = derivatives(problem, theta, delta)
    live, failed = np.ones(len(theta), bool), np.zeros(len(theta), int)
    patience = np.full(len(theta), _PATIENCE[0])
    for _ in range(iterations):
        at = np.flatnonzero(live)
        if not len(at):
            break
        g, h, x = gradient[at], hessian[at], theta[at]
        under, over = low[at], high[at]
        # Unknowns at a bound whose gradient pushes them outwards take no part in the step (an active set); those just
        # above one are put on it below, as Newton steps would only ever halve the distance.
        near, g0 = x - under < _NEAR, g
        free = ~((near & (g > 0)) | ((x >= over) & (g < 0)))
        g = np.where(free, g, 0.0)
        h = np.where(free[:, :, None] & free[:, None, :], h, 0.0)
        # Unit diagonal first: coefficients and exponents differ in curvature by orders of magnitude, and one shift has
        # to suit them all.
        scale = np.sqrt(np.maximum(np.abs(np.einsum("rkk->rk", h)), 1e-300))
        scale = np.where(free, np.maximum(scale, 1e-8 * scale.max(axis=1, keepdims=True)), 1.0)
        # Absolute eigenvalues: where the objective curves downwards, the step goes down, not to the maximum.
        values, vectors = np.linalg.eigh(h / (scale[:, :, None] * scale[:, None, :]))
        damped = np.maximum(np.abs(values), 1e-14) + shift[at][:, None]
        step = np.einsum("rij,rj->ri", vectors, np.einsum("rji,rj->ri", vectors, -g / scale) / damped) / scale
        step = np.where(near & (g0 > 0), under - x, step)
        trial = np.clip(x + step, under, over)
        sound = trial[:, : len(problem.law.terms)].any(axis=1)  # else L = 0, which has no logarithm
        trial[~sound] = x[~sound]
        there = derivatives(problem.rows(at), trial, delta)
        better = sound & (there[0] <= value[at] * (1 + 1e-15))
        moved = (np.abs(trial - x) / (1 + np.abs(x))).max(axis=1)
        won = at[better]
        theta[won], value[won] = trial[better], there[0][better]
        gradient[won], hessian[won] = there[1][better], there[2][better]
        # Levenberg-Marquardt: towards Newton after a success, towards a short gradient step after a failure. A row is
        # done when it no longer moves, or when no step however short descends.
        shift[at] = np.where(better, np.maximum(shift[at] / 10, 1e-16), np.maximum(shift[at] * 10, 1e-9))
        live[at] = ~sound | (moved > 1e-15) & (shift[at] < 1e16)
        failed[at] = np.where(better, 0, failed[at] + 1)
        again = at[failed[at] == patience[at]] if np.isfinite(delta) else at[:0]
        if len(again):
            switched = derivatives(problem.rows(again), theta[again], delta, np.ones(len(again), bool))
            hessian[again], shift[again] = switched[2], 1e-6
            patience[again] = sum(_PATIENCE) - patience[again]
    return theta


def minimise(problem: Problem, theta: Floats, delta: float) -> Floats:
    """Newton with delta shrinking to the one asked for. theta [r, k] -> [r, k]."""
    stages = [d for d in _CONTINUATION if d > delta] if np.isfinite(delta) else []
    for stage in stages:
        theta = newton(problem, theta, stage, 60)
    return newton(problem, theta, delta)


def stationarity(problem: Problem, theta: Floats, delta: float) -> Floats:
    """Largest projected gradient component relative to the contributions it sums, [r]; about 0 at an optimum."""
    _, gradient, _, size = derivatives(problem, theta, delta)
    fixed = ((theta <= problem.low) & (gradient > 0)) | ((theta >= problem.high) & (gradient < 0))
    # a residual is a difference of logarithms of order one: at rounding level it sums to noise, not to a slope
    weight = np.abs(evaluate(problem.law, problem.x, theta).gradient)
    floor = 4e-15 * np.einsum("rn,rnk->rk", np.broadcast_to(problem.weights, weight.shape[:2]), weight)
    return np.where(fixed, 0.0, np.maximum(np.abs(gradient) - floor, 0) / (size + floor + 1e-300)).max(axis=1)


def starts(problem: Problem, delta: float, most: int = 8) -> Floats:
    """Local minima of the best objective per choice of shapes (variable projection). One data set; [s, k]."""
    law, target, weights = problem.law, problem.target[0], problem.weights[0]
    axes = [r.starts for r in law.ranges(problem.x)]
    cells = np.stack([g.ravel() for g in np.meshgrid(*axes, indexing="ij")], axis=1)
    # y^(1/q) is linear in the coefficients; relative errors of it are taken, as the objective does
    power = 1.0 if law.outer is None else 1 / cells[:, law.outer, None]
    columns = factors(law, problem.x, cells) / np.exp(target * power)[..., None]
    theta = np.concatenate([_non_negative(columns, weights), cells], axis=1)
    surface = objective(problem, theta, delta).reshape([len(axis) for axis in axes])
    padded = np.pad(surface, 1, constant_values=np.inf)
    lowest = np.ones_like(surface, bool)
    for offset in product(range(3), repeat=len(axes)):
        lowest &= surface <= padded[tuple(slice(o, o + n) for o, n in zip(offset, surface.shape, strict=True))]
    order = np.argsort(np.where(lowest, surface, np.inf).ravel(), kind="stable")
    return theta[order[: min(most, int(lowest.sum()))]]


def _non_negative(columns: Floats, weights: Floats) -> Floats:
    """Least squares of columns [cells, n, m] @ c = 1 under c >= 0, by trying every set of active columns. [cells, m]"""
    cells, _, m = columns.shape
    normal = np.einsum("cni,n,cnj->cij", columns, weights, columns, optimize=True)
    right = np.einsum("cni,n->ci", columns, weights)
    best, solution = np.full(cells, np.inf), np.zeros((cells, m))
    for size in range(1, m + 1):
        for active in combinations(range(m), size):
            index = np.array(active)
            block = normal[:, index[:, None], index]
            ridge = 1e-13 * np.einsum("cii->ci", block).mean(axis=1)
            solved = np.linalg.solve(block + ridge[:, None, None] * np.eye(size), right[:, index, None])[:, :, 0]
            drop = -(solved * right[:, index]).sum(axis=1)  # the residual's square, up to a constant
            good = (solved >= 0).all(axis=1) & (drop < best)
            best[good] = drop[good]
            solution[good] = 0.0
            solution[np.ix_(good, index)] = solved[good]
    return solution


def on_kinks(problem: Problem, theta: Floats, iterations: int = 100) -> tuple[Floats, float]:
    """The optimum of absolute residuals of one data set by sequential linear programs in a trust region.

    theta [k], near the optimum. Returns theta [k] and its stationarity: by how much the best step within a small box
    would lower the objective, relative to what the residuals could at most contribute to it.
    """
    from scipy.optimize import linprog  # loads for a third of a second, and only these losses need it

    above, below = (problem.weights[0] * side for side in problem.sides)
    n, k = len(problem.x), len(theta)

    def program(at: Floats, radius: float) -> tuple[Floats, float, float]:
        """The best step in the box, the gain it promises, and the size of what it sums."""
        local = evaluate(problem.law, problem.x, at[None])
        jacobian, residual = local.gradient[0], (problem.target - local.value)[0]
        unit = max(float(np.abs(residual).mean()), 1e-12)  # the solver's tolerances are absolute
        box = radius * np.maximum(np.abs(at), 1e-2)
        low, high = np.maximum(problem.low[0] - at, -box), np.minimum(problem.high[0] - at, box)
        solved = linprog(
            np.concatenate([np.zeros(k), above, below]),
            A_eq=np.hstack([jacobian, np.eye(n), -np.eye(n)]),
            b_eq=residual / unit,
            bounds=[*zip(low / unit, high / unit, strict=True), *[(0, None)] * (2 * n)],
            method="highs",
        )
        now = float((np.where(residual > 0, above, below) * np.abs(residual)).sum())
        most = float((np.maximum(above, below)[:, None] * np.abs(jacobian) * box).sum(axis=0).max())
        return solved.x[:k] * unit, now - solved.fun * unit, most

    value, radius = float(objective(problem, theta[None], 0.0)[0]), 0.1
    for _ in range(iterations):
        step, gain, _ = program(theta, radius)
        if gain <= 1e-13 * value or radius < 1e-12:
            break
        trial = np.clip(theta + step, problem.low[0], problem.high[0])
        there = float(objective(problem, trial[None], 0.0)[0])
        good = value - there
        # what was promised came about: a larger box; it did not: the law bends within this one
        radius = min(1.0, 2 * radius) if good > 0.75 * gain else radius / 4 if good < 0.25 * gain else radius
        if good > 0:
            theta, value = trial, there
    _, gain, most = program(theta, 1e-4)
    return theta, max(0.0, gain) / most
