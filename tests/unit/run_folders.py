"""Run directories as trainings, launchers and SLURM jobs leave them, and squeue's answers, for tests of readers."""

import json
import os
import platform
from pathlib import Path
from typing import Any

import pytest

from llamagen_dist.config import dump, load
from llamagen_dist.launch.folder import JobFolder
from llamagen_dist.launch.slurm import queue
from llamagen_dist.launch.slurm.queue import QueuedJob
from llamagen_dist.launch.status.survey import Row, look
from llamagen_dist.process import identify

CONFIGS = Path(__file__).resolve().parents[2] / "configs"


def metrics(lines: int, batch: int, speed: float = 100.0) -> str:
    """metrics.jsonl with a line per step, as fit writes it."""
    return "".join(
        json.dumps(
            {
                "step": step,
                "images_seen": step * batch,
                "loss": 9.0 - step / lines,
                "lr": 1e-4,
                "grad_norm": 1.0,
                "images_per_s": speed,
                **{f"{part}_s": 0.012345 for part in ("data", "compute", "optimizer", "communication")},
                "peak_memory_gb": 20.0,
                "slowest_rank": 3,
                "slowest_rank_s": 0.5,
                "samples": "0123456789abcdef",
            }
        )
        + "\n"
        for step in range(1, lines + 1)
    )


def training(folder: Path, lines: int = 10, images: int = 2560, saved: tuple[int, ...] = (5,)) -> Path:
    """A GPT run of batches of 64 that has got so far."""
    settings = [f"train.images={images}", "train.global_batch=64", "data.train=t", "data.validation=v"]
    folder.mkdir(parents=True, exist_ok=True)
    config = load(CONFIGS / "gpt/quickstart.yaml", [*settings, f"run_dir={folder}", "ladder={}"])
    (folder / "config.yaml").write_text(dump(config))
    (folder / "record.json").write_text("{}")
    (folder / "metrics.jsonl").write_text(metrics(lines, 64))
    for step in saved:
        (folder / f"checkpoints/step_{step:08d}").mkdir(parents=True)
        (folder / f"checkpoints/step_{step:08d}/COMPLETE").write_text("x")
    return folder


def summarise(folder: Path, images: int = 2560) -> None:
    (folder / "summary.json").write_text(json.dumps({"images_seen": images, "step": images // 64}))


def beat(folder: Path, rank: int = 0, **changes: Any) -> Path:
    """A heartbeat of a rank: of this very process, unless ``changes`` say otherwise."""
    me = identify()
    facts = {"rank": rank, "host": platform.node(), "pid": me.pid, "started": me.started, "step": 3, "phase": "train"}
    facts |= {"part": "compute", "since": 0.0, "time": 0.0, "ended": ""}
    (folder / "log").mkdir(exist_ok=True)
    file = folder / f"log/heartbeat-rank-{rank}.json"
    file.write_text(json.dumps(facts | changes))
    return file


def note(log: Path, rank: int = 0, **facts: Any) -> None:
    """What the local launcher's rank says of itself; of a process that has ended, unless ``facts`` say otherwise."""
    log.mkdir(parents=True, exist_ok=True)
    (log / f"rank_{rank}.json").write_text(json.dumps({"rank": rank, "pid": 2**22 + 1, "started": "1", **facts}))


def lock(folder: Path, *jobs: str) -> None:
    place = JobFolder.of(folder)
    place.path.mkdir(parents=True, exist_ok=True)
    facts = {"token": "t", "jobs": list(jobs), "user": "me", "host": "login", "since": 0.0}
    place.lock.write_text(json.dumps(facts))


def history(folder: Path, *events: tuple[str, dict[str, Any]]) -> None:
    place = JobFolder.of(folder)
    place.path.mkdir(parents=True, exist_ok=True)
    place.history.write_text(
        "".join(json.dumps({"time": 0.0, "event": name, **facts}) + "\n" for name, facts in events)
    )


def end(folder: Path, reason: str) -> None:
    JobFolder.of(folder).path.mkdir(parents=True, exist_ok=True)
    JobFolder.of(folder).failed.write_text(json.dumps({"reason": reason}))


def dated(file: Path, time: float) -> None:
    os.utime(file, (time, time))


def job(name: str, state: str = "RUNNING", reason: str = "None", where: str = "n[1-2]") -> QueuedJob:
    return QueuedJob(name, state, reason, 2, where, "1:00:00", "t", "run")


def answers(monkeypatch: pytest.MonkeyPatch, *jobs: QueuedJob | Exception) -> list[int]:
    """Let squeue answer so; returns a list that grows by one with every question."""
    asked: list[int] = []

    def my_jobs(patience_s: float) -> dict[str, QueuedJob]:
        asked.append(1)
        for one in jobs:
            if isinstance(one, Exception):
                raise one
        return {one.job: one for one in jobs if isinstance(one, QueuedJob)}

    monkeypatch.setattr(queue, "my_jobs", my_jobs)
    return asked


def only(folder: Path) -> Row:
    (row,) = look([folder]).rows
    return row
