"""Tiny tokenizers and a GPT for the tests of sampling, and the command lines that use them."""

import contextlib
import io
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import save_file

from llamagen_dist.build import build_vq
from llamagen_dist.config import GPTConfigFile, TokenizerModelSection, dump
from llamagen_dist.config.section import build
from llamagen_dist.data.manifest import read_manifest, write_manifest
from llamagen_dist.models.gpt import GPT, GPTConfig
from llamagen_dist.models.vq import VQModel
from llamagen_dist.parallel.entries import replicated
from llamagen_dist.parallel.topology import Topology
from tests import checkpoints as store
from tests.image_shards import write_images
from tests.runs.token_shards import CLASSES, VOCABULARY, write_tokens
from tests.tokenizer_run import random_tokenizer

SIZE, COUNT, BATCH = 16, 22, 6
SIZES = {"n_layer": 2, "n_head": 2, "dim": 32, "multiple_of": 16}
TOKENIZER = {
    "channels": 8,
    "channel_multipliers": [1, 1, 1],
    "res_blocks": 1,
    "z_channels": 8,
    "codebook_size": VOCABULARY,
    "codebook_dim": 4,
}


def tokenizer_run(folder: Path, seed: int, state: Mapping[str, Any] | None = None, **changes: object) -> Path:
    return random_tokenizer(folder, TOKENIZER | changes, seed, SIZE, state)


def make_work(folder: Path) -> Path:
    """Random tiny tokenizers and a GPT with a head of its own, as run directories and as bare files."""
    tokenizer_run(folder / "tokenizer", 0)
    tokenizer_run(folder / "tokenizer2", 1)
    tokenizer_run(folder / "tokenizer65", 2, codebook_size=VOCABULARY + 1)
    tokens = write_tokens(folder / "tokens", 40, 0)
    named = {"tokenizer_sha256": store.identity(folder / "tokenizer"), "tokenizer_path": str(folder / "tokenizer")}
    write_manifest(tokens, replace(read_manifest(tokens), **named))
    model = gpt_run(folder, "gpt")
    save_file({k: v.contiguous() for k, v in model.state_dict().items()}, folder / "gpt.safetensors")
    write_images(folder / "images", 20, SIZE, padding=(2, 2, 2, 2))
    settings = {
        "kind": "sample",
        "checkpoint": str(folder / "gpt"),
        "tokenizer": str(folder / "tokenizer"),
        "out": str(folder / "unused"),
        "images": COUNT,
        "sets": ["model", "untrained", "unigram"],
        "batch": BATCH,
        "top_k": 40,
    }
    (folder / "sample.yaml").write_text(yaml.safe_dump(settings))
    settings = {
        "kind": "reconstruct",
        "tokenizer": str(folder / "tokenizer"),
        "images": str(folder / "images"),
        "out": str(folder / "unused"),
        "batch": BATCH,
    }
    (folder / "reconstruct.yaml").write_text(yaml.safe_dump(settings))
    return folder


def gpt_run(folder: Path, name: str, without: str = "nothing", **options: str) -> GPT:
    """A GPT with a head of its own, as a run directory.

    without: parameters whose names begin so are not in its checkpoint.
    options: of the model.
    """
    tokens = str(folder / "tokens")
    trained = {
        "kind": "gpt",
        "run_dir": "x",
        "model": {**SIZES, **options},
        "data": {"train": tokens, "validation": tokens},
        "train": {"images": 256, **({"anneal_until": 128} if options.get("order") == "rar" else {})},
    }
    config = build(GPTConfigFile, trained, "test")
    sizes: dict[str, Any] = {**SIZES, **options}
    model = GPT(GPTConfig(**sizes, vocab_size=VOCABULARY, image_tokens=16, num_classes=CLASSES)).initialize(0)
    with torch.no_grad():
        model.output.weight.normal_(std=0.2, generator=torch.Generator().manual_seed(0))
        for last in ("beta_embedding.fc2.weight", "target_positions.weight"):
            if last in model.state_dict():
                model.get_parameter(last).normal_(std=0.2, generator=torch.Generator().manual_seed(1))
    kept = {name: tensor for name, tensor in model.state_dict().items() if not name.startswith(without)}
    entries = [replicated("weights", name, tensor) for name, tensor in kept.items()]
    entries += [replicated("ema", name, tensor * 0.9) for name, tensor in kept.items()]
    entries += [replicated("optimizer", f"exp_avg/{name}", tensor) for name, tensor in kept.items()]
    (folder / name).mkdir()
    classes = [f"class {c}" for c in range(CLASSES)]
    store.save(folder / name, 1, entries, {}, Topology(), config_text=dump(config), classes=classes)
    return model


def read_tokenizer(work: Path) -> VQModel:
    """The tokenizer, in evaluation mode, without the code under test."""
    model = build_vq(TokenizerModelSection(**TOKENIZER)).eval()
    model.load_state_dict(store.read_weights(work / "tokenizer"))
    return model


def words(work: Path, out: Path, *settings: str, kind: str = "sample") -> list[str]:
    return [str(work / f"{kind}.yaml"), f"out={out}", *settings]


def quietly(main, arguments: list[str]) -> str:
    heard = io.StringIO()
    with contextlib.redirect_stdout(heard):
        main(arguments)
    return heard.getvalue()


def contents(folder: Path) -> dict[str, bytes]:
    """Everything but the record, which also says how many ranks and seconds it took."""
    files = {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}
    assert "record.json" in files
    return {name: data for name, data in files.items() if name != "record.json"}
