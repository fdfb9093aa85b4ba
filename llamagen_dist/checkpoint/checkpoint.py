"""One open checkpoint: located and verified once, by rank 0 for all, and then read tensor by tensor.

``step_00012000/`` holds full tensors in safetensors shards, one or more per file family and writer rank
(``weights-00000-000.safetensors``, ``optimizer-00001-001.safetensors`` …), ``index.json`` (tensor -> file, and each
file's sha256), ``state.json``, ``config.yaml``, ``classes.json`` and, written last after every rank has reported its
hashes, ``COMPLETE``. It is removed first. The same files serve every layout.
"""

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llamagen_dist.checkpoint import llamagen
from llamagen_dist.checkpoint.folder import complete
from llamagen_dist.config import Section, load
from llamagen_dist.console import LOG
from llamagen_dist.errors import UserError
from llamagen_dist.files import read_json, sha256_file
from llamagen_dist.parallel.entries import TensorEntry
from llamagen_dist.parallel.topology import Topology

ALONE = Topology()


class Checkpoint:
    """Weights and what is known about them: of a run (its newest good checkpoint), a step folder, or a bare file.

    Only files that will be read are hashed, and only by rank 0: for sampling not the optimizer's, which are two thirds
    of a checkpoint. Every rank then maps the files, so that the ranks of one machine share the pages and the shared
    disk is read once per machine. A tensor from ``read`` is such a mapping: its bytes are fetched when they are used.
    """

    path: Path
    """As it was named."""
    folder: Path | None
    """The step folder; None for a bare file."""

    def __init__(
        self, path: Path, folder: Path | None, which: str | None, topology: Topology, files: dict[str, Any]
    ) -> None:
        """Use ``open`` or ``newest``. files: those that verifying has opened already, by name."""
        self.path, self.folder, self._topology, self._files = path, folder, topology, files
        self._bare: dict[str, Tensor] = {}
        self._index: dict[str, str] = {}
        if folder is None:
            weights = llamagen.unwrap(llamagen.load(path), path, None if which == "all" else which)
            self._bare = weights.tensors
            for note in weights.notes:
                topology.log0(f"{path}: {note}")
            return
        self._index = read_index(folder)["tensors"]
        self._file_of = _file_of(self._index, "weights" if which in (None, "all") else which)
        if not self._file_of:
            groups = ", ".join(sorted({full.split(":", 1)[0] for full in self._index}))
            hint = "; it was trained without (ema.decay: 0)" if which == "ema" else ""
            raise UserError(f"{folder}: holds no {which or 'weights'}, only {groups}{hint}")

    @classmethod
    def open(cls, path: str | Path, topology: Topology = ALONE, which: str | None = None) -> "Checkpoint":
        """Locate and verify what ``path`` names (collective).

        path: a run directory, a step_… folder, or a .safetensors, .pt or .pth file.
        topology: the ranks that call it.
        which: ``weights``, ``ema``, the moving average, or another average's key; ``all`` also verifies what only a
            resume reads. None: a run's trained weights; of a file that holds an average, that, as LlamaGen itself
            evaluates it.

        Raises UserError on all ranks: nothing there, damaged, no such group.
        """
        path = Path(path)
        files: dict[str, Any] = {}
        folder = topology.broadcast_from_rank0(lambda: _locate(path, which, files))
        return cls(path, folder, which, topology, files)

    @classmethod
    def newest(
        cls, run_dir: Path, topology: Topology = ALONE, which: str = "all", warn: bool = True
    ) -> "Checkpoint | None":
        """The newest good checkpoint of a run, None without one (collective).

        run_dir: the run's directory.
        topology: the ranks that call it.
        which: as in ``open``; by default all that a resume reads.
        warn: log a line for every damaged checkpoint that is passed over.
        """
        files: dict[str, Any] = {}
        folder = topology.broadcast_from_rank0(lambda: _newest(run_dir, which, files, warn))
        return None if folder is None else cls(run_dir, folder, which, topology, files)

    @cached_property
    def config(self) -> Section | None:
        """The config it was trained with; None for a bare file."""
        return None if self.folder is None else load(self.folder / "config.yaml")

    @cached_property
    def state(self) -> dict[str, Any]:
        """state.json; empty for a bare file."""
        return {} if self.folder is None else read_json(self.folder / "state.json")

    @cached_property
    def classes(self) -> list[str] | None:
        """The names of its classes, label 0 first, where they are known."""
        file = None if self.folder is None else self.folder / "classes.json"
        if file is None or not file.exists():
            return None
        return [str(name) for name in json.loads(file.read_text(encoding="utf-8"))]

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Of every tensor, by name; reads no tensor."""
        if self.folder is None:
            return {name: tuple(tensor.shape) for name, tensor in self._bare.items()}
        return {key: tuple(self._file(name).get_slice(key).get_shape()) for key, name in self._file_of.items()}

    def read(self, name: str) -> Tensor:
        """One full tensor, in the type in which it was saved."""
        if self.folder is None:
            return self._bare[name]
        tensor: Tensor = self._file(self._file_of[name]).get_tensor(name)
        return tensor

    def read_all(self) -> dict[str, Tensor]:
        """Every tensor by name."""
        return {name: self.read(name) for name in self.shapes}

    @cached_property
    def identity(self) -> str:
        """``identity_of`` the weights (collective the first time: rank 0 computes it)."""
        return self._topology.broadcast_from_rank0(lambda: identity_of(self.read_all()))

    def restore(self, entries: Sequence[TensorEntry]) -> None:
        """Put every tensor back through its entry, one at a time (every rank calls it, in the same order).

        Each file is mapped, not read: what an entry cuts away of a tensor costs nothing.

        entries: of the model and its optimizer, whatever layout saved the checkpoint.

        Raises UserError where the checkpoint lacks a tensor or has another shape.
        """
        by_file: dict[str, list[TensorEntry]] = {}
        for entry in entries:
            name = self._index.get(f"{entry.group}:{entry.key}")
            if name is None:
                raise UserError(
                    f"{self.folder}: holds no {entry.group} tensor {entry.key}; it was written by another kind of model"
                )
            by_file.setdefault(name, []).append(entry)
        assert self.folder is not None
        for name, inside in by_file.items():
            file, where = self._file(name), self.folder / name
            for entry in inside:
                shape = tuple(file.get_slice(entry.key).get_shape())
                if shape != tuple(entry.shape):
                    raise UserError(f"{where}: {entry.key} has shape {shape}, the model wants {tuple(entry.shape)}")
                entry.write(file.get_tensor(entry.key))
            del file
            self._files.pop(name)  # unmapped before the next: a resident page here is one less for the model

    def _file(self, name: str) -> Any:
        if name not in self._files:
            assert self.folder is not None
            self._files[name] = opened(self.folder / name)
        return self._files[name]


def identity_of(weights: Mapping[str, Tensor]) -> str:
    """sha256 (hex) over names, shapes and bytes of the weights, the same however they are spread over files."""
    digest = hashlib.sha256()
    for name, tensor in sorted(weights.items()):
        digest.update(f"{name}|{tensor.dtype}|{tuple(tensor.shape)}|".encode())
        digest.update(tensor.contiguous().view(-1).view(torch.uint8).numpy().data if tensor.numel() else b"")
    return digest.hexdigest()


def opened(path: Path) -> Any:
    """A safetensors file, memory-mapped: of a tensor only what is looked at is read. Raises UserError."""
    from safetensors import SafetensorError, safe_open

    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: not a readable safetensors file ({error})") from None


def read_index(folder: Path) -> dict[str, Any]:
    """index.json: ``files`` (name -> sha256) and ``tensors`` (group:key -> name). Raises UserError."""
    index = read_json(folder / "index.json")
    if not all(isinstance(index.get(part), dict) for part in ("files", "tensors")):
        raise UserError(f"{folder / 'index.json'}: not the index of a checkpoint (no files or no tensors in it)")
    return index


# --- on rank 0 ---


def _locate(path: Path, which: str | None, files: dict[str, Any]) -> Path | None:
    """The verified step folder that ``path`` names; None where it is a file."""
    if not path.exists():
        raise UserError(f"{path}: no such checkpoint")
    if path.is_file():
        return None
    if (path / "index.json").exists():
        _verify(path, which or "weights", files)
        return path
    folder = _newest(path, which or "weights", files, warn=True)
    if folder is None:
        raise UserError(
            f"{path}: no complete checkpoint there; give a run directory, a step_… folder or a weights file"
        )
    return folder


def _newest(run_dir: Path, which: str, files: dict[str, Any], warn: bool) -> Path | None:
    for folder in reversed(complete(run_dir)):
        files.clear()
        try:
            _verify(folder, which, files)
        except UserError as error:
            if warn:
                LOG.warning(f"checkpoint skipped: {error}")
            continue
        return folder
    return None


def _verify(folder: Path, which: str, files: dict[str, Any]) -> None:
    """Raise UserError naming the first file that is missing or has other bytes than were written.

    which: only the files with these tensors, beside the small ones. files: receives them, opened.
    """
    if not (folder / "COMPLETE").exists():
        raise UserError(f"{folder}: not a complete checkpoint (no COMPLETE file); its writing was interrupted")
    index_path = folder / "index.json"
    # a chain of hashes: COMPLETE has the index's, the index has those of all other files
    try:
        written, sha256 = (folder / "COMPLETE").read_text().strip(), sha256_file(index_path)
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{index_path}: missing or unreadable ({error})") from None
    if written != sha256:
        raise UserError(f"{index_path}: damaged (sha256 {sha256}, written as {written})")
    index = read_index(folder)
    keys_of: dict[str, list[str]] = {}
    tensors = index["tensors"]
    groups = sorted({full.split(":", 1)[0] for full in tensors}) if which == "all" else [which]
    for group in groups:
        for key, name in _file_of(tensors, group).items():
            keys_of.setdefault(name, []).append(key)
    small = {name for name in index["files"] if not name.endswith(".safetensors")}
    names = sorted(small | keys_of.keys())
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:  # hashing releases the interpreter lock
        for problem in pool.map(lambda name: _problem(folder / name, index["files"].get(name)), names):
            if problem is not None:
                raise UserError(problem)
    for name, keys in sorted(keys_of.items()):
        files[name] = opened(folder / name)
        inside = set(files[name].keys())
        missing = next((key for key in keys if key not in inside), None)
        if missing is not None:
            raise UserError(f"{folder / name}: damaged (the tensor {missing} that index.json names is not in it)")


def _problem(path: Path, expected: str | None) -> str | None:
    try:
        sha256 = sha256_file(path)
    except FileNotFoundError:
        return f"{path}: missing from the checkpoint"
    except OSError as error:
        return f"{path}: cannot be read ({error.strerror})"
    return None if sha256 == expected else f"{path}: damaged (sha256 {sha256}, written as {expected})"


def _file_of(tensors: Mapping[str, str], group: str) -> dict[str, str]:
    """key -> file of one group, from ``group:key`` -> file."""
    of = {full.split(":", 1)[1]: name for full, name in sorted(tensors.items()) if full.startswith(f"{group}:")}
    if group.startswith("ema") and of:  # buffers are not trained and have no average: the model's own belong to it
        of = _file_of(tensors, "weights") | of
    return of
