"""Initial weights and buffers as pure functions of (seed, name): any rank can make any piece of a model."""

import re
from collections.abc import Collection

import torch
from torch import Tensor

from llamagen_dist import prng
from llamagen_dist.models.sizes import BETA_EMBEDDING, TARGET_POSITIONS, GPTConfig

ADDED = {"qk_norm": r"layers\.\d+\.attention\.[qk]_norm\.weight"}
"""Option of GPTConfig -> the parameters, by a pattern of their names, that a model has with it and not without."""


def added_by(name: str) -> str | None:
    """The option of ADDED without which the parameter ``name`` does not exist."""
    return next((option for option, pattern in ADDED.items() if re.fullmatch(pattern, name)), None)


def options_in(names: Collection[str]) -> set[str]:
    """The options of ADDED that a model with these parameters was built with."""
    return {option for name in names if (option := added_by(name)) is not None}


def initial_weight(config: GPTConfig, seed: int, name: str, shape: tuple[int, ...]) -> Tensor:
    """LlamaGen's initial value of one parameter: N(0, 0.02) for matrices, zero for the head, one for norms.

    What LlamaGen has not (``is_neutral``) is zero, or ends in a layer that is.

    Drawn on the CPU whatever the model's device: GPUs draw other numbers from the same seed.

    seed: of the run.
    name: LlamaGen's name of the parameter; every parameter has a random stream of its own.
    shape: of the whole tensor, not of a rank's part.

    Returns fp32 on the CPU.
    """
    if name in ("output.weight", TARGET_POSITIONS, f"{BETA_EMBEDDING}fc2.weight"):
        return torch.zeros(shape, device="cpu")
    if len(shape) < 2:
        return torch.ones(shape, device="cpu")
    drawn = torch.empty(shape, dtype=torch.float32, device="cpu")
    return drawn.normal_(0.0, config.initializer_range, generator=_generator(seed, f"initial weights {name}"))


def is_neutral(name: str) -> bool:
    """Whether a model computes the same without the parameter ``name``, and its like, as with initial values."""
    return name == TARGET_POSITIONS or name.startswith(BETA_EMBEDDING)


def null_caption(config: GPTConfig, seed: int) -> Tensor:
    """LlamaGen's never trained null caption: N(0, 1) / sqrt(caption_dim), (T, caption_dim) fp32 on the CPU."""
    drawn = torch.empty(config.prefix, config.caption_dim, dtype=torch.float32, device="cpu")
    return drawn.normal_(generator=_generator(seed, "null caption")).div_(config.caption_dim**0.5)


def _generator(seed: int, purpose: str) -> torch.Generator:
    """A generator of its own, so that the global one's state does not matter and is not changed."""
    generator = torch.Generator(device="cpu")
    generator.manual_seed(int(prng.bits(seed, purpose, 0).item()))
    return generator
