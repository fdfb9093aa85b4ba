"""What the files of one run directory say, read in a few milliseconds: only tails, and no YAML parser for a run."""

import json
import os
import re
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llamagen_dist.files import json_if_there

TAIL_BYTES = 16 << 10
RATES = 8  # lines whose middle value is the speed: one slow step says little
LEEWAY_S = 2.0  # between this machine's clock and the one that dates files, before it is worth a word
_KIND = re.compile(r"^kind: (\w+)$", re.MULTILINE)
_LADDER = re.compile(r"^ladder:$", re.MULTILINE)  # an empty one is written as {}
_NAME = re.compile(r"\{([a-z_][a-z0-9_]*)\}")  # of a variable, as launch/stages.py has it
_IMAGES = re.compile(r"^train:\n(?:[ \t].*\n)*?  images: (\d+)$", re.MULTILINE)


@dataclass
class Clock:
    """Ages by this machine's clock. ``ahead_s``: by how much the newest file was dated in the future, at most."""

    now: float = field(default_factory=time.time)
    ahead_s: float = 0.0

    def age(self, path: Path) -> float | None:
        """Seconds since a file was written, never negative; None where there is none."""
        try:
            age = self.now - path.stat().st_mtime
        except OSError:
            return None
        if -age > LEEWAY_S:
            self.ahead_s = max(self.ahead_s, -age)
        return max(age, 0.0)


@dataclass(frozen=True)
class Progress:
    """How far a run is. Counts are images; what is unknown is None."""

    kind: str = ""
    done: int | None = None
    total: int | None = None
    loss: float | None = None
    images_per_s: float | None = None
    finished: bool = False
    saved_step: int | None = None
    """Of the newest complete checkpoint …"""
    saved_s: float | None = None
    """… and its age."""
    quiet_s: float | None = None
    """Since the run last wrote a measurement or a heartbeat."""


def progress(folder: Path, clock: Clock) -> Progress:
    """Of a training run's directory."""
    kind, total = described(folder)
    lines = list(_last_lines(folder / "metrics.jsonl"))
    seen = [line["images_seen"] for line in lines if isinstance(line.get("images_seen"), int)]
    step, saved = _saved(folder, clock)
    summary = json_if_there(folder / "summary.json")
    signs = [clock.age(folder / "metrics.jsonl"), clock.age(folder / "log" / "heartbeat-rank-0.json")]
    done = summary.get("images_seen") if summary else (seen[-1] if seen else None)
    rates = numbers(lines, "images_per_s")[-RATES:]
    losses = numbers(lines, "loss")
    return Progress(
        kind=kind,
        done=done,
        total=total,
        loss=losses[-1] if losses else None,
        images_per_s=statistics.median(rates) if rates else None,
        finished=summary is not None and (total is None or done is None or done >= total),
        saved_step=step,
        saved_s=saved,
        quiet_s=min((age for age in signs if age is not None), default=None),
    )


def described(folder: Path) -> tuple[str, int | None]:
    """(kind, images to train on) of FOLDER/config.yaml as our programs write it, or, before the run has begun, of the
    config that it was launched with; ("", None) where there is none, and for a ladder, whose rungs are the runs."""
    for name in ("config.yaml", "launch/config.yaml", "log/config.yaml"):
        text = read_text(folder / name)
        kind, images = _KIND.search(text), _IMAGES.search(text)
        if kind:
            return ("", None) if _LADDER.search(text) else (kind[1], int(images[1]) if images else None)
    return "", None


def trained_in(config: Path) -> Path | None:
    """The run directory that a stage's config.yaml names."""
    found = _yaml(config).get("run_dir")
    return Path(found) if isinstance(found, str) else None


def stages(out: Path) -> dict[str, Path | None]:
    """The stages of a pipeline, in order, as OUT/config.yaml declares them, each with the folder of its points if it is
    a sweep."""
    pipeline = _yaml(out / "config.yaml")
    values = {**(pipeline.get("counts") or {}), **(pipeline.get("variables") or {}), "out": str(out)}
    found: dict[str, Path | None] = {}
    for stage in pipeline.get("stages") or []:
        points = stage.get("out")
        if points is not None:
            points = Path(_NAME.sub(lambda match: str(values.get(match[1], match[0])), points))
        found[stage["name"]] = points
    return found


def _yaml(path: Path) -> dict[str, Any]:
    """For the few files of a pipeline: the parser takes some 20 ms for a page."""
    import yaml

    try:
        found = yaml.load(read_text(path), Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    except yaml.YAMLError:
        return {}
    return found if isinstance(found, dict) else {}


def counted(file: Path, clock: Clock) -> Progress:
    """Of a program that does not train: its progress.json."""
    found = json_if_there(file) or {}
    done, total = found.get("done"), found.get("total")
    return Progress(
        done=done if isinstance(done, int) else None,
        total=total if isinstance(total, int) and total > 0 else None,
        quiet_s=clock.age(file),
    )


def numbers(lines: list[dict[str, Any]], key: str) -> list[float]:
    return [line[key] for line in lines if isinstance(line.get(key), (int, float))]


def _last_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The objects in the last so many bytes of a JSONL file, oldest first; torn lines are left out."""
    try:
        with open(path, "rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - TAIL_BYTES))
            text = file.read()
    except OSError:
        return
    for line in text.splitlines()[1 if size > TAIL_BYTES else 0 :]:
        try:
            found = json.loads(line)
        except ValueError:
            continue
        if isinstance(found, dict):
            yield found


def _saved(folder: Path, clock: Clock) -> tuple[int | None, float | None]:
    """(step, age in seconds) of the newest complete checkpoint."""
    try:
        names = sorted((n for n in os.listdir(folder / "checkpoints") if n.startswith("step_")), reverse=True)
    except OSError:
        return None, None
    for name in names:
        age = clock.age(folder / "checkpoints" / name / "COMPLETE")
        if age is not None and name.removeprefix("step_").isdigit():
            return int(name.removeprefix("step_")), age
    return None, None


def read_text(path: Path) -> str:
    """Empty where it cannot be read."""
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
