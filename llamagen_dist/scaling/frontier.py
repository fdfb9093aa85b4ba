"""The compute frontier of a fitted law: for a number of training FLOPs, which size and how many tokens lose least."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from llamagen_dist.models.cost import parameters, total_parameters, training_flops_per_image
from llamagen_dist.models.gpt import GPTConfig
from llamagen_dist.scaling.fit import Fit
from llamagen_dist.scaling.laws import Floats


@dataclass(frozen=True)
class Best:
    """The best (params, tokens) for ``flops``; shape: layers and width, where real models were searched."""

    flops: float
    params: float
    tokens: float
    loss: float
    shape: str | None = None


def closed_form(fit: Fit, flops: Sequence[float] | Floats) -> list[Best]:
    """For C = 6 N D only (Hoffmann et al. 2022, eq. 4): N = G (C/6)^(beta/(alpha+beta)), D = C / 6N."""
    p = fit.params
    alpha, beta = p["alpha"], p.get("beta", p["alpha"])
    if min(p["A"], p["B"]) <= 0:
        raise ValueError("without both terms there is no optimum")
    ratio = (alpha * p["A"] / (beta * p["B"])) ** (1 / (alpha + beta))
    best = []
    for c in flops:
        n = ratio * (c / 6) ** (beta / (alpha + beta))
        best.append(Best(float(c), n, c / (6 * n), float(fit.predict(n, c / (6 * n)))))
    return best


def non_embedding(config: GPTConfig) -> int:
    """Parameters of the blocks' matrices: what a token is multiplied with between embedding and head."""
    groups = parameters(config)
    return groups["attention"] + groups["feed-forward"]


def over_shapes(fit: Fit, like: GPTConfig, flops: Sequence[float] | Floats, total: bool) -> list[Best]:
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
        best.append(Best(float(c), float(sizes[i]), float(tokens[i]), float(losses[i]), shape))
    return best
