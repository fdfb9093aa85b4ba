"""FOLDER/launch: what is known of one launched program, laid out alike here and on a cluster. Light to import.

config.yaml      what the program is given
job.json         what it was started with (``graph.Node.identity``), and the seconds that earlier attempts took
history.jsonl    one event per line: submitted, started, ended, requeued, failed, done …
                 (of stand-bys, slurm/elastic.py: stands_by, waits, takes_over, makes_room, handed_over, gave_up)
ranks/INCARNATION/rank_K.json   how the ranks of one incarnation ended (error_K.txt: the sentence a rank left)
progress.json    how far a program is that counts, while it runs
DONE.json        it has ended well: when, on how many ranks, how long it took
FAILED.json      why nobody resumes it by itself; the next launch removes it
On a cluster also:
lock.json        the launch it belongs to: its token and its jobs (slurm/lock.py)
owner.json       the fence token: which incarnation (JOB.RESTART) may write
spec-TOKEN.json  what a submission runs, with its limits: read by the batch script and by every rank
beat             touched by the batch script's keeper while it lives
"""

import json
import os
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from llamagen_dist.files import json_if_there, sync_folder, write_text

HERE = "here"
"""The incarnation of a program that this machine's launcher runs."""
VARIABLE = re.compile(r"\{([a-z_][a-z0-9_]*)\}")
"""In a pipeline file, and in the OUT/config.yaml that is kept of it."""

# Where launches kept the same things before November 2026, from FOLDER: such folders are read, and resumed.
_OLDER = {
    "job.json": ("launch/stage.json", "stage.json"),
    "config.yaml": ("config.yaml",),
    "DONE.json": ("DONE.json",),
    "FAILED.json": ("launch/END.json",),
    "progress.json": ("progress.json", "log/progress.json"),
}


class JobFolder:
    """The paths of one launched program's files, and what is in them. ``folder``: the run directory, a stage's folder,
    or the launch folder of a program without one."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.path = folder / "launch"
        self.log = folder / "log"
        """What the ranks print, wherever they run (an array's items: in the sweep's own log/)."""
        self.config = self.path / "config.yaml"
        self.job = self.path / "job.json"
        self.lock = self.path / "lock.json"
        self.owner = self.path / "owner.json"
        self.history = self.path / "history.jsonl"
        self.done = self.path / "DONE.json"
        self.failed = self.path / "FAILED.json"
        self.beat = self.path / "beat"
        self.progress = self.path / "progress.json"

    @classmethod
    def of(cls, folder: str | Path) -> "JobFolder":
        return cls(Path(folder))

    def ranks(self, incarnation: str) -> Path:
        """The folder of what the ranks of one incarnation (JOB.RESTART, or HERE) report."""
        return self.path / "ranks" / incarnation

    def reports_here(self) -> list[Path]:
        """The reports of the ranks that ran last on this machine; an older launcher's lay among the logs."""
        folders = (self.ranks(HERE), self.path / "log", self.log)
        return next((files for folder in folders if (files := sorted(folder.glob("rank_*.json")))), [])

    def spec(self, token: str) -> Path:
        return self.path / f"spec-{token}.json"

    def where(self, file: Path) -> Path | None:
        """The file, or the one that an older launch wrote instead; None where there is neither."""
        if file.exists():
            return file
        for name in _OLDER.get(file.name, ()):
            # FOLDER/config.yaml is an old stage's only beside its stage.json; in a run directory it is the run's own
            if (self.folder / name).exists() and (name != "config.yaml" or (self.folder / "stage.json").exists()):
                return self.folder / name
        return None

    def read(self, file: Path) -> dict[str, Any] | None:
        """One of the JSON files, an older launch's too; None where there is none (yet)."""
        path = self.where(file)
        return None if path is None else json_if_there(path)

    def forget(self, *files: Path) -> None:
        """Remove these, older launches' too."""
        for file in files:
            while (path := self.where(file)) is not None:
                path.unlink()

    def finish(self, record: Mapping[str, Any], seconds: float, peak_rss_gb: float) -> None:
        """Write DONE.json: the record, what all attempts took, and GB of the largest rank."""
        cost = {"seconds": round(seconds, 2), "peak_rss_gb": round(peak_rss_gb, 3)}
        write_text(self.done, json.dumps({**record, **cost}, indent=1))

    def fail(self, reason: str, **facts: Any) -> None:
        """Write FAILED.json."""
        write_text(self.failed, json.dumps({"reason": reason, "time": round(time.time(), 3), **facts}, indent=1))

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
        """history.jsonl, oldest first."""
        try:
            return whole_lines(self.history.read_bytes())
        except FileNotFoundError:
            return []

    def is_done(self) -> bool:
        """Whether the program has ended well since it was last started."""
        if self.where(self.done) is not None:
            return True
        # an older launch of a single program on a cluster left nothing but its history
        return self.where(self.job) is None and outcome_of(self.events()) == "done"


def whole_lines(text: bytes) -> list[dict[str, Any]]:
    """The objects in lines of JSON. Torn lines are left out wherever they are: their writers were killed, and others
    wrote on behind them."""
    objects = []
    for line in text.splitlines():
        try:
            objects.append(json.loads(line))
        except ValueError:  # of bytes that are no UTF-8 too
            continue
    return [one for one in objects if isinstance(one, dict)]


def outcome_of(events: Sequence[Mapping[str, Any]]) -> str:
    """How the newest submission in a history has ended: "done" or "failed"; empty while it has not."""
    ends = ("done", "failed", "submitted")
    last = next((event["event"] for event in reversed(events) if event.get("event") in ends), "submitted")
    return "" if last == "submitted" else str(last)


@dataclass(frozen=True)
class Limits:
    """Of restarts: what the cluster's profile says."""

    requeue: bool = True
    max_faults: int = 20
    max_stuck: int = 2
    signal_delay_s: int = 300
    after_s: float = 0.0
    """How long the running job may be silent before its stand-by begins (slurm/elastic.py); 0: it has none."""


@dataclass(frozen=True)
class JobSpec:
    """One program in one folder, as a job on a cluster. Paths are absolute strings: this is written as JSON."""

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
    record: dict[str, Any] = field(default_factory=dict)
    """What DONE.json says besides seconds and peak_rss_gb."""
    whole: dict[str, Any] = field(default_factory=dict)
    """Of a point of a pipeline's stage: {"done": the stage's DONE.json, "record": what it says}."""

    @property
    def job(self) -> JobFolder:
        return JobFolder.of(self.folder)

    def steps_done(self) -> float:
        """``steps_done`` of the folder that has the checkpoints."""
        return steps_done(Path(self.run_dir or self.folder))


def write_specs(file: Path, specs: Sequence[JobSpec]) -> None:
    write_text(file, json.dumps([asdict(spec) for spec in specs], indent=1))
    sync_folder(file.parent)


def read_spec(file: str | Path, index: int = 0) -> JobSpec:
    data = json.loads(Path(file).read_text(encoding="utf-8"))[index]
    limits = Limits(**data.pop("limits"))
    data |= {name: tuple(data[name]) for name in ("arguments", "produces")}
    return JobSpec(**data | {"limits": limits})


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
    if newest or any((run / "record.json").exists() for run in (folder, *folder.glob("*/"))):
        return float(sum(newest.values()))
    progress = json_if_there(JobFolder.of(folder).progress) or {}
    return float(progress.get("done", 0))


def started_in(out: Path) -> list[JobFolder]:
    """The points of a sweep that were ever prepared in its folder, by name."""
    marks = [*out.glob("*/launch/job.json"), *out.glob("*/launch/stage.json")]
    return [JobFolder.of(folder) for folder in sorted({mark.parents[1] for mark in marks})]


def finish_whole(out: Path, done: Path, record: Mapping[str, Any]) -> bool:
    """Write a stage's DONE.json if every point that was started in ``out`` has its own; returns whether they all do.

    The last point to end does it; of two at once both do, and write the same.
    """
    points = [job.read(job.done) for job in started_in(out)]
    if not points or any(point is None for point in points):
        return False
    seconds = sum(point["seconds"] for point in points if point)
    peak = max(point["peak_rss_gb"] for point in points if point)
    write_text(done, json.dumps({**record, "seconds": round(seconds, 2), "peak_rss_gb": peak}, indent=1))
    return True
