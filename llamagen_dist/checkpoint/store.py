"""One checkpoint directory per step, the same for every layout; valid only once COMPLETE is there.

``step_00012000/`` holds full tensors in safetensors shards, one or more per file family and writer rank
(``weights-00000-000.safetensors``, ``optimizer-00001-001.safetensors`` …), ``index.json`` (tensor -> file, and each
file's sha256), ``state.json``, ``config.yaml``, ``classes.json`` and, written last after every rank has reported its
hashes, ``COMPLETE``. It is removed first.
"""

import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llamagen_dist.checkpoint.folder import complete
from llamagen_dist.checkpoint.saver import Saver
from llamagen_dist.config import Section, load
from llamagen_dist.errors import UserError
from llamagen_dist.files import sha256_file
from llamagen_dist.parallel.entries import TensorEntry
from llamagen_dist.parallel.topology import Topology

__all__ = ["complete", "save"]


def save(
    run_dir: Path,
    step: int,
    entries: Sequence[TensorEntry],
    state: Mapping[str, Any],
    topology: Topology,
    *,
    config_text: str,
    classes: Sequence[str] | None = None,
    keep_last: int = 2,
) -> Path:
    """Write ``run_dir/checkpoints/step_…`` (collective), prune older ones, return its path. Raises UserError.

    A training run keeps a Saver instead, which also writes in the background.
    """
    saver = Saver(run_dir, topology, background=False, keep_last=keep_last)
    return saver.save(step, state.get("images_seen", 0), entries, state, config_text, classes)


def verify(folder: Path) -> None:
    """Raise UserError naming the first file of a checkpoint that is missing or has other bytes than were written."""
    if not (folder / "COMPLETE").exists():
        raise UserError(f"{folder}: not a complete checkpoint (no COMPLETE file); its writing was interrupted")
    index_path = folder / "index.json"
    try:
        told, found = (folder / "COMPLETE").read_text().strip(), sha256_file(index_path)
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{index_path}: missing or unreadable ({error})") from None
    if told != found:
        raise UserError(f"{index_path}: damaged (sha256 {found}, written as {told})")
    index = read_index(folder)
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:  # hashing leaves the interpreter lock alone
        for problem in pool.map(lambda item: _problem(folder / item[0], item[1]), sorted(index["files"].items())):
            if problem is not None:
                raise UserError(problem)
    for name, keys in _keys_of(index["tensors"]).items():
        with opened(folder / name) as file:
            held = set(file.keys())
        missing = next((key for key in keys if key not in held), None)
        if missing is not None:
            raise UserError(f"{folder / name}: damaged (the tensor {missing} that index.json names is not in it)")


def _problem(path: Path, expected: str) -> str | None:
    try:
        found = sha256_file(path)
    except FileNotFoundError:
        return f"{path}: missing from the checkpoint"
    except OSError as error:
        return f"{path}: cannot be read ({error.strerror})"
    return None if found == expected else f"{path}: damaged (sha256 {found}, written as {expected})"


def read_index(folder: Path) -> dict[str, Any]:
    """index.json: ``files`` (name -> sha256) and ``tensors`` (group:key -> name). Raises UserError."""
    index = _read_json(folder / "index.json")
    if not all(isinstance(index.get(part), dict) for part in ("files", "tensors")):
        raise UserError(f"{folder / 'index.json'}: not the index of a checkpoint (no files or no tensors in it)")
    return index


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({error})") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: cannot be read (not a JSON object)")
    return content


def opened(path: Path) -> Any:
    """A safetensors file, memory-mapped: of a tensor only what is looked at is read. Raises UserError."""
    from safetensors import SafetensorError, safe_open

    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: not a readable safetensors file ({error})") from None


def _keys_of(tensors: Mapping[str, str], group: str | None = None) -> dict[str, list[str]]:
    """file -> keys, from ``group:key`` -> file."""
    found: dict[str, list[str]] = {}
    for full, name in tensors.items():
        of, key = full.split(":", 1)
        if group is None or of == group:
            found.setdefault(name, []).append(key)
    return dict(sorted(found.items()))


def newest(run_dir: Path, warn: bool = True) -> Path | None:
    """The newest checkpoint whose every byte is as written; a damaged one is named and the one before it tried."""
    for folder in reversed(complete(run_dir)):
        try:
            verify(folder)
        except UserError as error:
            if warn:
                print(f"checkpoint skipped: {error}", flush=True)
            continue
        return folder
    return None


def read_state(folder: Path) -> dict[str, Any]:
    """state.json. Raises UserError."""
    return _read_json(folder / "state.json")


def restore(folder: Path, entries: Sequence[TensorEntry]) -> None:
    """Put every tensor back through its entry, one at a time (every rank calls it, in the same order).

    Each file is opened once and mapped, not read: what an entry cuts away of a tensor costs nothing. Raises UserError
    where the checkpoint lacks a tensor or has another shape.
    """
    where = read_index(folder)["tensors"]
    by_file: dict[str, list[TensorEntry]] = {}
    for entry in entries:
        name = where.get(f"{entry.group}:{entry.key}")
        if name is None:
            raise UserError(
                f"{folder}: holds no {entry.group} tensor {entry.key}; it was written by another kind of model"
            )
        by_file.setdefault(name, []).append(entry)
    for name, found in by_file.items():
        with opened(folder / name) as file:
            held = set(file.keys())
            for entry in found:
                if entry.key not in held:
                    raise UserError(
                        f"{folder / name}: lacks the tensor {entry.key}, which index.json says is in it; "
                        "remove this checkpoint to go on from the one before"
                    )
                shape = tuple(file.get_slice(entry.key).get_shape())
                if shape != tuple(entry.shape):
                    raise UserError(
                        f"{folder / name}: {entry.key} has shape {shape}, the model wants {tuple(entry.shape)}"
                    )
                entry.write(file.get_tensor(entry.key))


def _locate(path: Path) -> Path:
    """A run directory or step directory -> a verified step directory."""
    if (path / "index.json").exists():
        verify(path)
        return path
    found = newest(path)
    if found is None:
        raise UserError(
            f"{path}: no complete checkpoint there; give a run directory, a step_… folder or a weights file"
        )
    return found


def read_weights(path: str | Path, group: str = "weights") -> dict[str, Tensor]:
    """Full tensors by name from a run directory (newest checkpoint), a step directory, a .safetensors or a .pt file.

    group: ``weights``, or ``ema`` where the run kept one. Raises UserError: nothing there, damaged, no such group.
    """
    return open_weights(path, group).read_all()


class Weights:
    """The tensors of one group by name; shapes are known at once, bytes are read one tensor at a time."""

    def __init__(
        self,
        folder: Path | None,
        shapes: Mapping[str, tuple[int, ...]],
        read: Callable[[str], Tensor],
    ) -> None:
        self.folder = folder
        """The step folder they lie in; None for a bare file."""
        self.shapes, self.read = shapes, read

    def read_all(self) -> dict[str, Tensor]:
        return {name: self.read(name) for name in self.shapes}


def open_weights(path: str | Path, group: str = "weights", verified: bool = True) -> Weights:
    """``read_weights`` without reading. verified=False: another rank has looked at the hashes already."""
    path = Path(path)
    if not path.exists():
        raise UserError(f"{path}: no such checkpoint")
    if path.is_file():
        if group != "weights":
            raise UserError(f"{path}: one file of weights has no {group} beside them; give a run directory")
        from llamagen_dist.checkpoint import llamagen

        weights = llamagen.read(path)
        return Weights(None, {name: tuple(tensor.shape) for name, tensor in weights.items()}, weights.__getitem__)
    folder = _locate(path) if verified else path
    tensors = read_index(folder)["tensors"]
    file_of = _named(folder, tensors, group)
    if not file_of:
        groups = ", ".join(sorted({full.split(":", 1)[0] for full in tensors}))
        hint = "; it was trained without (ema.decay: 0)" if group == "ema" else ""
        raise UserError(f"{folder}: holds no {group}, only {groups}{hint}")
    if group == "ema":  # buffers are not trained and have no average: the model's own belong to it
        file_of = _named(folder, tensors, "weights") | file_of
    shapes = {name: tuple(file.get_slice(name).get_shape()) for name, file in file_of.items()}
    return Weights(folder, shapes, lambda name: file_of[name].get_tensor(name))


def _named(folder: Path, tensors: Mapping[str, str], group: str) -> dict[str, Any]:
    """key -> the open file that holds it, for one group."""
    return {
        key: file for name, keys in _keys_of(tensors, group).items() for file in [opened(folder / name)] for key in keys
    }


def read_config(path: str | Path) -> Section | None:
    """The config a checkpoint was trained with; None for a bare weights file."""
    path = Path(path)
    return None if path.is_file() else load(_locate(path) / "config.yaml")


def identity(path: str | Path, group: str = "weights") -> str:
    """``identity_of`` the weights at ``path``."""
    return identity_of(read_weights(path, group))


def identity_of(weights: Mapping[str, Tensor]) -> str:
    """sha256 (hex) over names, shapes and bytes of the weights, the same however they are spread over files."""
    digest = hashlib.sha256()
    for name, tensor in sorted(weights.items()):
        digest.update(f"{name}|{tensor.dtype}|{tuple(tensor.shape)}|".encode())
        digest.update(tensor.contiguous().view(-1).view(torch.uint8).numpy().data if tensor.numel() else b"")
    return digest.hexdigest()
