"""Folders that ``save_pretrained`` of transformers left: which files decide what comes out, and the model in them.

Nothing is ever fetched. ``called`` begins every message: the folder, and what it is wanted for.
"""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from llamagen_dist.errors import UserError
from llamagen_dist.files import cut_short, sha256_file

TOKENIZER_FILES = (
    "tokenizer.json", "spiece.model", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
)  # fmt: skip


def model_files(path: Path, called: str, kind: str, hint: str, parts: Mapping[str, Sequence[str]]) -> list[Path]:
    """The files that decide a model's output, in a fixed order: config.json, weights, and those of ``parts``.

    kind: the model_type that config.json must name.
    hint: ends the messages.
    parts: name of a part -> its possible files, of which at least one must be there.
    Raises UserError where there is no such model.
    """
    if not path.is_dir():
        raise UserError(f"{called}: there is no such folder; {hint}")
    config = path / "config.json"
    try:
        there = json.loads(config.read_text(encoding="utf-8")).get("model_type")
    except (OSError, ValueError, AttributeError):
        raise UserError(f"{called}: no config.json can be read in it; {hint}") from None
    if there != kind:
        raise UserError(f"{called}: its config.json says model_type {there!r}, not {kind!r}; {hint}")
    files = [config, *(sorted(path.glob("*.safetensors")) or sorted(path.glob("pytorch_model*.bin")))]
    if len(files) == 1:
        raise UserError(f"{called}: no weights in it (*.safetensors or pytorch_model*.bin); {hint}")
    for part, names in parts.items():
        present = [path / name for name in names if (path / name).is_file()]
        if not present:
            raise UserError(f"{called}: no {part} in it ({' or '.join(names[:2])}); {hint}")
        files += present
    return files


def load_model(called: str, files: Sequence[Path], read: Callable[[], Any]) -> Any:
    """The model, frozen and in evaluation mode.

    read: returns what ``from_pretrained(..., output_loading_info=True)`` does.
    Raises UserError for files that are damaged, or lack some of the weights.
    """
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        model, report = read()
    except MemoryError:
        raise
    except Exception as error:  # a damaged file makes the readers stumble over anything
        cut = next((file for file in files if file.suffix != ".json" and cut_short(file)), None)
        why = " ".join(str(error).split())[:300] or type(error).__name__
        if cut is not None:
            why = f"{cut.name} ends too early, most likely because its download was interrupted; fetch it again"
        raise UserError(f"{called}: cannot be loaded: {why}") from None
    finally:
        if shown:
            logging.enable_progress_bar()
    lacking = sorted(report["missing_keys"]) + sorted(str(key) for key in report["mismatched_keys"])
    if lacking:
        raise UserError(
            f"{called}: {len(lacking)} of its weights are not in the files or of another shape, such as {lacking[0]}; "
            "copy the folder again"
        )
    return model.eval().requires_grad_(False)


def sha256_of(files: Sequence[Path]) -> str:
    """sha256 (hex) over the names and contents of the files."""
    digest = hashlib.sha256()
    for file in files:
        digest.update(f"{file.name} {sha256_file(file)}\n".encode())
    return digest.hexdigest()
