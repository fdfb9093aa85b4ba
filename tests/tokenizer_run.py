"""The run directory of a tokenizer that was never trained."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from llamagen_dist.build import build_vq
from llamagen_dist.config import TokenizerConfigFile, TokenizerModelSection, dump
from llamagen_dist.config.section import build
from llamagen_dist.models.vq import VQModel
from llamagen_dist.parallel.entries import replicated
from llamagen_dist.parallel.topology import Topology
from tests import checkpoints as store

TINY = {
    "channels": 32,
    "channel_multipliers": [1, 1],
    "res_blocks": 1,
    "z_channels": 16,
    "codebook_size": 96,
    "codebook_dim": 4,
}
"""A config's model section: two pixels a token, milliseconds an image."""


def save_tokenizer(
    run: Path, model: VQModel, sizes: Mapping[str, Any], image_size: int = 256, state: Mapping[str, Any] | None = None
) -> Path:
    """sizes: the config's model section, which ``model`` was built from. state: for state.json."""
    trained = {
        "kind": "tokenizer",
        "run_dir": "x",
        "model": dict(sizes),
        "data": {"train": "x", "validation": "x", "image_size": image_size},
        "loss": {"perceptual": "none", "discriminator": {"kind": "none"}},
        "train": {"images": 256},
    }
    entries = [replicated("weights", name, tensor) for name, tensor in model.state_dict().items()]
    run.mkdir()
    store.save(run, 1, entries, state or {}, Topology(), config_text=dump(build(TokenizerConfigFile, trained, "test")))
    return run


def random_tokenizer(
    run: Path, sizes: Mapping[str, Any], seed: int, image_size: int = 256, state: Mapping[str, Any] | None = None
) -> Path:
    torch.manual_seed(seed)
    return save_tokenizer(run, build_vq(TokenizerModelSection(**dict(sizes))), sizes, image_size, state)
