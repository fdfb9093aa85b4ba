"""From config sections to models: the only place where the two meet (models know no config)."""

import dataclasses
import functools
import os
import shutil
from typing import TYPE_CHECKING

from llamagen_dist.config import GPTModelSection, TokenizerModelSection
from llamagen_dist.errors import UserError
from llamagen_dist.models.sizes import TARGET_POSITIONS, GPTConfig

if TYPE_CHECKING:  # imported where models are built: their sizes can be known without torch
    from collections.abc import Callable, Collection

    import torch
    from torch import Tensor

    from llamagen_dist.models.gpt import GPT
    from llamagen_dist.models.vq import VQModel


def gpt_config(
    section: GPTModelSection,
    *,
    vocab_size: int,
    image_tokens: int,
    num_classes: int | None,
    tensors: "Collection[str] | None" = None,
    token_rows: int | None = None,
) -> GPTConfig:
    """The model that ``section`` and the token shards describe together (Manifest.gpt_sizes). Raises UserError.

    token_rows: see GPTConfig.
    num_classes: None where there are none, which only a text-conditional model can do without.
    tensors: names of the weights that are to be put into it. Those of a run with ``order: rar`` are a raster model's
        once its order is.
    """
    if tensors is not None and TARGET_POSITIONS not in tensors:
        section = dataclasses.replace(section, order="raster")
    if num_classes is None and section.condition == "class":
        raise UserError(
            "model.condition: class needs labels, and the token shards have none; set condition: text if they hold "
            "captions"
        )
    try:
        return section.gpt(
            vocab_size=vocab_size, image_tokens=image_tokens, num_classes=num_classes or 0, token_rows=token_rows
        )
    except ValueError as error:
        raise UserError(f"model: {error}") from None


def build_gpt_on_meta(config: GPTConfig, seed: int) -> "GPT":
    """The same model without any memory; its weights come later (parallel/tensor_parallel.py, ``materialize``)."""
    import torch

    from llamagen_dist.models.gpt import GPT

    with torch.device("meta"):
        model = GPT(config)
    model.dropout_seed = seed
    return model


def fresh_weights(config: GPTConfig, seed: int) -> "Callable[[str, tuple[int, ...]], Tensor]":
    """LlamaGen's initial weights and null caption, one tensor at a time: (name, full shape) -> fp32 on the CPU."""
    from llamagen_dist.models.initial import initial_weight, null_caption

    def weight(name: str, shape: tuple[int, ...]) -> "Tensor":
        if name == "cls_embedding.uncond_embedding":
            return null_caption(config, seed)
        return initial_weight(config, seed, name, shape)

    return weight


def compile_blocks(model: "GPT", device: "torch.device") -> None:
    """``model.compile_blocks()``. Raises UserError, see ``check_compiler``."""
    check_compiler(device, "compute.compile")
    model.compile_blocks()


def compile_halves(model: "VQModel", device: "torch.device") -> None:
    """``model.compile_halves()``. Raises UserError, see ``check_compiler``."""
    check_compiler(device, "compute.compile")
    model.compile_halves()


def check_compiler(device: "torch.device", key: str) -> None:
    """Raises UserError where torch.compile would fail at the first step for want of a C++ compiler. key: that asks."""
    compiler = os.environ.get("CXX", "g++")
    if device.type == "cpu" and shutil.which(compiler) is None:
        raise UserError(
            f"{key}: on a CPU torch.compile needs a C++ compiler and {compiler} is not found; "
            f"install g++, name another in the environment variable CXX, or set {key}=false"
        )


def build_vq(section: TokenizerModelSection) -> "VQModel":
    """Weights are drawn from torch's global generator."""
    from llamagen_dist.models.prefix_tokens import PrefixVQModel
    from llamagen_dist.models.vq import VQModel

    return (PrefixVQModel if section.tokens == "prefix" else VQModel)(section.vq())


@functools.cache
def vq_parameters(section: TokenizerModelSection) -> int:
    """How many parameters the tokenizer has, counted without any memory. Loads torch."""
    import torch

    with torch.device("meta"):
        return sum(p.numel() for p in build_vq(section).parameters())
