"""A checkout in small, with toys as its only programs, and llamagen called in it."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def checkout(folder: Path, *programs: str) -> Path:
    """The library, and test programs (paths below tests/) as the only ones, in tokenizer_training."""
    ignore = shutil.ignore_patterns("__pycache__", "embedded")
    shutil.copytree(ROOT / "llamagen_dist", folder / "llamagen_dist", ignore=ignore)
    (folder / "tokenizer_training").mkdir()
    (folder / "tokenizer_training/__init__.py").touch()
    for program in programs:
        shutil.copy(ROOT / "tests" / program, folder / "tokenizer_training")
    return folder


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
