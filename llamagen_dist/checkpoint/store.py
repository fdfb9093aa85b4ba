"""One checkpoint directory per step, the same for every layout; valid only once COMPLETE is there.

``step_00012000/`` holds full tensors in safetensors shards, one or more per file family and writer rank
(``weights-00000-000.safetensors``, ``optimizer-00001-001.safetensors`` …), ``index.json`` (tensor -> file, and each
file's sha256), ``state.json``, ``config.yaml``, ``classes.json`` and, written last after every rank has reported its
hashes, ``COMPLETE``. It is removed first.
"""

import hashlib
import json
import math
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from llamagen_dist.checkpoint.entries import Entry
from llamagen_dist.config import Section, UserError, load
from llamagen_dist.files import sha256_file, write_text
from llamagen_dist.parallel.topology import Topology

FORMAT = 1
SHARD_BYTES = 1 << 30  # a writer starts another file after this much, which also bounds its memory


def _deal(entries: Sequence[Entry], world: int) -> list[int]:
    """The writer rank of each entry: always the least loaded so far, so that all ranks write about as much."""
    load_of = [0] * world
    writers = []
    for entry in entries:
        writer = load_of.index(min(load_of))
        load_of[writer] += math.prod(entry.shape)
        writers.append(writer)
    return writers


class _Writer:
    """Collects the tensors dealt to this rank and flushes them into files of bounded size."""

    def __init__(self, folder: Path, rank: int) -> None:
        self.folder, self.rank = folder, rank
        self.waiting: dict[str, dict[str, Tensor]] = {}
        self.files: dict[str, str] = {}  # file -> sha256
        self.where: dict[str, str] = {}  # group:key -> file

    def add(self, group: str, key: str, tensor: Tensor) -> None:
        batch = self.waiting.setdefault(group, {})
        batch[key] = tensor.detach().cpu().contiguous().clone()
        if sum(t.nbytes for t in batch.values()) >= SHARD_BYTES:
            self.flush(group)

    def flush(self, group: str) -> None:
        batch = self.waiting.pop(group, {})
        if not batch:
            return
        from safetensors.torch import save_file

        name = f"{group}-{self.rank:05d}-{len(self.files):03d}.safetensors"
        save_file(batch, self.folder / name)
        with open(self.folder / name, "rb") as file:
            os.fsync(file.fileno())
        self.files[name] = sha256_file(self.folder / name)
        self.where.update({f"{group}:{key}": name for key in batch})


def save(
    run_dir: Path,
    step: int,
    entries: Sequence[Entry],
    state: Mapping[str, Any],
    topology: Topology,
    *,
    config_text: str,
    classes: Sequence[str] | None = None,
    keep_last: int = 2,
) -> Path:
    """Write ``run_dir/checkpoints/step_…`` (collective) and prune older ones. Returns its path.

    An OSError (disk full) leaves the earlier checkpoints as they were.
    """
    folder = run_dir / "checkpoints" / f"step_{step:08d}"
    if topology.rank == 0:
        if folder.exists():
            _remove(folder)
        folder.mkdir(parents=True)
    topology.barrier()
    writer = _Writer(folder, topology.rank)
    for entry, owner in zip(entries, _deal(entries, topology.world), strict=True):
        tensor = entry.read(owner)
        if owner == topology.rank:
            assert tensor is not None, f"{entry.key}: the writer rank got no tensor"
            writer.add(entry.group, entry.key, tensor)
    for group in list(writer.waiting):
        writer.flush(group)
    reports: list[Any] = [(writer.files, writer.where)]
    if topology.world > 1:
        reports = [None] * topology.world
        dist.all_gather_object(reports, (writer.files, writer.where))
    if topology.rank == 0:
        index = {
            "format": FORMAT,
            "files": {k: v for files, _ in reports for k, v in files.items()},
            "tensors": {k: v for _, where in reports for k, v in where.items()},
        }
        write_text(folder / "index.json", json.dumps(index, indent=1, sort_keys=True))
        write_text(folder / "state.json", json.dumps(dict(state), indent=1, sort_keys=True))
        write_text(folder / "config.yaml", config_text)
        if classes is not None:
            write_text(folder / "classes.json", json.dumps(list(classes), ensure_ascii=False))
        write_text(folder / "COMPLETE", sha256_file(folder / "index.json") + "\n")
        for old in complete(run_dir)[:-keep_last]:
            _remove(old)
    topology.barrier()
    return folder


def _remove(folder: Path) -> None:
    (folder / "COMPLETE").unlink(missing_ok=True)
    shutil.rmtree(folder)


def complete(run_dir: Path) -> list[Path]:
    """The committed checkpoints of a run, oldest first."""
    return sorted(f.parent for f in (run_dir / "checkpoints").glob("step_*/COMPLETE"))


def verify(folder: Path) -> None:
    """Raise UserError naming the first file of a checkpoint that is missing or has other bytes than were written."""
    index_path = folder / "index.json"
    if not (folder / "COMPLETE").exists():
        raise UserError(f"{folder}: not a complete checkpoint (no COMPLETE file); its writing was interrupted")
    if not index_path.exists() or (folder / "COMPLETE").read_text().strip() != sha256_file(index_path):
        raise UserError(f"{index_path}: missing or not the file that was written (sha256 differs)")
    for name, expected in json.loads(index_path.read_text())["files"].items():
        path = folder / name
        if not path.exists():
            raise UserError(f"{path}: missing from the checkpoint")
        found = sha256_file(path)
        if found != expected:
            raise UserError(f"{path}: damaged (sha256 {found}, written as {expected})")


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
    return json.loads((folder / "state.json").read_text())


def restore(folder: Path, entries: Sequence[Entry]) -> None:
    """Put every tensor back through its entry, one at a time (every rank calls it and reads what it needs).

    Raises UserError where the checkpoint lacks a tensor or has another shape.
    """
    from safetensors import safe_open

    where = json.loads((folder / "index.json").read_text())["tensors"]
    for entry in entries:
        name = where.get(f"{entry.group}:{entry.key}")
        if name is None:
            raise UserError(
                f"{folder}: holds no {entry.group} tensor {entry.key}; it was written by another kind of model"
            )
        with safe_open(folder / name, framework="pt") as file:
            tensor = file.get_tensor(entry.key)
        if tuple(tensor.shape) != tuple(entry.shape):
            raise UserError(
                f"{folder}: {entry.key} has shape {tuple(tensor.shape)}, the model wants {tuple(entry.shape)}"
            )
        entry.write(tensor)


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
    """Full tensors by name from a run directory (newest checkpoint), a step directory, a .safetensors or a .pt file."""
    path = Path(path)
    if not path.exists():
        raise UserError(f"{path}: no such checkpoint")
    if path.is_file():
        from llamagen_dist.checkpoint import llamagen

        return llamagen.read(path)
    from safetensors.torch import load_file

    folder = _locate(path)
    where = json.loads((folder / "index.json").read_text())["tensors"]
    names = sorted({name for key, name in where.items() if key.startswith(group + ":")})
    return {key: tensor for name in names for key, tensor in load_file(folder / name).items()}


def read_config(path: str | Path) -> Section | None:
    """The config a checkpoint was trained with; None for a bare weights file."""
    path = Path(path)
    return None if path.is_file() else load(_locate(path) / "config.yaml")


def identity(path: str | Path) -> str:
    """``identity_of`` the weights at ``path``."""
    return identity_of(read_weights(path))


def identity_of(weights: Mapping[str, Tensor]) -> str:
    """sha256 (hex) over names, shapes and bytes of the weights, the same however they are spread over files."""
    digest = hashlib.sha256()
    for name, tensor in sorted(weights.items()):
        digest.update(f"{name}|{tensor.dtype}|{tuple(tensor.shape)}|".encode())
        digest.update(tensor.contiguous().view(torch.uint8).numpy().tobytes() if tensor.numel() else b"")
    return digest.hexdigest()
