"""What the launcher keeps of a run in FOLDER/launch, for jobs on other machines to read; light to import.

lock.json        whose the folder is (lock.py)
work-TOKEN.json  what a submission runs, with its limits: read by the batch script and by every rank
history.jsonl    one event per line: submitted, started, ended, requeued, failed, done …
                 (of stand-bys, elastic.py: stands_by, waits, takes_over, makes_room, handed_over, gave_up)
END.json         why nobody goes on by itself; the next launch removes it
notes/JOB.RESTART/rank_K.json   how the ranks of one incarnation ended
"""

import json
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from llamagen_dist.files import sync_folder, write_text


@dataclass(frozen=True)
class Limits:
    """Of restarts: what the profile says."""

    requeue: bool = True
    max_faults: int = 20
    max_stuck: int = 2
    signal_delay_s: int = 300
    after_s: float = 0.0
    """How long the running job may be silent before its stand-by begins (elastic.py); 0: it has none."""


@dataclass(frozen=True)
class Work:
    """One program in one folder. Paths are absolute strings: this is written as JSON."""

    name: str
    module: str
    arguments: tuple[str, ...]
    folder: str
    """The run directory, or the launch folder of a program without one."""
    code: str
    """The snapshot that the ranks run."""
    token: str = ""
    """Of the launch that submitted it."""
    ranks_per_node: int = 1
    run_dir: str | None = None
    """Where its checkpoints are, if not in the folder (a stage of a pipeline)."""
    limits: Limits = Limits()
    produces: tuple[str, ...] = ()
    """Files that must exist when it is done."""
    done: str | None = None
    """A file that is written when it has ended well (a pipeline's DONE.json) …"""
    record: dict[str, Any] = field(default_factory=dict)
    """… with this in it, besides seconds and peak_rss_gb."""
    whole: dict[str, Any] = field(default_factory=dict)
    """Of a point of a pipeline's stage: {"done": the stage's DONE.json, "record": what it says}."""


@dataclass(frozen=True)
class Place:
    """FOLDER/launch."""

    path: Path

    @classmethod
    def of(cls, folder: str | Path) -> "Place":
        return cls(Path(folder) / "launch")

    @property
    def lock(self) -> Path:
        return self.path / "lock.json"

    @property
    def owner(self) -> Path:
        return self.path / "owner.json"

    @property
    def history(self) -> Path:
        return self.path / "history.jsonl"

    @property
    def end(self) -> Path:
        return self.path / "END.json"

    @property
    def beat(self) -> Path:
        """Touched by the batch script of the running job."""
        return self.path / "beat"

    @property
    def progress(self) -> Path:
        return self.path / "progress.json"

    def notes(self, owner: str) -> Path:
        return self.path / "notes" / owner

    def tell(self, event: str, **facts: Any) -> None:
        """Append one event to history.jsonl: one write of whole lines, so that two writers never mix."""
        line = json.dumps({"time": round(time.time(), 3), "event": event, **facts}) + "\n"
        with open(self.history, "ab+", buffering=0) as file:
            if file.tell():
                file.seek(-1, os.SEEK_END)
                if file.read(1) != b"\n":  # a writer was killed in the middle of its line
                    line = "\n" + line
            file.write(line.encode())
            os.fsync(file.fileno())

    def events(self) -> list[dict[str, Any]]:
        """history.jsonl, oldest first; a torn last line is left out."""
        found = []
        try:
            text = self.history.read_text(encoding="utf-8")
        except FileNotFoundError:
            return []
        for line in text.splitlines():
            try:
                found.append(json.loads(line))
            except ValueError:
                continue
        return found


def outcome_of(events: Sequence[Mapping[str, Any]]) -> str:
    """How the newest submission in a history has ended: "done" or "failed"; empty while it has not."""
    ends = ("done", "failed", "submitted")
    last = next((event["event"] for event in reversed(events) if event.get("event") in ends), "submitted")
    return "" if last == "submitted" else str(last)


def write_works(file: Path, works: list[Work]) -> None:
    write_text(file, json.dumps([asdict(work) for work in works], indent=1))
    sync_folder(file.parent)


def read_work(file: str | Path, index: int = 0) -> Work:
    data = json.loads(Path(file).read_text(encoding="utf-8"))[index]
    limits = Limits(**data.pop("limits"))
    data |= {name: tuple(data[name]) for name in ("arguments", "produces")}
    return Work(**data | {"limits": limits})


def read_json(path: Path) -> dict[str, Any] | None:
    """A whole JSON object, or None where there is none (yet)."""
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (FileNotFoundError, ValueError):
        return None


def steps_done(folder: Path) -> float:
    """How far a run is, for "has it moved since?": the newest complete checkpoints of the folder and of the folders in
    it (a ladder's rungs), summed; for a program without run directories what its progress.json counts.

    Of a training run only what is saved counts: dying again and again before the first save is no progress.
    """
    newest: dict[Path, int] = {}
    for pattern in ("checkpoints/step_*/COMPLETE", "*/checkpoints/step_*/COMPLETE"):
        for mark in folder.glob(pattern):
            step = int(mark.parent.name.removeprefix("step_"))
            newest[mark.parents[1]] = max(step, newest.get(mark.parents[1], 0))
    if newest or any((place / "record.json").exists() for place in (folder, *folder.glob("*/"))):
        return float(sum(newest.values()))
    progress = read_json(Place.of(folder).progress) or {}
    return float(progress.get("done", 0))


def steps_of(work: Work) -> float:
    """``steps_done`` of the folder that has the checkpoints."""
    return steps_done(Path(work.run_dir or work.folder))


def finish_whole(out: Path, done: Path, record: Mapping[str, Any]) -> bool:
    """Write a stage's DONE.json if every point that was started in ``out`` has its own; returns whether they all do.

    The last point to end does it; of two at once both do, and write the same.
    """
    points = [read_json(started.with_name("DONE.json")) for started in out.glob("*/launch/stage.json")]
    if not points or any(point is None for point in points):
        return False
    seconds = sum(point["seconds"] for point in points if point)
    peak = max(point["peak_rss_gb"] for point in points if point)
    write_text(done, json.dumps({**record, "seconds": round(seconds, 2), "peak_rss_gb": peak}, indent=1))
    return True
