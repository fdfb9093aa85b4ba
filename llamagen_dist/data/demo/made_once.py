"""Folders that are made in one go: whole or not there at all, and not made twice."""

import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from llamagen_dist.errors import UserError
from llamagen_dist.files import as_json

RECORD = "made_from.json"


@contextmanager
def made_once(out: Path, made_from: Mapping[str, Any]) -> Iterator[Path | None]:
    """Where to write the files of the new folder ``out``; None where it is there already, made from the same.

    made_from: what decides the files, kept in made_from.json. At the end of the block the folder gets its name; an
    exception leaves nothing behind. Raises UserError where ``out`` is something else.
    """
    if out.exists() or out.is_symlink():
        try:
            earlier = json.loads((out / RECORD).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            raise UserError(f"{out}: exists and is not what would be made here; choose another --out") from None
        if earlier != as_json(made_from):
            raise UserError(f"{out}: was made from something else (its {RECORD}); choose another --out, or delete it")
        yield None
        return
    aside = out.with_name(f".{out.name}.tmp")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    try:
        yield aside
        (aside / RECORD).write_text(json.dumps(made_from, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        aside.rename(out)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
