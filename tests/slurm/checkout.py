"""A checkout in small, with two toys as its only programs, and llamagen called in it."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parents[2]


def checkout(folder: Path) -> Path:
    """The library, and tests/runs/toy_program.py and toy_run.py in tokenizer_training."""
    ignore = shutil.ignore_patterns("__pycache__", "embedded")
    shutil.copytree(ROOT / "llamagen_dist", folder / "llamagen_dist", ignore=ignore)
    (folder / "tokenizer_training").mkdir()
    (folder / "tokenizer_training/__init__.py").touch()
    for program in ("toy_program.py", "toy_run.py"):
        shutil.copy(ROOT / "tests/runs" / program, folder / "tokenizer_training")
    return folder


def profile(folder: Path, **keys: object) -> Path:
    """slurm/local.yaml with other keys."""
    file = folder / "profile.yaml"
    file.write_text(yaml.safe_dump({"base": str(ROOT / "slurm/local.yaml"), **keys}))
    return file


def llamagen(root: Path, *words: object, patience_s: float = 180.0) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-m", "llamagen_dist.cli", *map(str, words)],
        cwd=root,
        env={**os.environ, "PYTHONPATH": str(root), "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
        timeout=patience_s,
        check=False,
    )
