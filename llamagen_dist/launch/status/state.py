"""Whether a folder's program runs, waits, has ended or has failed, and why."""

import platform
import threading
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from llamagen_dist.errors import UserError
from llamagen_dist.files import json_if_there
from llamagen_dist.launch.folder import HERE, JobFolder, outcome_of
from llamagen_dist.launch.slurm import lock, queue
from llamagen_dist.launch.slurm.queue import QueuedJob
from llamagen_dist.launch.state import state_of
from llamagen_dist.launch.status.files import Clock, read_text
from llamagen_dist.process import Identity, started_at

RUNNING, WAITING, SUBMITTING = "running", "waiting", "submitting"
FINISHED, FAILED, STOPPED, UNKNOWN = "finished", "failed", "stopped", "unknown"
SLURM_PATIENCE_S = 10.0
FRESH_S = 60.0  # a heartbeat is written every ten seconds
Jobs = Mapping[str, QueuedJob] | None
"""What squeue knows; None: it gave no answer."""


@dataclass(frozen=True)
class State:
    """``restarts``: how often it began again, by kind. ``reason``: one line on why it waits, stopped or failed."""

    name: str
    reason: str = ""
    job: str = ""
    where: str = ""
    restarts: tuple[tuple[str, int], ...] = ()


class Slurm:
    """What squeue knows of this user's jobs: asked once, at the first need, however many runs there are."""

    def __init__(self, patience_s: float = SLURM_PATIENCE_S) -> None:
        self._patience, self._once = patience_s, threading.Lock()
        self._jobs: Jobs = None
        self._asked = False
        self.silent = ""
        """Why there was no answer."""

    def jobs(self) -> Jobs:
        with self._once:
            if not self._asked:
                self._asked = True
                try:
                    self._jobs = queue.my_jobs(self._patience)
                except UserError as error:
                    self.silent = str(error)
        return self._jobs


def of_cluster(job: JobFolder, slurm: Slurm) -> State:
    """Of a folder that has been launched on a cluster."""
    try:
        events = job.events()
    except OSError:  # somebody else's, or damaged: the other files may tell
        events = []
    held, failed = lock.read(job), job.read(job.failed) or {}
    known = State("", "", restarts=tuple(count_restarts(events).items()))
    if held is not None and held.jobs:
        known = replace(known, job=held.jobs[0])
    elif events:
        known = replace(known, job=str(events[-1].get("job") or ""))
    ended = outcome_of(events)
    if ended == "done":
        return replace(known, name=FINISHED)
    if ended == "failed" or (failed and (held is None or not held.jobs)):
        return replace(known, name=FAILED, reason=one_line(failed.get("reason", "it says no reason")))
    if held is None:
        return replace(known, name=STOPPED, reason="nothing runs or waits; the same launch resumes it")
    state = state_of(job, slurm.jobs())
    if state.kind == "submitting":
        return replace(known, name=SUBMITTING, reason=f"by {held.user} on {held.host}")
    if state.kind == "unknown":
        return replace(known, name=UNKNOWN, reason="SLURM does not answer")
    if state.queued is not None and state.live:
        waited_for = (slurm.jobs() or {}).get(known.job)
        return replace(of_job(state.queued, waited_for, events), restarts=known.restarts)
    if state.kind == "failed":
        return replace(known, name=FAILED, reason=one_line(state.reason))
    how = state.queued.state if state.queued is not None else "forgotten by SLURM"
    gone = f"job {known.job} is over ({how})" if held.jobs else "nothing runs or waits"
    if events and events[-1]["event"] == "gave_up":
        gone += f": {events[-1].get('reason')}"
    return replace(known, name=STOPPED, reason=one_line(f"{gone}; the same launch resumes it"))


def of_job(job: QueuedJob, wanted: QueuedJob | None, events: Sequence[Mapping[str, Any]]) -> State:
    """Of the job that runs or waits; wanted: the one at the head of the lock; events: of the folder."""
    if job.state == "RUNNING":
        fewer = wanted is not None and wanted.job != job.job and wanted.alive
        reason = f"with fewer nodes, while job {wanted.job} waits for {wanted.reason}" if wanted and fewer else ""
        return State(RUNNING, reason, job.job, job.where)
    if job.state != "PENDING":
        return State(RUNNING, job.state.lower(), job.job, job.where)
    begun = any(event["event"] == "started" for event in events)
    reason = f"{'requeued, waits ' if begun else ''}for {job.reason}"
    if job.reason == "DependencyNeverSatisfied":
        reason += ": it will never start"
    again: Mapping[str, Any] = next(
        (e for e in reversed(events) if e["event"] in ("requeued", "started", "submitted")), {}
    )
    if again.get("fault"):
        reason += f", after: {again.get('why')}"
    return State(WAITING, one_line(reason), job.job)


def count_restarts(events: list[dict[str, Any]]) -> Counter[str]:
    """How often the program began again: after a ``fault``; after a ``signal`` at which it had saved (a time limit,
    a preemption, a request); because ``slurm`` requeued it by itself (a lost node, scontrol); and as another job
    (``launch``: by hand or with other nodes)."""
    found: Counter[str] = Counter()
    before: dict[str, Any] | None = None
    requeued: dict[str, Any] | None = None
    for event in events:
        kind = event.get("event")
        if kind == "started":
            if before is not None:
                if before.get("job") != event.get("job") or not event.get("job"):
                    found["launch"] += 1
                elif requeued is None:
                    found["slurm"] += 1
                else:
                    found["fault" if requeued.get("fault") else "signal"] += 1
            before, requeued = event, None
        elif kind == "requeued":
            requeued = event
    return found


def of_this_machine(job: JobFolder, folder: Path, finished: bool, clock: Clock) -> State:
    """Of a program whose ranks were started without SLURM, by our launcher or by hand. folder: its run directory."""
    # an older launcher's reports lay among the logs
    places = (job.ranks(HERE), job.path / "log", job.log)
    files = next((files for place in places if (files := sorted(place.glob("rank_*.json")))), [])
    reports = [report for file in files if (report := json_if_there(file)) is not None]
    here = platform.node()
    beats, beating = [], []
    for path in sorted((folder / "log").glob("heartbeat-rank-*.json")):
        if (beat := json_if_there(path)) is None:
            continue
        beats.append(beat)
        # of a rank on another machine: by the age of its file, since its clock may be another
        fresh = (clock.age(path) or 0.0) < FRESH_S
        if not beat.get("ended") and (lives(beat) if beat.get("host") == here else fresh):
            beating.append(beat)
    living = [report for report in reports if "outcome" not in report and lives(report)]
    if living or beating:
        return State(RUNNING, where=str((beating or [{}])[0].get("host", here)))
    if finished or (reports and all(report.get("outcome") == "done" for report in reports)):
        return State(FINISHED)
    for kinds, name in ((("user_error", "crashed", "died"), FAILED), (("stopped", "interrupted"), STOPPED)):
        found = [report for report in reports if report.get("outcome") in kinds]
        if found:
            report = min(found, key=lambda one: one.get("ended", 0.0))
            return State(
                name, one_line(report.get("message") or f"rank {report.get('rank')} {report['outcome']}", last=True)
            )
    told = [b["ended"] for b in beats if b.get("ended")]
    if told:
        return State(FAILED, one_line(min(told, key=lambda text: text.startswith("gave up: "))))
    if _starting(folder, clock):
        return State(RUNNING, where=here)
    if reports or beats:
        return State(
            STOPPED, "its processes are gone without a message (killed? out of memory?); the same command resumes it"
        )
    return State(STOPPED)


def lives(report: Mapping[str, Any]) -> bool:
    """Whether the process of this machine that a report names by pid and start still runs."""
    try:
        return Identity(int(report["pid"]), str(report["started"])).alive()
    except (KeyError, ValueError):
        return False


def _starting(folder: Path, clock: Clock) -> bool:
    """A program that has opened the run directory on this machine and does not train yet: FOLDER/lock names it."""
    words = read_text(folder / "lock").split()
    if len(words) != 4 or words[::2] != ["pid", "on"] or words[3] != platform.node() or not words[1].isdigit():
        return False
    began, opened = started_at(int(words[1])), clock.age(folder / "lock")
    return began is not None and opened is not None and began <= clock.now - opened + 1  # else the pid is reused


def one_line(text: str, last: bool = False) -> str:
    """The first (of a traceback: the last) line that says something."""
    lines = [" ".join(line.split()) for line in str(text).splitlines() if line.strip()]
    return (lines[-1] if last else lines[0]) if lines else ""
