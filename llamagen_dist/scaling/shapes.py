"""GPTs that can be built: a family of layers, widths and heads from thousands to billions of parameters."""

from dataclasses import dataclass, replace

import numpy as np

from llamagen_dist.models.cost import total_parameters, training_flops_per_image
from llamagen_dist.models.sizes import GPT_SIZES, GPTConfig
from llamagen_dist.scaling.frontier import non_embedding
from llamagen_dist.scaling.laws import Floats

ASPECTS = (32, 45, 64)
"""Widths per layer: LlamaGen's B to XXL have 64 to 32."""
_WIDTHS = (*range(16, 128, 16), *range(128, 512, 32), *range(512, 2048, 128), *range(2048, 6145, 256))


def heads(dim: int) -> int:
    """Of 64 channels each, as LlamaGen's; narrower in a narrow model, which needs several all the same."""
    wanted = 64 if dim >= 256 else 16 if dim >= 64 else 8
    each = max(size for size in range(4, wanted + 1, 4) if dim % size == 0)
    return dim // each


@dataclass(frozen=True, eq=False)
class Shapes:
    """configs: m models. params, blocks [m]: all parameters, and the blocks' matrices. flops [m]: training FLOPs per
    token."""

    configs: tuple[GPTConfig, ...]
    params: Floats
    blocks: Floats
    flops: Floats

    def sizes(self, count: str) -> Floats:
        """N as a law counts it: ``total`` or ``blocks``."""
        return self.params if count == "total" else self.blocks

    def flops_at(self, size: Floats, count: str) -> Floats:
        """Training FLOPs per token of models of any size [...], between those of the family."""
        order = np.argsort(self.sizes(count))
        known = np.log(self.sizes(count)[order])
        return np.exp(np.interp(np.log(size), known, np.log(self.flops[order])))


def family(like: GPTConfig) -> Shapes:
    """Models with the tokens, classes and options of ``like``, and LlamaGen's named sizes among them."""
    numbers = {(layers, heads(dim), dim) for dim in _WIDTHS for aspect in ASPECTS if (layers := round(dim / aspect))}
    numbers |= {(size["n_layer"], size["n_head"], size["dim"]) for size in GPT_SIZES.values()}
    numbers |= {(like.n_layer, like.n_head, like.dim)}
    configs = tuple(
        replace(like, n_layer=layers, n_head=n_head, dim=dim, n_kv_head=None) for layers, n_head, dim in sorted(numbers)
    )
    return Shapes(
        configs,
        np.array([total_parameters(config) for config in configs], float),
        np.array([non_embedding(config) for config in configs], float),
        np.array([training_flops_per_image(config) / config.image_tokens for config in configs]),
    )
