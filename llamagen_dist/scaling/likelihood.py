"""The density that a loss is the negative logarithm of: for AIC and the like, likelihood profiles, and made-up noise.

Residuals r of log y have density exp(-rho(r) / s) / Z(s) with the loss rho and a scale s; with Huber's loss that is a
normal core with exponential tails.
"""

from dataclasses import dataclass
from math import erf, pi

import numpy as np

from llamagen_dist.errors import UserError
from llamagen_dist.scaling.laws import Floats
from llamagen_dist.scaling.solve import huber

LOSSES = ("huber", "l2", "lad", "pinball")


@dataclass(frozen=True)
class Loss:
    """What is minimised of each log residual.

    delta: where huber turns linear; inf for l2, 0 for lad and pinball. sides: factors above and below the law.
    """

    kind: str
    delta: float
    sides: tuple[float, float] = (1.0, 1.0)

    def log_likelihood(self, objective: float, n: int) -> float:
        """At the scale that makes it largest, for n residuals whose losses sum to ``objective``."""
        mean = max(objective / n, 1e-28)
        if self.kind == "l2":
            return -n / 2 * (np.log(2 * pi * 2 * mean) + 1)
        if self.delta == 0:
            return -n * (np.log(mean * sum(1 / side for side in self.sides)) + 1)
        # the scale is the mean loss where nearly all residuals are in the tails, and twice that where nearly none are
        scales = mean * np.geomspace(0.5, 4, 2001)
        core = np.sqrt(2 * pi * scales) * np.vectorize(erf)(self.delta / np.sqrt(2 * scales))
        tails = 2 * scales / self.delta * np.exp(-(self.delta**2) / (2 * scales))
        return float((-n * np.log(core + tails) - objective / scales).max())

    def draw(self, residuals: Floats, shape: tuple[int, ...], random: np.random.Generator) -> Floats:
        """Noise of this density, as wide as the residuals: their mean loss is the noise's."""
        wanted = float((np.where(residuals > 0, *self.sides) * huber(residuals, self.delta)[0]).mean())
        spread = max(float(np.abs(residuals).max()), 1e-12)
        r = spread * np.sinh(np.linspace(-6, 6, 4001))
        losses = np.where(r > 0, *self.sides) * huber(r, self.delta)[0]
        low, high = 1e-6 * wanted + 1e-300, 1e3 * wanted + 1e-299
        for _ in range(60):  # the mean loss grows with the scale: bisection
            scale = np.sqrt(low * high)
            density = np.exp(-losses / scale) * np.gradient(r)
            low, high = (scale, high) if (losses * density).sum() / density.sum() < wanted else (low, scale)
        return np.interp(random.random(shape), np.cumsum(density) / density.sum(), r)


def loss_of(kind: str, delta: float, tau: float) -> Loss:
    """tau: the quantile of pinball. Raises UserError."""
    if kind not in LOSSES:
        raise UserError(f"loss {kind!r} is unknown; use {', '.join(LOSSES)}")
    if kind == "huber" and not (np.isfinite(delta) and delta > 0):
        raise UserError(f"delta {delta:g}: give a positive number, such as 1e-3, or auto")
    if kind == "pinball" and not 0 < tau < 1:
        raise UserError(f"tau {tau:g}: the quantile of pinball lies between 0 and 1")
    sides = (tau, 1 - tau) if kind == "pinball" else (1.0, 1.0)
    return Loss(kind, {"huber": delta, "l2": np.inf}.get(kind, 0.0), sides)
