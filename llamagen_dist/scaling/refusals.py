"""What cannot be fitted, by kind, and the checks of the points before a fit."""

import numpy as np

from llamagen_dist.errors import UserError
from llamagen_dist.scaling.laws import Floats, Law
from llamagen_dist.scaling.points import Points


class TooFewPointsError(UserError):
    """Fewer points than parameters + 1 for a law, or + 3 for an interval."""


class UnidentifiableError(UserError):
    """However many points there are, they cannot tell the law's parameters apart."""


class NoSignalError(UserError):
    """What is fitted does not change from point to point."""


def too_few(n: int, law: Law) -> TooFewPointsError:
    return TooFewPointsError(
        f"{n} points are too few for a confidence interval of {law.name}: "
        f"its {law.k} parameters need at least {law.k + 3}"
    )


def check_identifiable(points: Points, law: Law, x: Floats) -> None:
    """Raises one of the errors above if no fit of ``law`` to ``points`` (features x [n, f]) could mean anything."""
    n = len(points)
    if n <= law.k:
        raise TooFewPointsError(
            f"{n} points are too few for {law.name}, which has {law.k} parameters: at least {law.k + 1} are needed, "
            f"and {law.k + 3} for a confidence interval"
        )
    if np.ptp(np.log(points.loss)) < 1e-9:
        raise NoSignalError("the loss is the same at every point; there is nothing to fit")
    compared = [f for f in law.features if f != "U"]
    for feature in compared:
        if np.ptp(x[:, law.features.index(feature)]) < 1e-9:
            raise UnidentifiableError(_same(law, feature))
    if len(compared) == 2:  # 1 - r^2 of the two logs: at 0 one is a function of the other
        first, second = (x[:, i] - x[:, i].mean() for i in range(2))
        if 1 - (first @ second) ** 2 / ((first @ first) * (second @ second)) < 1e-9:
            raise UnidentifiableError(
                "params and tokens move in lockstep (as with a fixed number of tokens per parameter), so their terms "
                "cannot be told apart and only L(C) can be fitted; vary them independently, or fit power_irr_compute"
            )
    if "U" in law.features and (points.also["unique"] >= points.tokens).all():
        raise UnidentifiableError(
            "no run saw its data more than once, so nothing is known of R_D; fit chinchilla, or add runs that repeat"
        )
    distinct = len(np.unique(x, axis=0))
    if distinct < law.k:
        raise UnidentifiableError(
            f"the {n} points lie at only {distinct} different {' and '.join(law.columns)}, fewer than the {law.k} "
            f"parameters of {law.name}; add runs of other sizes or lengths"
        )


def _same(law: Law, feature: str) -> str:
    column = {"N": "params", "D": "tokens", "C": "flops", "loss": "val_loss"}.get(feature, feature)
    of = [name for term in law.terms if term.feature == feature for name in (term.coefficient, term.exponent) if name]
    of = of or [shape.name for shape in law.shapes]
    hint = ""
    if "N" in law.features and "D" in law.features:
        hint = f"; fit {'power_irr_tokens' if feature == 'N' else 'power_irr'} instead"
    return f"every point has the same {column}, so {' and '.join(of)} of {law.name} cannot be told from the rest{hint}"


def rising(x: Floats, target: Floats) -> Floats:
    """Which features [f] the target clearly grows along, by a linear regression with a t of more than 2."""
    design = np.column_stack([np.ones(len(x)), x - x.mean(axis=0)])
    coefficients, *_ = np.linalg.lstsq(design, target, rcond=None)
    left = target - design @ coefficients
    spread = np.diag(np.linalg.pinv(design.T @ design)) * (left @ left) / max(1, len(x) - design.shape[1])
    return (coefficients > 2 * np.sqrt(np.maximum(spread, 1e-20)))[1:]
