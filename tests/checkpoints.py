"""Checkpoints as tests write and look at them, in one line each."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from llamagen_dist.checkpoint.checkpoint import Checkpoint
from llamagen_dist.checkpoint.folder import complete
from llamagen_dist.checkpoint.saver import Saver
from llamagen_dist.parallel.entries import TensorEntry
from llamagen_dist.parallel.topology import Topology

__all__ = ["complete", "identity", "newest", "read_state", "read_weights", "restore", "save", "verify"]


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
    """One foreground save (collective); returns its folder."""
    saver = Saver(run_dir, topology, background=False, keep_last=keep_last)
    return saver.save(step, state.get("images_seen", 0), entries, state, config_text, classes)


def newest(run_dir: Path, warn: bool = True) -> Path | None:
    """The folder of the newest checkpoint whose every byte is as written."""
    found = Checkpoint.newest(run_dir, warn=warn)
    return None if found is None else found.folder


def verify(folder: Path) -> None:
    Checkpoint.open(folder, which="all")


def read_state(folder: Path) -> dict[str, Any]:
    return Checkpoint.open(folder).state


def read_weights(path: Path, group: str | None = None) -> dict[str, Tensor]:
    return Checkpoint.open(path, which=group).read_all()


def identity(path: Path, group: str | None = None) -> str:
    return Checkpoint.open(path, which=group).identity


def restore(folder: Path, entries: Sequence[TensorEntry]) -> None:
    Checkpoint.open(folder, which="all").restore(entries)
