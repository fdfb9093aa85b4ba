"""The compute frontier of a fitted law: for a number of training FLOPs, which size and how many tokens lose least."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from llamagen_dist.models.cost import parameters, total_parameters, training_flops_per_image
from llamagen_dist.models.gpt import GPTConfig
from llamagen_dist.scaling.bootstrap import Bootstrap, interval
from llamagen_dist.scaling.fit import Fit
from llamagen_dist.scaling.laws import Floats


@dataclass(frozen=True)
class Best:
    """The best (params, tokens) for ``flops``; shape: layers and width, where real models were searched.

    The intervals are of 95%, from the refits of a bootstrap: of the best params, its tokens, tokens per parameter, and
    the loss there.
    """

    flops: float
    params: float
    tokens: float
    loss: float
    shape: str | None = None
    params_ci95: list[float] | None = None
    tokens_ci95: list[float] | None = None
    ratio_ci95: list[float] | None = None
    loss_ci95: list[float] | None = None


def has_optimum(fit: Fit) -> bool:
    """Whether both size and tokens lower the loss; else more of one thing is always best, which no run showed."""
    return not fit.rising and min(fit.params.get("A", 0), fit.params.get("B", 0)) > 0


def exponent(fit: Fit, theta: Floats) -> Floats:
    """a of N* ~ C^a for C = 6 N D, [r] from theta [r, k]."""
    _, alpha, _, beta = _terms(fit, theta)
    return beta / (alpha + beta)


def _terms(fit: Fit, theta: Floats) -> tuple[Floats, Floats, Floats, Floats]:
    """A, alpha, B, beta [r], but for factors that move no optimum: Kaplan's outer power; gadre's 6^-eta, where
    M / C = 1 / 6 N^2 and 1 / M C = 1 / 6 D^2."""
    p = fit.in_units(theta)
    if "r" in p:
        return p["A"], p["r"], p["B"], np.ones_like(p["r"])
    alpha = 2 * p["eta"] if "eta" in p else p["alpha"]
    return p["A"], alpha, p["B"], p.get("beta", alpha)


def closed_form(fit: Fit, flops: Sequence[float] | Floats, resampled: Bootstrap | None = None) -> list[Best]:
    """For C = 6 N D and fresh data only (Hoffmann et al. 2022, eq. 4): N = G (C/6)^(beta/(alpha+beta)), D = C / 6N."""
    if not has_optimum(fit):
        raise ValueError("without both terms there is no optimum")

    def sizes(theta: Floats, c: float) -> Floats:
        a, alpha, b, beta = _terms(fit, theta)
        with np.errstate(divide="ignore"):  # a resample may lack a term: all of one thing
            return (alpha * a / (beta * b)) ** (1 / (alpha + beta)) * (c / 6) ** (beta / (alpha + beta))

    best = []
    for c in flops:
        n = float(sizes(fit.theta[None], c)[0])
        one = Best(float(c), n, c / (6 * n), float(fit.predict(n, c / (6 * n))))
        if resampled is not None:
            many = sizes(resampled.theta, c)
            one = _banded(one, many, c / (6 * many), resampled.curve(fit, np.array([n]), np.array([one.tokens])))
        best.append(one)
    return best


def _banded(one: Best, params: Floats, tokens: Floats, loss: tuple[Floats, Floats]) -> Best:
    def ends(values: Floats) -> list[float] | None:
        pair = interval(values)
        return pair if np.isfinite(pair).all() else None

    return replace(
        one,
        params_ci95=ends(params),
        tokens_ci95=ends(tokens),
        ratio_ci95=ends(tokens / params),
        loss_ci95=[float(loss[0][0]), float(loss[1][0])],
    )


def non_embedding(config: GPTConfig) -> int:
    """Parameters of the blocks' matrices: what a token is multiplied with between embedding and head."""
    groups = parameters(config)
    return groups["attention"] + groups["feed-forward"]


def over_shapes(
    fit: Fit, like: GPTConfig, flops: Sequence[float] | Floats, total: bool, resampled: Bootstrap | None = None
) -> list[Best]:
    """Search models that can be built like ``like`` (its vocabulary, tokens and classes) with exact training FLOPs.

    total: whether the fit's N counts all parameters; else the blocks' matrices. Best.params always counts all.
    """
    shapes = [
        replace(like, n_layer=layers, n_head=1, dim=dim)
        for layers in (1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 16, 20, 24, 32)
        for dim in (*range(16, 128, 8), *range(128, 512, 32), *range(512, 2049, 128))
        if 10 <= dim / layers <= 72  # as wide for their depth as the ladder's models and LlamaGen's
    ]
    sizes = np.array([total_parameters(s) for s in shapes], float)
    fitted = sizes if total else np.array([non_embedding(s) for s in shapes], float)
    each = np.array([training_flops_per_image(s) for s in shapes], float)
    best = []
    for c in flops:
        tokens = c / each * like.image_tokens
        losses = fit.predict(fitted, tokens)
        i = int(losses.argmin())
        shape = f"{shapes[i].n_layer} layers of width {shapes[i].dim}"
        one = Best(float(c), float(sizes[i]), float(tokens[i]), float(losses[i]), shape)
        if resampled is not None:
            parts = np.array_split(resampled.theta, 8)  # all at once would take a gigabyte
            at = np.concatenate([fit.predict_with(part, fitted, tokens).argmin(axis=1) for part in parts])
            one = _banded(one, sizes[at], tokens[at], resampled.curve(fit, fitted[i : i + 1], tokens[i : i + 1]))
        best.append(one)
    return best
