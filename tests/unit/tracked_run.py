"""A run directory as fit leaves it, for tests of what trackers are sent of it."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from llamagen_dist.config import dump, load
from llamagen_dist.tracking import wandb_file

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
BATCH = 64


def tracked_run(folder: Path, *settings: str) -> Path:
    """A GPT run in ``folder`` that has not begun yet; settings: of its config."""
    folder.mkdir(parents=True)
    words = ["train.images=2560", f"train.global_batch={BATCH}", "data.train=t", "data.validation=v", "ladder={}"]
    config = load(CONFIGS / "gpt/quickstart.yaml", [*words, f"run_dir={folder}", *settings])
    (folder / "config.yaml").write_text(dump(config))
    (folder / "record.json").write_text(
        json.dumps({"torch": "2.14.1", "host": "node-7", "commit": "abc", "diff": "no"})
    )
    return folder


def train(folder: Path, first: int, last: int, loss: float = 9.0) -> None:
    """Steps ``first`` to ``last``, the last with a validation, which is a line of its own."""
    with open(folder / "metrics.jsonl", "a") as file:
        for step in range(first, last + 1):
            line = {"step": step, "images_seen": step * BATCH, "loss": loss - step / 100, "samples": "0123456789abcdef"}
            file.write(json.dumps(line) + "\n")
        file.write(json.dumps({"step": last, "images_seen": last * BATCH, "val_loss": loss - last / 200}) + "\n")


def save(folder: Path, step: int) -> None:
    checkpoint = folder / f"checkpoints/step_{step:08d}"
    checkpoint.mkdir(parents=True)
    (checkpoint / "state.json").write_text(json.dumps({"step": step, "images_seen": step * BATCH}))
    (checkpoint / "weights-00001.safetensors").write_bytes(b"weights")
    (checkpoint / "COMPLETE").write_text("x")


def cut(folder: Path, step: int) -> None:
    """What a resume from the checkpoint at ``step`` leaves of metrics.jsonl."""
    lines = (folder / "metrics.jsonl").read_text().splitlines(keepends=True)
    (folder / "metrics.jsonl").write_text("".join(line for line in lines if json.loads(line)["step"] <= step))


def finish(folder: Path) -> None:
    (folder / "summary.json").write_text(json.dumps({"params": 30720, "layout": {"ranks": 2}, "seconds": 12.5}))


def draw(folder: Path, step: int) -> None:
    (folder / f"pictures/step_{step:08d}").mkdir(parents=True)
    picture = Image.fromarray(np.full((8, 16, 3), step, np.uint8))
    picture.save(folder / f"pictures/step_{step:08d}/reconstructions.png")


def records(folder: Path, kind: str) -> list[Any]:
    """The records of one kind in all the .wandb files of a run, oldest first."""
    files = sorted(folder.glob("wandb/*/*.wandb"))
    return [getattr(r, kind) for file in files for r in wandb_file.records(file) if r.WhichOneof("record_type") == kind]


def rows(folder: Path) -> list[dict[str, Any]]:
    """The history of a run, oldest first, as W&B's file has it."""
    return [
        {item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in row.item}
        for row in records(folder, "history")
    ]


def steps(folder: Path) -> list[int]:
    return [row["_step"] for row in rows(folder)]
