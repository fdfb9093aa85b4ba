"""What one program is doing and how far it is, from a few files of its folder, read in some milliseconds: only tails,
and no YAML parser for a run."""

import os
import platform
import re
import statistics
import threading
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from llamagen_dist.errors import UserError
from llamagen_dist.files import json_if_there
from llamagen_dist.launch.folder import JobFolder, outcome_of, whole_lines
from llamagen_dist.launch.slurm import lock, queue
from llamagen_dist.launch.slurm.lock import Lock
from llamagen_dist.launch.slurm.queue import QueuedJob
from llamagen_dist.launch.state import state_of
from llamagen_dist.process import Identity, started_at
from llamagen_dist.training import heartbeat

RUNNING, WAITING, SUBMITTING = "running", "waiting", "submitting"
FINISHED, FAILED, STOPPED, UNKNOWN = "finished", "failed", "stopped", "unknown"
TAIL_BYTES = 16 << 10
RATES = 8  # lines whose median is the speed: one slow step says little
LEEWAY_S = 2.0  # between this machine's clock and the one that dates files, before it is reported
FRESH_S = 60.0  # a heartbeat is written every ten seconds
SLURM_PATIENCE_S = 10.0
_KIND = re.compile(r"^kind: (\w+)$", re.MULTILINE)
_LADDER = re.compile(r"^ladder:$", re.MULTILINE)  # an empty one is written as {}
_IMAGES = re.compile(r"^train:\n(?:[ \t].*\n)*?  images: (\d+)$", re.MULTILINE)


@dataclass(frozen=True)
class State:
    """``restarts``: how often it began again, by kind. ``reason``: one line on why it waits, stopped or failed."""

    name: str
    reason: str = ""
    job: str = ""
    where: str = ""
    restarts: tuple[tuple[str, int], ...] = ()


@dataclass(frozen=True)
class Progress:
    """How far a program is. Counts are images; what is unknown is None."""

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
    """Since the program last wrote a measurement or a heartbeat."""


class Reader:
    """One look at many folders: all ages by one clock, and SLURM asked once, at the first need."""

    def __init__(self) -> None:
        self.now = time.time()
        self.clock_ahead_s = 0.0
        """How far files are dated in the future."""
        self.slurm = ""
        """Why SLURM could not be asked, or empty."""
        self._asking = threading.Lock()
        self._answers: list[Mapping[str, QueuedJob] | None] = []

    def age(self, path: Path) -> float | None:
        """Seconds since a file was written, never negative; None where there is none."""
        try:
            age = self.now - path.stat().st_mtime
        except OSError:
            return None
        if -age > LEEWAY_S:
            self.clock_ahead_s = max(self.clock_ahead_s, -age)
        return max(age, 0.0)

    def jobs(self) -> Mapping[str, QueuedJob] | None:
        """This user's jobs; None where SLURM gives no answer."""
        with self._asking:
            if not self._answers:
                try:
                    self._answers.append(queue.my_jobs(SLURM_PATIENCE_S))
                except UserError as error:
                    self.slurm = str(error)
                    self._answers.append(None)
        return self._answers[0]

    def progress(self, run: Path) -> Progress:
        """Of a run directory; all unknown for a folder that is none."""
        kind, total = described(run)
        lines = _last_lines(run / "metrics.jsonl")
        seen, losses, rates = (_column(lines, key) for key in ("images_seen", "loss", "images_per_s"))
        summary = json_if_there(run / "summary.json")
        done = summary.get("images_seen") if summary else (seen[-1] if seen else None)
        step, saved_s = self._saved(run / "checkpoints")
        signs = [self.age(run / "metrics.jsonl"), self.age(heartbeat.path(run / "log", 0))]
        return Progress(
            kind=kind,
            done=done,
            total=total,
            loss=losses[-1] if losses else None,
            images_per_s=statistics.median(rates[-RATES:]) if rates else None,
            finished=summary is not None and (total is None or done is None or done >= total),
            saved_step=step,
            saved_s=saved_s,
            quiet_s=min((age for age in signs if age is not None), default=None),
        )

    def _saved(self, checkpoints: Path) -> tuple[int | None, float | None]:
        """(step, age in seconds) of the newest complete checkpoint."""
        for name in sorted(names_in(checkpoints), reverse=True):
            step = name.removeprefix("step_")
            if step != name and step.isdigit() and (age := self.age(checkpoints / name / "COMPLETE")) is not None:
                return int(step), age
        return None, None

    def state(self, job: JobFolder, run: Path, finished: bool) -> State:
        """run: the run directory, of a program that trains; finished: whether its files say that it is."""
        try:
            events = job.events()
        except OSError:  # somebody else's, or damaged: the other files may say
            events = []
        locked = lock.read(job)
        names = [*(locked.jobs if locked is not None else ()), *(str(event.get("job") or "") for event in events[-1:])]
        known = State("", job=next(iter(names), ""), restarts=tuple(count_restarts(events).items()))
        if finished:
            return replace(known, name=FINISHED)
        # where it was launched last: an event of this machine's launcher names no job
        last = next((event for event in reversed(events) if event.get("event") in ("started", "submitted")), None)
        if job.lock.exists() if last is None else last.get("job"):
            return self._on_cluster(job, events, locked, known)
        return replace(self._here(job, run), restarts=known.restarts)

    def _on_cluster(
        self, job: JobFolder, events: Sequence[Mapping[str, Any]], locked: Lock | None, known: State
    ) -> State:
        failed = job.read(job.failed)
        if outcome_of(events) == "failed" or (failed is not None and (locked is None or not locked.jobs)):
            return replace(known, name=FAILED, reason=one_line((failed or {}).get("reason", "no reason is given")))
        if locked is None:
            return replace(known, name=STOPPED, reason="nothing runs or waits; the same launch resumes it")
        state = state_of(job, self.jobs())
        if state.queued is not None and state.live:
            first = (self.jobs() or {}).get(known.job)
            return replace(_queued(state.queued, first, events), restarts=known.restarts)
        gone = "nothing runs or waits"
        if locked.jobs:
            gone = f"job {known.job} is over ({state.queued.state if state.queued else 'forgotten by SLURM'})"
        if events and events[-1].get("event") == "gave_up":
            gone += f": {events[-1].get('reason')}"
        name, reason = {
            "submitting": (SUBMITTING, f"by {locked.user} on {locked.host}"),
            "unknown": (UNKNOWN, "SLURM does not answer"),
            "finished": (FINISHED, ""),
            "failed": (FAILED, state.reason),
        }.get(state.kind, (STOPPED, f"{gone}; the same launch resumes it"))
        return replace(known, name=name, reason=one_line(reason))

    def _here(self, job: JobFolder, run: Path) -> State:
        """Of a program whose ranks were started without SLURM, by our launcher or by hand."""
        here = platform.node()
        reports = [report for file in job.reports_here() if (report := json_if_there(file)) is not None]
        beats = {file: json_if_there(file) or {} for file in sorted((run / "log").glob("heartbeat-rank-*.json"))}
        for file, beat in beats.items():
            # of a rank on another machine: by the age of its file, since its clock may be another
            runs = lives(beat) if beat.get("host") == here else (self.age(file) or 0.0) < FRESH_S
            if beat and not beat.get("ended") and runs:
                return State(RUNNING, where=str(beat.get("host", here)))
        if any("outcome" not in report and lives(report) for report in reports):
            return State(RUNNING, where=here)
        if reports and all(report.get("outcome") == "done" for report in reports):
            return State(FINISHED)
        reports.sort(key=lambda report: report.get("ended", 0.0))
        for outcomes, name in ((("user_error", "crashed", "died"), FAILED), (("stopped", "interrupted"), STOPPED)):
            for report in reports:
                if report.get("outcome") in outcomes:
                    message = report.get("message") or f"rank {report.get('rank')} {report['outcome']}"
                    return State(name, one_line(message, last=True))
        ends = [beat["ended"] for beat in beats.values() if beat.get("ended")]
        if ends:  # a rank that gave up did so because of another
            return State(FAILED, one_line(min(ends, key=lambda text: text.startswith(heartbeat.GAVE_UP))))
        if self._starting(run / "lock"):
            return State(RUNNING, where=here)
        gone = "its processes are gone without a message (killed? out of memory?); the same command resumes it"
        return State(STOPPED, gone if reports or any(beats.values()) else "")

    def _starting(self, file: Path) -> bool:
        """Whether a program of this machine has opened a run directory and does not train yet: its lock names it."""
        holder = re.fullmatch(r"pid (\d+) on (\S+)\s*", read_text(file))
        if holder is None or holder[2] != platform.node():
            return False
        began, opened = started_at(int(holder[1])), self.age(file)
        return began is not None and opened is not None and began <= self.now - opened + 1  # else the pid is reused


def _queued(job: QueuedJob, first: QueuedJob | None, events: Sequence[Mapping[str, Any]]) -> State:
    """Of the job that runs or waits. first: the one that its launch submitted first, if SLURM knows it."""
    if job.state == "RUNNING":
        fewer = first is not None and first.job != job.job and first.alive
        reason = f"with fewer nodes, while job {first.job} waits for {first.reason}" if first and fewer else ""
        return State(RUNNING, reason, job.job, job.where)
    if job.state != "PENDING":
        return State(RUNNING, job.state.lower(), job.job, job.where)
    begun = any(event.get("event") == "started" for event in events)
    reason = f"{'requeued, waits ' if begun else ''}for {job.reason}"
    if job.reason == "DependencyNeverSatisfied":
        reason += ": it will never start"
    starts = ("requeued", "started", "submitted")
    again = next((event for event in reversed(events) if event.get("event") in starts), None)
    if again is not None and again.get("fault"):
        reason += f", after: {again.get('why')}"
    return State(WAITING, one_line(reason), job.job)


def is_done(job: JobFolder) -> bool:
    try:
        return job.is_done()
    except OSError:  # somebody else's, or damaged
        return False


def count_restarts(events: Iterable[Mapping[str, Any]]) -> Counter[str]:
    """How often the program began again: after a ``fault``; after a ``signal`` at which it had saved (a time limit,
    a preemption, a request); because ``slurm`` requeued it by itself (a lost node, scontrol); and as another job
    (``launch``: by hand or with other nodes)."""
    counts: Counter[str] = Counter()
    before: Mapping[str, Any] | None = None
    requeued: Mapping[str, Any] | None = None
    for event in events:
        if event.get("event") == "requeued":
            requeued = event
        elif event.get("event") == "started":
            if before is not None and (before.get("job") != event.get("job") or not event.get("job")):
                counts["launch"] += 1
            elif before is not None:
                counts["slurm" if requeued is None else "fault" if requeued.get("fault") else "signal"] += 1
            before, requeued = event, None
    return counts


def lives(report: Mapping[str, Any]) -> bool:
    """Whether the process of this machine that a report names by pid and start still runs."""
    try:
        return Identity(int(report["pid"]), str(report["started"])).alive()
    except (KeyError, ValueError):
        return False


def described(folder: Path) -> tuple[str, int | None]:
    """(kind, images to train on) of FOLDER/config.yaml as our programs write it, or, before the run has begun, of the
    config that it was launched with; ("", None) where there is none, and for a ladder, whose rungs are the runs."""
    for name in ("config.yaml", "launch/config.yaml", "log/config.yaml"):
        text = read_text(folder / name)
        if kind := _KIND.search(text):
            images = _IMAGES.search(text)
            return ("", None) if _LADDER.search(text) else (kind[1], int(images[1]) if images else None)
    return "", None


def _last_lines(path: Path) -> list[dict[str, Any]]:
    """The objects in the last so many bytes of a JSONL file, oldest first."""
    try:
        with open(path, "rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - TAIL_BYTES))
            return whole_lines(file.read())
    except OSError:
        return []


def _column(lines: Iterable[Mapping[str, Any]], key: str) -> list[Any]:
    return [line[key] for line in lines if isinstance(line.get(key), (int, float))]


def names_in(folder: Path) -> set[str]:
    try:
        return set(os.listdir(folder))
    except OSError:
        return set()


def read_text(path: Path) -> str:
    """Empty where it cannot be read."""
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def one_line(text: str, last: bool = False) -> str:
    """The first (of a traceback: the last) line that says something."""
    lines = [" ".join(line.split()) for line in str(text).splitlines() if line.strip()]
    return (lines[-1] if last else lines[0]) if lines else ""
