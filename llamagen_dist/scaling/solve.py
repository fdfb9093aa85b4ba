"""The optimiser of the laws: variable projection for starts, then a bounded semismooth Newton method, all batched.

A Huber loss with a small delta is nearly an absolute value, so quasi-Newton searches from many random starts often
end early; here every start comes from an exact linear fit per pair of exponents, delta shrinks in steps, and the
Hessian is exact. A batch is many starts on one data set, or many resampled data sets from one start.
"""

from dataclasses import dataclass
from itertools import combinations

import numpy as np
from numpy.typing import NDArray

from llamagen_dist.scaling.laws import Floats, Law, evaluate, weighted_hessian

EXPONENTS = (0.01, 3.0)
_GRID = (40, 160)  # values per exponent: for two, for one
STATIONARY = 1e-5  # relative size of a gradient that counts as none
_NEAR = 1e-7  # so close above a bound, and pushed towards it, an unknown is put on it
_PATIENCE = 4  # failed steps before the touching parabolas are tried
_CONTINUATION = (3e-2, 1e-2, 3e-3)


@dataclass(frozen=True)
class Problem:
    """Data for r fits at once. logs [n, terms] and target = log loss [r or 1, n], both centred; weights [r or 1, n].

    Unknowns theta [r, k]: coefficients (in units of the centred loss), then exponents.
    """

    law: Law
    logs: Floats
    target: Floats
    weights: Floats

    def bounds(self) -> tuple[Floats, Floats]:
        coefficients = len(self.law.coefficients)
        low = np.full(self.law.k, EXPONENTS[0])
        high = np.full(self.law.k, EXPONENTS[1])
        low[:coefficients], high[:coefficients] = 0.0, np.inf
        return low, high


def huber(residual: Floats, delta: float) -> tuple[Floats, Floats, Floats]:
    """Value, first and second derivative: r^2/2 within delta, delta (|r| - delta/2) beyond. delta = inf: squares."""
    if np.isinf(delta):
        return residual**2 / 2, residual, np.ones_like(residual)
    inside = np.abs(residual) <= delta
    value = np.where(inside, residual**2 / 2, delta * (np.abs(residual) - delta / 2))
    return value, np.clip(residual, -delta, delta), inside.astype(float)


def objective(problem: Problem, theta: Floats, delta: float) -> Floats:
    """Weighted sum of Huber losses of log residuals, [r]; infinite where the law is not positive."""
    with np.errstate(divide="ignore"):
        fitted = evaluate(problem.law, problem.logs, theta)[0]
    return (problem.weights * huber(problem.target - fitted, delta)[0]).sum(axis=1)


def derivatives(
    problem: Problem, theta: Floats, delta: float, majorise: NDArray[np.bool_] | None = None
) -> tuple[Floats, Floats, Floats, Floats]:
    """(objective [r], gradient [r, k], Hessian [r, k, k], sum of |contributions| to the gradient [r, k]).

    majorise [r]: rows whose Hessian takes the touching parabola of each residual in place of the loss's own curvature.
    """
    fitted, inner = evaluate(problem.law, problem.logs, theta)
    residual = problem.target - fitted
    value, slope, curvature = huber(residual, delta)
    if majorise is not None:  # psi(r) / r, the curvature of the parabola that touches the loss at r from above
        safe = np.where(residual == 0, 1.0, residual)
        curvature = np.where(majorise[:, None], np.where(residual == 0, 1.0, slope / safe), curvature)
    slope, curvature = slope * problem.weights, curvature * problem.weights
    gradient = -np.einsum("rn,rnk->rk", slope, inner)
    size = np.einsum("rn,rnk->rk", np.abs(slope), np.abs(inner))
    hessian = np.einsum("rn,rnk,rnl->rkl", curvature, inner, inner, optimize=True)
    hessian -= weighted_hessian(problem.law, problem.logs, theta, slope)
    return (problem.weights * value).sum(axis=1), gradient, hessian, size


def newton(problem: Problem, theta: Floats, delta: float, iterations: int = 1500) -> Floats:
    """Minimise from theta [r, k] within the bounds; every row on its own. Returns [r, k].

    A step solves (|H| + shift) d = -g on the free unknowns, |H| having the absolute eigenvalues of the scaled
    Hessian; the shift grows after a step that does not descend and shrinks after one that does. After a few
    failed steps the next one uses the touching parabolas: where most residuals lie beyond delta the loss has hardly
    any curvature of its own, and plain Newton would jump back and forth over the kinks.
    """
    low, high = problem.bounds()
    theta = np.clip(theta, low, high)
    shift = np.full(len(theta), 1e-6)
    value, gradient, hessian, _ = derivatives(problem, theta, delta)
    live, failed = np.ones(len(theta), bool), np.zeros(len(theta), int)
    for _ in range(iterations):
        at = np.flatnonzero(live)
        if not len(at):
            break
        g, h, x = gradient[at], hessian[at], theta[at]
        # Unknowns at a bound whose gradient pushes them outwards take no part in the step (an active set); those just
        # above one are put on it below, as Newton steps would only ever halve the distance.
        near, g0 = x - low < _NEAR, g
        free = ~((near & (g > 0)) | ((x >= high) & (g < 0)))
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
        step = np.where(near & (g0 > 0), low - x, step)
        trial = np.clip(x + step, low, high)
        sound = trial[:, : len(problem.law.coefficients)].any(axis=1)  # else L = 0, which has no logarithm
        trial[~sound] = x[~sound]
        part = _rows(problem, at)
        there = derivatives(part, trial, delta)
        better = sound & (there[0] <= value[at] * (1 + 1e-15))
        moved = (np.abs(trial - x) / (1 + np.abs(x))).max(axis=1)
        won = at[better]
        theta[won], value[won] = trial[better], there[0][better]
        gradient[won], hessian[won] = there[1][better], there[2][better]
        # Levenberg-Marquardt: towards Newton after a success, towards a short gradient step after a failure. A row is
        # done when it no longer moves, or when no step however short descends.
        shift[at] = np.where(better, np.maximum(shift[at] / 10, 1e-16), np.maximum(shift[at] * 10, 1e-9))
        live[at] = ~sound | (moved > 1e-15) & (shift[at] < 1e8)
        failed[at] = np.where(better, 0, failed[at] + 1)
        again = at[failed[at] == _PATIENCE] if np.isfinite(delta) else at[:0]
        if len(again):
            switched = derivatives(_rows(problem, again), theta[again], delta, np.ones(len(again), bool))
            hessian[again], shift[again] = switched[2], 1e-6
    return theta


def _rows(problem: Problem, rows: NDArray[np.int64]) -> Problem:
    def chosen(a: Floats) -> Floats:
        return a if len(a) == 1 else a[rows]

    return Problem(problem.law, problem.logs, chosen(problem.target), chosen(problem.weights))


def minimise(problem: Problem, theta: Floats, delta: float) -> Floats:
    """Newton with delta shrinking to the one asked for. theta [r, k] -> [r, k]."""
    stages = [d for d in _CONTINUATION if d > delta] if np.isfinite(delta) else []
    for stage in stages:
        theta = newton(problem, theta, stage, 60)
    return newton(problem, theta, delta)


def stationarity(problem: Problem, theta: Floats, delta: float) -> Floats:
    """Largest projected gradient component relative to the contributions it sums, [r]; about 0 at an optimum."""
    low, high = problem.bounds()
    _, gradient, _, size = derivatives(problem, theta, delta)
    fixed = ((theta <= low) & (gradient > 0)) | ((theta >= high) & (gradient < 0))
    # residuals at rounding level sum to noise, not to a slope
    floor = 1e-15 * problem.weights.sum(axis=1).max()
    return np.where(fixed, 0.0, np.maximum(np.abs(gradient) - floor, 0) / (size + floor)).max(axis=1)


def starts(problem: Problem, delta: float, most: int = 8) -> Floats:
    """Local minima of the best objective per pair of exponents (variable projection). One data set; [s, k]."""
    law, target, weights = problem.law, problem.target[0], problem.weights[0]
    free = len(law.exponents)
    axis = np.geomspace(0.02, 2.0, _GRID[0] if free == 2 else _GRID[1])
    cells = np.stack([g.ravel() for g in np.meshgrid(*([axis] * free), indexing="ij")], axis=1)
    powers = np.exp(-cells[:, None, [e for _, _, e in law.terms]] * problem.logs[None])
    columns = np.concatenate([np.ones((*powers.shape[:2], 1)), powers], axis=2)
    coefficients = _non_negative(columns / np.exp(target)[None, :, None], weights)
    theta = np.concatenate([coefficients, cells], axis=1)
    surface = objective(problem, theta, delta).reshape([len(axis)] * free)
    padded = np.pad(surface, 1, constant_values=np.inf)
    lowest = np.ones_like(surface, bool)
    for offset in np.ndindex(*([3] * free)):
        lowest &= surface <= padded[tuple(slice(o, o + len(axis)) for o in offset)]
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
