"""The code that jobs run: a copy made at launch, so that an edit does not reach a running pipeline."""

import hashlib
import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from importlib import metadata
from pathlib import Path
from typing import Any

import llamagen_dist
from llamagen_dist.config import UserError

FOLDERS = ("llamagen_dist", "tokenizer_training", "eval", "configs", "slurm")
"""What jobs may need of the checkout."""
UNTRACKED = (".py", ".yaml", ".yml")
LIMIT_BYTES = 300 * 10**6
PACKAGES = ("torch", "deepspeed", "megatron-core", "numpy", "submitit", "webdataset", "pydantic")
ENVIRONMENT = re.compile(r"^(LLAMAGEN|OMP|MKL|CUDA|NCCL|GLOO|TORCH|WANDB|SLURM|HF)_")
_SECRET = re.compile(r"KEY|SECRET|PASSW|TOKEN(?!IZE|S\b|S_)", re.IGNORECASE)


def code_root() -> Path:
    """The folder above the package, which must hold the programs beside it. Raises UserError otherwise."""
    root = Path(llamagen_dist.__file__).resolve().parent.parent
    if not (root / "tokenizer_training" / "__init__.py").is_file():
        raise UserError(
            f"{root} holds the installed library but not the programs beside it (tokenizer_training/); "
            "run from a checkout: git clone the project, then pip install -e . in it"
        )
    return root


def take(root: Path, destination: Path) -> Path:
    """Copy the sources at ``root`` to ``destination/HASH`` (once per content), with a record.json.

    Returns that folder. Files git tracks, plus untracked, not ignored sources; without git the known folders.
    Raises UserError where they are larger than 300 MB.
    """
    files = _sources(root)
    digest = hashlib.sha256()
    for name in files:
        digest.update(f"{name}\0".encode())
        digest.update(hashlib.sha256((root / name).read_bytes()).digest())
    folder = destination / digest.hexdigest()[:12]
    if folder.exists():
        return folder
    destination.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=".taking-", dir=destination))
    try:
        for name in files:
            target = scratch / name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(root / name, target)
        (scratch / "record.json").write_text(json.dumps(record(root), indent=1) + "\n", encoding="utf-8")
        try:
            scratch.rename(folder)
        except OSError:  # not empty: another launch of this moment was quicker, and its name says that it is the same
            if not folder.exists():
                raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return folder


def _sources(root: Path) -> list[str]:
    """Relative names, sorted. Bounded in total size."""
    tracked = _git(root, "ls-files", "-z", "--", *FOLDERS, "*.py", "pyproject.toml", ":!tests")
    if tracked:
        loose = _git(root, "ls-files", "-z", "--others", "--exclude-standard", "--", *FOLDERS) or ""
        names = set(tracked.split("\0")) | {n for n in loose.split("\0") if n.endswith(UNTRACKED)}
    else:
        names = {str(p.relative_to(root)) for p in root.glob("*.py")} | {"pyproject.toml"}
        for folder in FOLDERS:
            names |= {str(p.relative_to(root)) for p in (root / folder).rglob("*") if "__pycache__" not in p.parts}
    files = sorted(n for n in names if n and (root / n).is_file() and (root / n).resolve().is_relative_to(root))
    sizes = {name: (root / name).stat().st_size for name in files}
    if sum(sizes.values()) > LIMIT_BYTES:
        largest = max(sizes, key=lambda name: sizes[name])
        raise UserError(
            f"{root}: the sources come to {sum(sizes.values()) / 1e6:.0f} MB, more than a snapshot may "
            f"hold ({LIMIT_BYTES / 1e6:.0f} MB); move large files such as {largest} out of them"
        )
    return files


def record(root: Path) -> dict[str, Any]:
    """Where the code comes from and what it runs on; secrets masked."""
    commit = _git(root, "rev-parse", "HEAD")
    versions = {"python": platform.python_version(), "llamagen-dist": llamagen_dist.__version__}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = "absent"
    return {
        "taken": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "from": str(root),
        "commit": commit.strip() if commit else None,
        "diff": _git(root, "diff", "HEAD", "--", *FOLDERS) if commit else None,
        "versions": versions,
        "host": platform.node(),
        "platform": platform.platform(),
        "cpus": os.cpu_count(),
        "command": masked_command(sys.argv),
        "environment": {
            k: "***" if _SECRET.search(k) else v for k, v in sorted(os.environ.items()) if ENVIRONMENT.match(k)
        },
    }


def masked_command(argv: list[str]) -> str:
    """The command line; values of secret-looking ``key=value`` words and ``--key value`` options masked."""
    words: list[str] = []
    hide_next = False
    for word in argv:
        key, equals, _ = word.partition("=")
        if hide_next:
            words.append("***")
        elif equals and _SECRET.search(key):
            words.append(f"{key}=***")
        else:
            words.append(word)
        hide_next = not equals and word.startswith("-") and bool(_SECRET.search(word))
    return shlex.join(words)


def _git(root: Path, *arguments: str) -> str | None:
    """git's answer, or None where there is no git, no repository, or git refuses."""
    if shutil.which("git") is None:
        return None
    done = subprocess.run(
        ["git", "-C", str(root), *arguments], capture_output=True, text=True, errors="replace", check=False
    )
    return done.stdout if done.returncode == 0 else None
