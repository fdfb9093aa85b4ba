"""The lowest point of a measured valley: loss over log N at one budget, or over the log of a learning rate."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from llamagen_dist.scaling.bootstrap import SEED
from llamagen_dist.scaling.laws import Floats

FEWEST = 4
"""Points that a parabola needs before anything is left over to see whether it fits."""


@dataclass(frozen=True, eq=False)
class Valley:
    """A parabola floor + curvature (x - bottom)^2 through points x, y [n], ascending in x.

    bottoms: by other curves through the same points, where theirs lie inside. residuals [n]: of y, inflated for the
    three parameters.
    """

    x: Floats
    y: Floats
    bottom: float
    floor: float
    curvature: float
    bottoms: dict[str, float]
    residuals: Floats

    @property
    def inside(self) -> bool:
        """Whether the points enclose the lowest one; else it is an extrapolation by three numbers."""
        return self.curvature > 0 and self.x[0] < self.bottom < self.x[-1]

    def resampled(self, noise: Floats) -> Floats:
        """Bottoms of the parabolas through the fitted values plus ``noise`` [r, n], [r]; NaN where none is lowest."""
        fitted = self.floor + self.curvature * (self.x - self.bottom) ** 2
        return _bottoms(self.x, fitted[None] + noise)


def valley(x: Floats, y: Floats) -> Valley:
    """Fit one. x [n] distinct, y [n], n >= 3."""
    order = np.argsort(x)
    x, y = x[order], y[order]
    c0, c1, c2 = _coefficients(x, y[None])[0]
    middle = x.mean()
    bottom = middle - c1 / (2 * c2) if c2 != 0 else np.nan
    floor = c0 - c1**2 / (4 * c2) if c2 != 0 else np.nan
    residuals = y - (c0 + c1 * (x - middle) + c2 * (x - middle) ** 2)
    spare = len(x) - 3
    residuals = residuals * np.sqrt(len(x) / spare) if spare > 0 else residuals * np.nan
    return Valley(x, y, float(bottom), float(floor), float(c2), _checks(x, y), residuals)


def resampled(valleys: Sequence[Valley], replicates: int = 4000) -> Floats | None:
    """Bottoms of all valleys [replicates, valleys] by the residuals of all of them drawn with replacement, the same
    every time; NaN where a parabola has none, None where the points are too few to know their scatter."""
    if sum(len(one.x) - 3 for one in valleys) < 3:
        return None
    random = np.random.default_rng(SEED)
    pool = np.concatenate([one.residuals for one in valleys])
    pool = pool - pool.mean()
    return np.stack([one.resampled(random.choice(pool, (replicates, len(one.x)))) for one in valleys], axis=1)


def slope(x: Floats, y: Floats) -> Floats:
    """Least-squares slopes [r] of y [r, n] over x [n]."""
    centred = x - x.mean()
    return (y @ centred) / (centred @ centred)


def _coefficients(x: Floats, y: Floats) -> Floats:
    """Least squares of y [r, n] on 1, x - mean, (x - mean)^2: [r, 3]."""
    design = np.stack([(x - x.mean()) ** power for power in range(3)], axis=1)
    return np.linalg.lstsq(design, y.T, rcond=None)[0].T


def _bottoms(x: Floats, y: Floats) -> Floats:
    _, c1, c2 = _coefficients(x, y).T
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(c2 > 0, x.mean() - c1 / (2 * c2), np.nan)


def _checks(x: Floats, y: Floats) -> dict[str, float]:
    """Where a cubic and an Akima spline through the same points are lowest; left out at an end, where neither is."""
    fine = np.linspace(x[0], x[-1], 2001)
    curves = {"akima": akima(x, y, fine)}
    if len(x) > FEWEST:
        curves["cubic"] = np.polyval(np.polyfit(x - x.mean(), y, 3), fine - x.mean())
    lowest = {name: int(curve.argmin()) for name, curve in curves.items()}
    return {name: float(fine[i]) for name, i in lowest.items() if 0 < i < len(fine) - 1}


def akima(x: Floats, y: Floats, at: Floats) -> Floats:
    """Akima's interpolation (1970) of (x, y) [n], x ascending, n >= 3, at points [m] inside.

    A point's slope comes from its two neighbours on either side, weighted so that a kink stays local: unlike a cubic
    spline one outlier does not bend the whole curve.
    """
    slopes = np.diff(y) / np.diff(x)
    before, after = 2 * slopes[0] - slopes[1], 2 * slopes[-1] - slopes[-2]
    wide = np.concatenate([[2 * before - slopes[0], before], slopes, [after, 2 * after - slopes[-1]]])
    left, right = np.abs(wide[3:] - wide[2:-1]), np.abs(wide[1:-2] - wide[:-3])
    total = left + right
    flat = total < 1e-12 * (np.abs(wide).max() + 1e-300)
    tangent = np.where(
        flat, (wide[1:-2] + wide[2:-1]) / 2, (left * wide[1:-2] + right * wide[2:-1]) / np.where(flat, 1, total)
    )
    i = np.clip(np.searchsorted(x, at) - 1, 0, len(x) - 2)
    width = x[i + 1] - x[i]
    t = (at - x[i]) / width
    return (
        (1 + 2 * t) * (1 - t) ** 2 * y[i]
        + t * (1 - t) ** 2 * width * tangent[i]
        + t**2 * (3 - 2 * t) * y[i + 1]
        + t**2 * (t - 1) * width * tangent[i + 1]
    )
