"""Released LlamaGen weight files: a bare state dict, or one under ``ema``, ``model``, ``module`` or ``state_dict``."""

import argparse
import pickle
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llamagen_dist.errors import UserError

CONTAINERS = ("ema", "model", "module", "state_dict")  # first match wins; EMA is what upstream evaluates


def unwrap(content: Any, path: Path) -> dict[str, Tensor]:
    """The state dict inside any of the containers, without the stray ``freqs_cis`` table."""
    if isinstance(content, dict):
        for key in CONTAINERS:
            if isinstance(content.get(key), dict):
                content = content[key]
                break
    if not isinstance(content, dict) or not any(isinstance(v, Tensor) for v in content.values()):
        raise UserError(f"{path}: holds no state dict (looked at the top level and under {', '.join(CONTAINERS)})")
    return {k: v for k, v in content.items() if isinstance(v, Tensor) and k != "freqs_cis"}


def read(path: str | Path) -> dict[str, Tensor]:
    """Read a .safetensors or .pt/.pth file; pickles are read with weights_only=True. Raises UserError."""
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such weights file")
    if path.suffix == ".safetensors":
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            return load_file(path)
        except (SafetensorError, OSError) as error:
            raise UserError(f"{path}: not a readable safetensors file ({error})") from None
    try:
        # LlamaGen's own training checkpoints carry their argparse.Namespace: plain values, nothing that runs
        with torch.serialization.safe_globals([argparse.Namespace]):
            # mapped where the format allows: ranks of one host then share the pages
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except (pickle.UnpicklingError, RuntimeError, EOFError, LookupError, ValueError, TypeError) as error:
        # whatever bytes that are no such file make the unpickler stumble over
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"{path}: cannot be read as tensors only ({first})") from None
    return unwrap(content, path)
