"""Scaling laws with the exact derivatives of their logarithm.

Every law is y = (sum over terms of c exp(phi))^q with coefficients c >= 0. phi, the log of what stands beside c, is 0
for the floor E and -exponent times a feature (log N, log D, log C) for a power; only a ``curve`` is anything else. q is
1 but for Kaplan's. So for given exponents the coefficients are a linear problem, whatever the law.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import combinations_with_replacement
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Curve = Callable[[NDArray[np.complexfloating], Floats], NDArray[np.complexfloating]]

FEATURES: Mapping[str, tuple[tuple[str, ...], Callable[..., Floats]]] = {
    "N": (("params",), np.log),
    "D": (("tokens",), np.log),
    "C": (("flops",), np.log),
    "C N/D": (("flops", "params", "tokens"), lambda c, n, d: np.log(c) + np.log(n) - np.log(d)),
    "C D/N": (("flops", "params", "tokens"), lambda c, n, d: np.log(c) + np.log(d) - np.log(n)),
    # no more can be unique than was seen
    "U": (("unique", "tokens"), lambda u, d: np.log(np.minimum(u, d))),
    # minus, so that a metric which rises with the loss is a falling power of the feature, as everything else
    "loss": (("val_loss",), np.negative),
}
"""Feature -> the points' columns it is made of, and how."""


@dataclass(frozen=True)
class Term:
    """coefficient times exp(-exponent x feature); a curve's term keeps both for its units. None: absent, fixed at 1."""

    coefficient: str
    feature: str | None = None
    exponent: str | None = None


@dataclass(frozen=True)
class Shape:
    """A parameter that is no coefficient.

    kind: how it is bounded and searched, and what it is in the caller's units: ``exponent`` of a power; ``rate`` per
    unit of the feature; ``outer`` power q; ``change`` of an exponent at a break; ``width`` of a break; ``scale`` and
    ``level``, a position on the first feature, as e^position and as minus position; ``repeats``, the log of R_D* or
    R_N*; ``optimum``, the log of the size that suits the middle's tokens, as the coefficient A that makes it so.
    """

    name: str
    kind: Literal["exponent", "rate", "outer", "change", "width", "scale", "level", "repeats", "optimum"] = "exponent"


@dataclass(frozen=True)
class Range:
    """Bounds of a shape, and the values its search begins at [s]."""

    low: float
    high: float
    starts: Floats


@dataclass(frozen=True)
class Law:
    """theta: the terms' coefficients, then the shapes.

    curve: phi [r, n] of the last term for shapes [r, e] and features [n, f]; analytic, because it is differentiated
    with complex steps. names: what the caller sees.
    """

    name: str
    formula: str
    features: tuple[str, ...]
    terms: tuple[Term, ...]
    shapes: tuple[Shape, ...]
    curve: Curve | None = None

    @property
    def coefficients(self) -> tuple[str, ...]:
        return tuple(term.coefficient for term in self.terms)

    @property
    def names(self) -> tuple[str, ...]:
        """The parameters in the order of theta."""
        return (*self.coefficients, *(shape.name for shape in self.shapes))

    @property
    def k(self) -> int:
        return len(self.names)

    @property
    def outer(self) -> int | None:
        """Where q stands among the shapes."""
        return next((i for i, shape in enumerate(self.shapes) if shape.kind == "outer"), None)

    @property
    def columns(self) -> tuple[str, ...]:
        """The points' columns it needs."""
        return tuple(dict.fromkeys(c for f in self.features for c in FEATURES[f][0]))

    def x(self, columns: Mapping[str, Floats]) -> Floats:
        """Features [n, f] from columns [n] each."""
        parts = [make(*(columns[c] for c in needed)) for needed, make in (FEATURES[f] for f in self.features)]
        return np.stack(parts, axis=1)

    def centre(self, x: Floats) -> Floats:
        """Where the features are measured from [f]; unique tokens from where tokens are, as they are compared."""
        middle = x.mean(axis=0)
        if "U" in self.features:
            middle[self.features.index("U")] = middle[self.features.index("D")]
        return middle

    def ranges(self, x: Floats) -> list[Range]:
        """x: centred features [n, f]."""
        count = {1: 160, 2: 40, 3: 14}.get(len(self.shapes), 6)
        low, high = float(x[:, 0].min()), float(x[:, 0].max())
        span = max(high - low, 1e-9)
        position = Range(low, high, np.linspace(low, high, 7)[1:-1])
        known = {
            "exponent": Range(0.01, 3.0, np.geomspace(0.02, 2.0, count)),
            "rate": Range(0.05 / span, 40 / span, np.geomspace(0.2, 20, count) / span),
            "outer": Range(0.02, 3.0, np.geomspace(0.05, 1.0, count)),
            "change": Range(-3.0, 3.0, np.array([-0.4, -0.15, -0.03, 0.03, 0.15, 0.4])),
            "width": Range(0.05, 3.0, np.array([0.3])),
            "scale": position,
            "level": position,
            "optimum": Range(low - 5, high + 5, np.linspace(low, high, 7)),
            "repeats": Range(np.log(0.1), np.log(1e4), np.log([2.0, 5.0, 12.0, 30.0, 100.0])),
        }
        return [known[shape.kind] for shape in self.shapes]

    def in_units(self, theta: Floats, centre: Floats, level: float) -> dict[str, Floats]:
        """Parameters [r] by name in the points' own units, from theta [r, k] of centred features and log y."""
        values = dict(zip(self.names, theta.T.copy(), strict=True))
        q = 1.0 if self.outer is None else values[self.shapes[self.outer].name]
        with np.errstate(over="ignore"):
            for term in self.terms:  # c (x / e^centre)^-a is c e^(a centre) / x^a
                shift = level / q
                if term.feature is not None:
                    exponent = 1.0 if term.exponent is None else values[term.exponent]
                    shift = shift + exponent * centre[self.features.index(term.feature)]
                values[term.coefficient] = values[term.coefficient] * np.exp(shift)
            for shape in self.shapes:
                if shape.kind in ("scale", "repeats"):
                    values[shape.name] = np.exp(values[shape.name] + (centre[0] if shape.kind == "scale" else 0.0))
                elif shape.kind == "level":
                    values[shape.name] = -(values[shape.name] + centre[0])
                elif shape.kind == "optimum":  # alpha A / N^alpha = beta B / D^beta along the best sizes
                    alpha, beta = values["alpha"], values["beta"]
                    best = np.exp(alpha * (values[shape.name] + centre[0]) - beta * centre[1])
                    values[shape.name] = values["B"] * beta / alpha * best
        return values


def _softplus(z: NDArray[np.complexfloating]) -> NDArray[np.complexfloating]:
    positive = z.real > 0
    return np.where(positive, z, 0) + np.log1p(np.exp(np.where(positive, -z, z)))


def _repeated(shapes: NDArray[np.complexfloating], x: Floats) -> NDArray[np.complexfloating]:
    """-beta log D_eff, D_eff = U (1 + R (1 - exp(-(D/U - 1)/R))): R repetitions are worth at most R times U."""
    return -shapes[:, 1, None] * _saturated(x[:, 1] + 0j, x[:, 2] + 0j, shapes[:, 2, None])


def _repeated_sizes(shapes: NDArray[np.complexfloating], x: Floats) -> NDArray[np.complexfloating]:
    """log of (A / N_eff^alpha + B / D_eff^beta) / B; N_eff of N over N_opt(U), as D_eff of D over U."""
    alpha, beta, worth_of_data, worth_of_size, best = (shapes[:, i, None] for i in range(5))
    size = _saturated(x[:, 0] + 0j, best + beta / alpha * x[:, 2], worth_of_size)
    data = _saturated(x[:, 1] + 0j, x[:, 2] + 0j, worth_of_data)
    return np.log(beta / alpha * np.exp(alpha * (best - size)) + np.exp(-beta * data))


def _saturated(
    x: NDArray[np.complexfloating], full: NDArray[np.complexfloating], log_worth: NDArray[np.complexfloating]
) -> NDArray[np.complexfloating]:
    """log of what e^x counts as, of which e^full counts in full and what is beyond it as R times it at most."""
    worth = np.exp(log_worth)
    beyond = np.where((x - full).real > 0, x - full, 0)
    return x - beyond + np.log1p(-worth * np.expm1(-np.expm1(beyond) / worth))


def _broken(shapes: NDArray[np.complexfloating], x: Floats) -> NDArray[np.complexfloating]:
    """log of x^-alpha times (1 + (x / d)^(1/f))^(-c f) for each break (c, d, f) (Caballero et al. 2023)."""
    phi = -shapes[:, 0, None] * x[:, 0]
    for i in range(1, shapes.shape[1], 3):
        change, at, width = (shapes[:, i + j, None] for j in range(3))
        phi = phi - change * width * _softplus((x[:, 0] - at) / width)
    return phi


def _sigmoid(shapes: NDArray[np.complexfloating], x: Floats) -> NDArray[np.complexfloating]:
    return -_softplus(shapes[:, 0, None] * (x[:, 0] - shapes[:, 1, None]))


def _single() -> list[Law]:
    """The laws of one feature: of N under their bare name, of D and C with a suffix."""
    laws = []
    for suffix, x, a, alpha in (
        ("", "N", "A", "alpha"),
        ("_tokens", "D", "B", "beta"),
        ("_compute", "C", "A", "alpha"),
    ):
        floor, power, exponent = Term("E"), Term(a, x, alpha), Shape(alpha)
        core = f"{a} / {x}^{alpha}"
        laws += [
            Law(f"power{suffix}", f"L = {core}", (x,), (power,), (exponent,)),
            Law(f"power_irr{suffix}", f"L = E + {core}", (x,), (floor, power), (exponent,)),
            Law(f"fid{suffix}", f"FID = E + {core}", (x,), (floor, power), (exponent,)),
        ]
        for breaks in (1, 2):
            formula, shapes = f"L = E + {core}", [exponent]
            for i in range(1, breaks + 1):
                formula += f" (1 + ({x} / d{i})^(1/f{i}))^(-c{i} f{i})"
                shapes += [Shape(f"c{i}", "change"), Shape(f"d{i}", "scale"), Shape(f"f{i}", "width")]
            laws.append(Law(f"broken{breaks}{suffix}", formula, (x,), (floor, power), tuple(shapes), _broken))
    return laws


_N, _D = Term("A", "N", "alpha"), Term("B", "D", "beta")
LAWS: Mapping[str, Law] = {
    law.name: law
    for law in (
        Law(
            "chinchilla",
            "L = E + A / N^alpha + B / D^beta",
            ("N", "D"),
            (Term("E"), _N, _D),
            (Shape("alpha"), Shape("beta")),
        ),
        Law(
            "chinchilla_tied",
            "L = E + A / N^alpha + B / D^alpha",
            ("N", "D"),
            (Term("E"), _N, Term("B", "D", "alpha")),
            (Shape("alpha"),),
        ),
        # Gadre et al. 2024, eq. 4, with M = D / N: the tied law, said in compute and over-training
        Law(
            "gadre",
            "L = E + (A M^eta + B / M^eta) / C^eta, M = D / N",
            ("C N/D", "C D/N"),
            (Term("E"), Term("A", "C N/D", "eta"), Term("B", "C D/N", "eta")),
            (Shape("eta"),),
        ),
        # Kaplan et al. 2020, eq. 1.5: r = alpha_N / alpha_D, A = Nc^r, B = Dc
        Law(
            "kaplan_nd",
            "L = (A / N^r + B / D)^alpha_D",
            ("N", "D"),
            (Term("A", "N", "r"), Term("B", "D")),
            (Shape("r"), Shape("alpha_D", "outer")),
        ),
        # Muennighoff et al. 2023, eq. 5: for data only, and with sizes beyond what suits the unique data
        Law(
            "data_constrained",
            "L = E + A / N^alpha + B / D_eff^beta, D_eff = U (1 + R_D (1 - exp(-(D/U - 1) / R_D)))",
            ("N", "D", "U"),
            (Term("E"), _N, _D),
            (Shape("alpha"), Shape("beta"), Shape("R_D", "repeats")),
            _repeated,
        ),
        Law(
            "data_constrained_nd",
            "L = E + A / N_eff^alpha + B / D_eff^beta, D_eff of U and N_eff of (alpha A U^beta / (beta B))^(1/alpha)",
            ("N", "D", "U"),
            (Term("E"), _D),
            (Shape("alpha"), Shape("beta"), Shape("R_D", "repeats"), Shape("R_N", "repeats"), Shape("A", "optimum")),
            _repeated_sizes,
        ),
        Law(
            "loss_to_metric",
            "metric = E + A exp(gamma loss)",
            ("loss",),
            (Term("E"), Term("A", "loss", "gamma")),
            (Shape("gamma", "rate"),),
        ),
        Law(
            "loss_to_metric_sigmoid",
            "metric = E + A / (1 + exp(-gamma (loss - L0)))",
            ("loss",),
            (Term("E"), Term("A")),
            (Shape("gamma", "rate"), Shape("L0", "level")),
            _sigmoid,
        ),
        *_single(),
    )
}


@dataclass(frozen=True, eq=False)
class Local:
    """A law around theta: log y [r, n], its gradient [r, n, k], and what the Hessian is made of."""

    law: Law
    value: Floats
    gradient: Floats
    _theta: Floats
    _factors: Floats
    _total: Floats
    _inner: Floats
    _slopes: list[tuple[int, int, Floats]]
    _bends: list[tuple[int, int, Floats]]

    def hessian(self, weights: Floats, squares: Floats) -> Floats:
        """Sum over points of weights [r, n] times the Hessian of log y, and squares [r, n] times its gradient's outer
        product, [r, k, k]."""
        first = len(self.law.terms)  # of the shapes in theta
        scaled = weights / self._total
        hessian = np.zeros((len(scaled), self.law.k, self.law.k))
        for j, a, slope in self._slopes:
            moved = scaled * self._factors[:, :, j] * slope
            cross = moved.sum(axis=1)
            hessian[:, j, first + a] += cross
            hessian[:, first + a, j] += cross
            for other, b, slope_b in self._slopes:
                if other == j:
                    hessian[:, first + a, first + b] += self._theta[:, j] * (moved * slope_b).sum(axis=1)
        for a, b, bend in self._bends:  # of the last term, the only one whose phi may be no straight line
            last = scaled * self._factors[:, :, first - 1] * bend
            hessian[:, first + a, first + b] += self._theta[:, first - 1] * last.sum(axis=1)
        if self.law.outer is None:
            return hessian + _products(self.gradient, squares - weights)
        at = first + self.law.outer
        hessian = (hessian - _products(self._inner, weights)) * self._theta[:, at, None, None]
        cross = np.einsum("rn,rni->ri", weights, self._inner)
        hessian[:, at, :] += cross
        hessian[:, :, at] += cross
        return hessian + _products(self.gradient, squares)


def _products(gradient: Floats, weights: Floats) -> Floats:
    """Sum over points of weights [r, n] times the outer product of gradient [r, n, k] with itself."""
    return np.swapaxes(gradient * weights[:, :, None], 1, 2) @ gradient


def factors(law: Law, x: Floats, shapes: Floats) -> Floats:
    """exp(phi) of each term [r, n, terms] for features [n, f] and shapes [r, e]."""
    result = np.ones((len(shapes), len(x), len(law.terms)))
    names = [shape.name for shape in law.shapes]
    for j, term in enumerate(law.terms):
        if law.curve is not None and j == len(law.terms) - 1:
            result[:, :, j] = np.exp(law.curve(shapes + 0j, x).real)
        elif term.feature is not None:
            exponent = 1.0 if term.exponent is None else shapes[:, names.index(term.exponent), None]
            result[:, :, j] = np.exp(-exponent * x[None, :, law.features.index(term.feature)])
    return result


def predict(law: Law, x: Floats, theta: Floats) -> Floats:
    """log y [r, n] for centred features [n, f] and theta [r, k]."""
    terms = len(law.terms)
    with np.errstate(divide="ignore"):
        value = np.log(np.einsum("rni,ri->rn", factors(law, x, theta[:, terms:]), theta[:, :terms]))
    return value if law.outer is None else value * theta[:, terms + law.outer, None]


def evaluate(law: Law, x: Floats, theta: Floats) -> Local:
    """As predict, with derivatives."""
    terms = len(law.terms)
    made = factors(law, x, theta[:, terms:])
    total = np.einsum("rni,ri->rn", made, theta[:, :terms])
    slopes, bends = _slopes(law, x, theta[:, terms:])
    gradient = np.zeros((*total.shape, law.k))
    gradient[:, :, :terms] = made
    for j, a, slope in slopes:
        gradient[:, :, terms + a] += theta[:, j, None] * made[:, :, j] * slope
    gradient /= total[:, :, None]
    value, inner = np.log(total), gradient
    if law.outer is not None:
        q = theta[:, terms + law.outer, None]
        gradient = inner * q[:, :, None]
        gradient[:, :, terms + law.outer] += value
        value = value * q
    return Local(law, value, gradient, theta, made, total, inner, slopes, bends)


_STEP = 1e-20  # of a complex step: f(x + ih) = f(x) + ih f'(x), with nothing to cancel


def _slopes(law: Law, x: Floats, shapes: Floats) -> tuple[list[tuple[int, int, Floats]], list[tuple[int, int, Floats]]]:
    """d phi_j / d shape_a as (j, a, [r or 1, n]), and second derivatives of the last phi as (a, b, [r, n])."""
    names = [shape.name for shape in law.shapes]
    found: list[tuple[int, int, Floats]] = []
    for j, term in enumerate(law.terms):
        if term.feature is not None and term.exponent is not None and not (law.curve and j == len(law.terms) - 1):
            found.append((j, names.index(term.exponent), -x[None, :, law.features.index(term.feature)]))
    if law.curve is None:
        return found, []
    curve, units = law.curve, np.eye(len(names))

    def slope(at: Floats, a: int) -> Floats:
        return np.asarray(curve(at + 1j * _STEP * units[a], x).imag / _STEP, np.float64)

    found += [(len(law.terms) - 1, a, slope(shapes, a)) for a in range(len(names))]
    # differences of exact slopes: a Hessian to nine digits steers Newton's steps, and no certificate rests on it
    bends = []
    for a, b in combinations_with_replacement(range(len(names)), 2):
        bend = (slope(shapes + 1e-5 * units[b], a) - slope(shapes - 1e-5 * units[b], a)) / 2e-5
        bends += [(a, b, bend)] if a == b else [(a, b, bend), (b, a, bend)]
    return found, bends
