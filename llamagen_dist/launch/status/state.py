"""Whether a folder's program runs, waits, has ended or has failed, and why."""

import platform
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llamagen_dist.launch.process import Identity, started_at
from llamagen_dist.launch.slurm.queue import JobState
from llamagen_dist.launch.slurm.records import Place, read_json
from llamagen_dist.launch.status.files import Clock, read_text

RUNNING, WAITING, SUBMITTING = "running", "waiting", "submitting"
FINISHED, FAILED, STOPPED, UNKNOWN = "finished", "failed", "stopped", "unknown"
SUBMITTING_S = 90.0  # as lock.py has it: a launch that holds the lock for so long without a job has died
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


def of_cluster(folder: Path, finished: bool, jobs: Jobs, clock: Clock) -> State:
    """Of a folder that has been launched on a cluster (FOLDER/launch). ``finished``: its own files say so."""
    place = Place.of(folder)
    events = place.events()
    lock = read_json(place.lock) or {}
    restarts = tuple(count_restarts(events).items())
    names = [str(job) for job in lock.get("jobs", [])]
    if not names and jobs:  # a launch that died after sbatch has written down no id, but its jobs carry its token
        names = [job.job for job in jobs.values() if job.comment and job.comment == lock.get("token")]
    last = names[0] if names else next((str(e["job"]) for e in reversed(events) if e.get("job")), "")

    def state(name: str, reason: str = "", job: str = last, where: str = "") -> State:
        return State(name, one_line(reason), job, where, restarts)

    alive = [jobs[name] for name in names if name in jobs and jobs[name].alive] if jobs else []
    ended = next((e["event"] for e in reversed(events) if e.get("event") in ("done", "failed", "submitted")), "")
    if finished or ended == "done":
        return state(FINISHED)
    if ended == "failed" or (not alive and place.end.exists()):
        end = read_json(place.end) or {}
        return state(FAILED, str(end.get("reason", "it says no reason")))
    if not names and (clock.age(place.lock) or SUBMITTING_S) < SUBMITTING_S:
        return state(SUBMITTING, f"by {lock.get('user', 'somebody')} on {lock.get('host', 'another machine')}")
    if jobs is None:
        return state(UNKNOWN, "SLURM does not answer")
    if not alive:
        how = jobs[last].state if last in jobs else "forgotten by SLURM"
        gone = f"job {last} is over ({how})" if last else "nothing runs or waits"
        if events and events[-1]["event"] == "gave_up":
            gone += f": {events[-1].get('reason')}"
        return state(STOPPED, f"{gone}; the same launch goes on")
    now = min(alive, key=lambda one: (one.state != "RUNNING", one.state == "PENDING"))
    if now.state == "RUNNING":
        wanted = next((one for one in alive if one.job == names[0] != now.job), None)
        fewer = f"with fewer nodes, while job {wanted.job} waits for {wanted.reason}" if wanted else ""
        return state(RUNNING, fewer, now.job, now.where)
    if now.state != "PENDING":
        return state(RUNNING, now.state.lower(), now.job, now.where)
    begun = any(event["event"] == "started" for event in events)
    reason = f"{'requeued, waits ' if begun else ''}for {now.reason}"
    if now.reason == "DependencyNeverSatisfied":
        reason += ": it will never start"
    again: dict[str, Any] = next(
        (e for e in reversed(events) if e["event"] in ("requeued", "started", "submitted")), {}
    )
    if again.get("fault"):
        reason += f", after: {again.get('why')}"
    return state(WAITING, reason, now.job)


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
