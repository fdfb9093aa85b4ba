"""Whether a folder's program runs, waits, has ended or has failed, and why."""

import platform
import threading
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from llamagen_dist.errors import UserError
from llamagen_dist.launch.slurm import queue
from llamagen_dist.launch.slurm.queue import JobState
from llamagen_dist.launch.slurm.records import Place, outcome_of
from llamagen_dist.launch.status.files import Clock, read_json, read_text
from llamagen_dist.process import Identity, started_at

RUNNING, WAITING, SUBMITTING = "running", "waiting", "submitting"
FINISHED, FAILED, STOPPED, UNKNOWN = "finished", "failed", "stopped", "unknown"
SUBMITTING_S = 90.0  # as lock.py has it: a launch that holds the lock for so long without a job has died
SLURM_PATIENCE_S = 10.0
FRESH_S = 60.0  # a heartbeat is written every ten seconds
Jobs = Mapping[str, JobState] | None
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
                    self._jobs = queue.mine(self._patience)
                except UserError as error:
                    self.silent = str(error)
        return self._jobs


def of_cluster(folder: Path, finished: bool, slurm: Slurm, clock: Clock) -> State:
    """Of a folder that has been launched on a cluster (FOLDER/launch). ``finished``: its own files say so."""
    place = Place.of(folder)
    try:
        events = place.events()
    except (OSError, ValueError):  # somebody else's, or damaged: the other files may tell
        events = []
    lock = read_json(place.lock) or {}
    known = State("", "", restarts=tuple(count_restarts(events).items()))
    names = [str(job) for job in lock.get("jobs", [])]
    if names or events:
        known = replace(known, job=names[0] if names else str(events[-1].get("job") or ""))
    ended = outcome_of(events)
    if finished or ended == "done":
        return replace(known, name=FINISHED)
    if ended == "failed" or (not names and place.end.exists()):
        end = read_json(place.end) or {}
        return replace(known, name=FAILED, reason=one_line(end.get("reason", "it says no reason")))
    if lock and not names and (clock.age(place.lock) or 0.0) < SUBMITTING_S:
        by = f"by {lock.get('user', 'somebody')} on {lock.get('host', 'another machine')}"
        return replace(known, name=SUBMITTING, reason=by)
    if not lock:
        return replace(known, name=STOPPED, reason="nothing runs or waits; the same launch goes on")
    jobs = slurm.jobs()
    if jobs is None:
        return replace(known, name=UNKNOWN, reason="SLURM does not answer")
    if not names:  # a launch that died after sbatch has written down no id, but its jobs carry its token
        names = [job.job for job in jobs.values() if job.comment and job.comment == lock.get("token")]
    state = of_jobs(names, jobs, events)
    if state.name == STOPPED and place.end.exists():
        state = replace(state, name=FAILED, reason=one_line((read_json(place.end) or {}).get("reason", "")))
    return replace(state, restarts=known.restarts)


def of_jobs(names: Sequence[str], jobs: Mapping[str, JobState], events: Sequence[Mapping[str, Any]]) -> State:
    """Of the jobs under one lock, the wanted one first and then its smaller stand-bys; events: of the folder."""
    last = names[0] if names else ""
    alive = [jobs[name] for name in names if name in jobs and jobs[name].alive]
    if not alive:
        how = jobs[last].state if last in jobs else "forgotten by SLURM"
        gone = f"job {last} is over ({how})" if last else "nothing runs or waits"
        if events and events[-1]["event"] == "gave_up":
            gone += f": {events[-1].get('reason')}"
        return State(STOPPED, one_line(f"{gone}; the same launch goes on"), last)
    now = min(alive, key=lambda one: (one.state != "RUNNING", one.state == "PENDING"))
    if now.state == "RUNNING":
        wanted = next((one for one in alive if one.job == last != now.job), None)
        fewer = f"with fewer nodes, while job {last} waits for {wanted.reason}" if wanted else ""
        return State(RUNNING, fewer, now.job, now.where)
    if now.state != "PENDING":
        return State(RUNNING, now.state.lower(), now.job, now.where)
    begun = any(event["event"] == "started" for event in events)
    reason = f"{'requeued, waits ' if begun else ''}for {now.reason}"
    if now.reason == "DependencyNeverSatisfied":
        reason += ": it will never start"
    again: Mapping[str, Any] = next(
        (e for e in reversed(events) if e["event"] in ("requeued", "started", "submitted")), {}
    )
    if again.get("fault"):
        reason += f", after: {again.get('why')}"
    return State(WAITING, one_line(reason), now.job)


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
                if before.get("job") != event.get("job"):
                    found["launch"] += 1
                elif requeued is None:
                    found["slurm"] += 1
                else:
                    found["fault" if requeued.get("fault") else "signal"] += 1
            before, requeued = event, None
        elif kind == "requeued":
            requeued = event
    return found


def of_this_machine(folder: Path, log: Path, finished: bool, clock: Clock) -> State:
    """Of a folder whose ranks were started without SLURM, by our launcher (its notes lie in ``log``) or by hand."""
    notes = [note for path in sorted(log.glob("rank_*.json")) if (note := read_json(path)) is not None]
    here = platform.node()
    beats, beating = [], []
    for path in sorted((folder / "log").glob("heartbeat-rank-*.json")):
        if (beat := read_json(path)) is None:
            continue
        beats.append(beat)
        # of a rank on another machine: by the age of its file, since its clock may be another
        fresh = (clock.age(path) or 0.0) < FRESH_S
        if not beat.get("ended") and (lives(beat) if beat.get("host") == here else fresh):
            beating.append(beat)
    living = [note for note in notes if "outcome" not in note and lives(note)]
    if living or beating:
        return State(RUNNING, where=str((beating or [{}])[0].get("host", here)))
    if finished or (notes and all(note.get("outcome") == "done" for note in notes)):
        return State(FINISHED)
    for kinds, name in ((("user_error", "crashed", "died"), FAILED), (("stopped", "interrupted"), STOPPED)):
        found = [note for note in notes if note.get("outcome") in kinds]
        if found:
            note = min(found, key=lambda one: one.get("ended", 0.0))
            return State(name, one_line(note.get("message") or f"rank {note.get('rank')} {note['outcome']}", last=True))
    told = [b["ended"] for b in beats if b.get("ended")]
    if told:
        return State(FAILED, one_line(min(told, key=lambda text: text.startswith("gave up: "))))
    if _starting(folder, clock):
        return State(RUNNING, where=here)
    if notes or beats:
        return State(
            STOPPED, "its processes are gone without a word (killed? out of memory?); the same command goes on"
        )
    return State(STOPPED)


def lives(note: Mapping[str, Any]) -> bool:
    """Whether the process of this machine that a note names by pid and start still runs."""
    try:
        return Identity(int(note["pid"]), str(note["started"])).alive()
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
