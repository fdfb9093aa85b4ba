"""Launches of a program that only counts, from a checkout in small, on the cluster that SLURM_CONF names."""

import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from llamagen_dist.launch.folder import JobFolder
from llamagen_dist.launch.slurm import lock
from tests.runs.checkout import ROOT, checkout, llamagen


def profile(folder: Path, **keys: object) -> Path:
    """slurm/local.yaml with other keys."""
    file = folder / "profile.yaml"
    file.write_text(yaml.safe_dump({"base": str(ROOT / "slurm/local.yaml"), **keys}))
    return file


class Toy:
    """A small checkout whose only program counts, and the launches of it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.root = folder / "checkout"
        checkout(self.root, "slurm/counting.py")

    def launch(self, name: str, count: str, *more: str, **profile: Any) -> subprocess.CompletedProcess[str]:
        file = self.folder / f"{name}.cluster.yaml"
        base = yaml.safe_load((ROOT / "slurm/local.yaml").read_text())
        file.write_text(yaml.safe_dump({**base, "exports": {"COUNT": count}, **profile}))
        config = ROOT / "configs/gpt/quickstart.yaml"
        words = ("launch", "tokenizer_training.counting", config, f"run_dir={self.run(name)}", "--cluster", file, *more)
        return llamagen(self.root, *words)

    def run(self, name: str) -> Path:
        return self.folder / name

    def events(self, name: str) -> list[dict[str, Any]]:
        return JobFolder.of(self.run(name)).events()

    def job(self, name: str) -> str:
        held = lock.read(JobFolder.of(self.run(name)))
        assert held is not None
        return held.jobs[0]

    def steps(self, name: str) -> list[int]:
        file = self.run(name) / "steps.txt"
        return [int(line) for line in file.read_text().split()] if file.exists() else []

    def last(self, name: str) -> dict[str, Any]:
        return (self.events(name) or [{"event": "none"}])[-1]


def wait_for(condition: Callable[[], object], patience_s: float = 60.0) -> None:
    deadline = time.monotonic() + patience_s
    while not condition():
        assert time.monotonic() < deadline, f"waited {patience_s:.0f} s for {condition}"
        time.sleep(0.1)
