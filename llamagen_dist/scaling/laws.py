"""Scaling laws as sums of power terms, with the exact derivatives of their logarithm.

Every law here is L = E + sum over terms of coefficient / x^exponent, x being parameters N or tokens D, with
coefficients >= 0: Hoffmann et al. 2022 (eq. 2), the same with one exponent, and single power laws above a floor.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Law:
    """terms: (coefficient's name, variable, index into exponents); the irreducible loss E is always the first term."""

    name: str
    formula: str
    terms: tuple[tuple[str, Literal["params", "tokens"], int], ...]
    exponents: tuple[str, ...]

    @property
    def coefficients(self) -> tuple[str, ...]:
        return ("E", *(name for name, _, _ in self.terms))

    @property
    def names(self) -> tuple[str, ...]:
        """The parameters in the order of theta."""
        return (*self.coefficients, *self.exponents)

    @property
    def k(self) -> int:
        return len(self.names)

    @property
    def variables(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(variable for _, variable, _ in self.terms))

    def logs(self, params: Floats, tokens: Floats) -> Floats:
        """log x of each term, [n, terms]."""
        return np.stack([np.log(params if v == "params" else tokens) for _, v, _ in self.terms], axis=1)


LAWS = {
    law.name: law
    for law in (
        Law(
            "chinchilla",
            "L = E + A / N^alpha + B / D^beta",
            (("A", "params", 0), ("B", "tokens", 1)),
            ("alpha", "beta"),
        ),
        Law(
            "chinchilla_tied",
            "L = E + A / N^alpha + B / D^alpha",
            (("A", "params", 0), ("B", "tokens", 0)),
            ("alpha",),
        ),
        Law("power_irr", "L = E + A / N^alpha", (("A", "params", 0),), ("alpha",)),
        Law("power_irr_tokens", "L = E + B / D^beta", (("B", "tokens", 0),), ("beta",)),
    )
}


def evaluate(law: Law, logs: Floats, theta: Floats) -> tuple[Floats, Floats]:
    """log L [r, n] and its gradient [r, n, k] for log x [n, terms] and theta = (coefficients, exponents) [r, k]."""
    powers, exponents = _powers(law, logs, theta)
    coefficients = theta[:, : 1 + len(law.terms)]
    total = np.einsum("rni,ri->rn", powers, coefficients)
    gradient = np.zeros((*total.shape, law.k))
    gradient[:, :, : powers.shape[2]] = powers
    for i, at in enumerate(exponents):
        gradient[:, :, at] -= coefficients[:, None, 1 + i] * logs[None, :, i] * powers[:, :, 1 + i]
    return np.log(total), gradient / total[:, :, None]


def weighted_hessian(law: Law, logs: Floats, theta: Floats, weights: Floats) -> Floats:
    """sum over points of weights [r, n] times the Hessian of log L, [r, k, k]."""
    powers, exponents = _powers(law, logs, theta)
    fitted, gradient = evaluate(law, logs, theta)
    scaled = weights / np.exp(fitted)
    hessian = -np.einsum("rn,rnk,rnl->rkl", weights, gradient, gradient, optimize=True)
    for i, at in enumerate(exponents):
        column = 1 + i
        mixed = -np.einsum("rn,n,rn->r", scaled, logs[:, i], powers[:, :, column])
        hessian[:, column, at] += mixed
        hessian[:, at, column] += mixed
        squared = np.einsum("rn,n,rn->r", scaled, logs[:, i] ** 2, powers[:, :, column])
        hessian[:, at, at] += theta[:, column] * squared
    return hessian


def _powers(law: Law, logs: Floats, theta: Floats) -> tuple[Floats, list[int]]:
    """1 and x^-exponent of each term [r, n, 1 + terms], and where each term's exponent stands in theta."""
    exponents = [1 + len(law.terms) + exponent for _, _, exponent in law.terms]
    powers = np.exp(-theta[:, None, exponents] * logs[None])
    return np.concatenate([np.ones((*powers.shape[:2], 1)), powers], axis=2), exponents
