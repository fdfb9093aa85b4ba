"""The code that jobs run: a copy made at launch, so that an edit does not reach a running pipeline."""

import hashlib
import json
import shutil
import tempfile
from pathlib import Path

import llamagen_dist
from llamagen_dist.errors import UserError
from llamagen_dist.tracking.provenance import SOURCE_FOLDERS, git, record

UNTRACKED = (".py", ".yaml", ".yml", ".j2", ".css", ".mplstyle")
LIMIT_BYTES = 300 * 10**6


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
    tracked = git(root, "ls-files", "-z", "--", *SOURCE_FOLDERS, "*.py", "pyproject.toml", ":!tests")
    if tracked:
        loose = git(root, "ls-files", "-z", "--others", "--exclude-standard", "--", *SOURCE_FOLDERS) or ""
        names = set(tracked.split("\0")) | {n for n in loose.split("\0") if n.endswith(UNTRACKED)}
    else:
        names = {str(p.relative_to(root)) for p in root.glob("*.py")} | {"pyproject.toml"}
        for folder in SOURCE_FOLDERS:
            names |= {str(p.relative_to(root)) for p in (root / folder).rglob("*") if "__pycache__" not in p.parts}
    files = sorted(n for n in names if n and (root / n).is_file() and (root / n).resolve().is_relative_to(root))
    sizes = {name: (root / name).stat().st_size for name in files}
    total = sum(sizes.values())
    if total > LIMIT_BYTES:
        largest = max(sizes, key=lambda name: sizes[name])
        raise UserError(
            f"{root}: the sources come to {total / 1e6:.0f} MB, more than a snapshot may hold "
            f"({LIMIT_BYTES / 1e6:.0f} MB); move large files such as {largest} out of them"
        )
    return files
