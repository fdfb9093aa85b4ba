"""From config sections to models: the only place where the two meet (models know no config)."""

import difflib
import functools
import os
import shutil
from typing import TYPE_CHECKING

from llamagen_dist.config import GPTModelSection, TokenizerModelSection
from llamagen_dist.errors import UserError
from llamagen_dist.models.gpt_config import GPTConfig
from llamagen_dist.models.sizes import GPT_SIZES

if TYPE_CHECKING:  # imported where models are built: their sizes can be known without torch
    from collections.abc import Callable

    import torch
    from torch import Tensor

    from llamagen_dist.models.gpt import GPT
    from llamagen_dist.models.vq import VQConfig, VQModel


def gpt_config(section: GPTModelSection, *, vocab_size: int, image_tokens: int, num_classes: int | None) -> GPTConfig:
    """The model that ``section`` and the token shards' manifest describe together. Raises UserError.

    num_classes: None where there are none, which only a text-conditional model can do without.
    """
    if num_classes is None and section.condition == "class":
        raise UserError(
            "model.condition: class needs labels, and the token shards have none; set condition: text if they hold "
            "captions"
        )
    if section.size is not None:
        if section.size not in GPT_SIZES:
            near = difflib.get_close_matches(section.size, GPT_SIZES, n=1, cutoff=0.3)
            hint = f"did you mean {near[0]}?" if near else f"one of {', '.join(GPT_SIZES)}"
            raise UserError(f"model.size: {section.size!r} is unknown; {hint}")
        sizes = GPT_SIZES[section.size]
    else:  # the section has checked that all three are there
        own = {"n_layer": section.n_layer, "n_head": section.n_head, "dim": section.dim}
        sizes = {name: number for name, number in own.items() if number is not None}
    try:
        return GPTConfig(
            n_layer=sizes["n_layer"],
            n_head=sizes["n_head"],
            dim=sizes["dim"],
            vocab_size=vocab_size,
            image_tokens=image_tokens,
            condition=section.condition,
            num_classes=num_classes or 0,
            prefix_tokens=section.prefix_tokens,
            caption_dim=section.caption_dim,
            multiple_of=section.multiple_of,
            n_kv_head=section.n_kv_head,
            prefix_rotation=section.prefix_rotation,
            token_dropout_p=section.token_dropout_p,
            resid_dropout_p=section.resid_dropout_p,
            ffn_dropout_p=section.ffn_dropout_p,
            attn_dropout_p=section.attn_dropout_p,
            drop_path_rate=section.drop_path_rate,
        )
    except ValueError as error:
        raise UserError(f"model: {error}") from None


def build_gpt(config: GPTConfig, seed: int) -> "GPT":
    """LlamaGen's initial weights for this seed; the dropout masks hang on the same seed."""
    from llamagen_dist.models.gpt import GPT

    model = GPT(config).initialize(seed)
    model.dropout_seed = seed
    return model


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
    """``model.compile_blocks()``; UserError where the first step would fail for want of a C++ compiler."""
    compiler = os.environ.get("CXX", "g++")
    if device.type == "cpu" and shutil.which(compiler) is None:
        raise UserError(
            f"compute.compile: on a CPU torch.compile needs a C++ compiler and {compiler} is not found; "
            "install g++, name another in the environment variable CXX, or set compute.compile=false"
        )
    model.compile_blocks()


def vq_config(section: TokenizerModelSection) -> "VQConfig":
    from llamagen_dist.models.vq import VQ_SIZES, VQConfig

    if section.size is not None:
        return VQConfig(**VQ_SIZES[section.size])
    assert section.channels is not None
    assert section.channel_multipliers is not None
    return VQConfig(
        channels=section.channels,
        channel_multipliers=section.channel_multipliers,
        res_blocks=section.res_blocks,
        z_channels=section.z_channels,
        codebook_size=section.codebook_size,
        codebook_dim=section.codebook_dim,
        l2_norm=section.l2_norm,
    )


def build_vq(section: TokenizerModelSection) -> "VQModel":
    from llamagen_dist.models.vq import VQModel

    return VQModel(vq_config(section))


@functools.cache
def vq_parameters(section: TokenizerModelSection) -> int:
    """How many parameters the tokenizer has, counted without any memory. Loads torch."""
    import torch

    with torch.device("meta"):
        return sum(p.numel() for p in build_vq(section).parameters())
