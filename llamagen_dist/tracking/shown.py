"""What every tracker shows of a run besides its lines: its id and its config, with nothing of a secret."""

import secrets
from pathlib import Path
from typing import Any

from llamagen_dist.config import load
from llamagen_dist.files import json_if_there, write_text
from llamagen_dist.tracking.provenance import masked_values


def run_id(folder: Path) -> str:
    """The id of the run in every tracker: RUN/wandb_id, made by the first who asks."""
    file = folder / "wandb_id"
    if not file.exists():
        write_text(file, f"{secrets.token_hex(4)}\n")
    return file.read_text(encoding="utf-8").strip()


def public_config(folder: Path) -> dict[str, Any]:
    """The resolved config, secrets masked, and under ``record`` the commit, the versions and the host."""
    config = masked_values(load(folder / "config.yaml").model_dump(mode="json"))
    record = json_if_there(folder / "record.json") or {}
    # the diff is the code of the moment, and may hold anything
    return {**config, "record": {name: value for name, value in record.items() if name != "diff"}}
