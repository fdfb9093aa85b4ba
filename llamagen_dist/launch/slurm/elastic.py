"""Running on with fewer nodes, and growing again: whose turn it is among the jobs of one launch.

A launch may submit, beside the wanted job, smaller jobs for the same folder that begin later (stand-bys: a requeued
job keeps its number of tasks, so one job cannot shrink). The running job's keeper pushes their begin into the future;
when it has been silent for ``after_s``, because its nodes are gone and do not come back, the next smaller one begins,
becomes the folder's owner and resumes from the last checkpoint at the same global batch. A larger one that begins while
a smaller one runs asks it to save, waits for its end and resumes from there. Whoever is not needed waits in the queue.

Who may run on is read from SLURM's queue, which is the same for all; owner.json then fences off who lives on unseen.
"""

import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

from llamagen_dist.files import seconds_old
from llamagen_dist.launch.folder import JobFolder, JobSpec, outcome_of, steps_done
from llamagen_dist.launch.slurm import lock, queue
from llamagen_dist.launch.slurm.queue import QueuedJob, SilentError

POLL_S = 1.0
REMIND_S = 5.0  # the signal is sent again: a job that has just begun has no ranks yet that could hear it
SILENT_S = 300.0  # how long SLURM may be silent at the start of a job
LISTEN_S = 15.0
UNSEEN_S = 600.0  # a job that has ended but whose nodes do not answer is waited for so long, then fenced off
T = TypeVar("T")
MOST_WAITS = 20
"""A stand-by that began so many times in vain ends: the running job's keeper cannot push it."""


@dataclass(frozen=True)
class Decision:
    """What a job that begins has to do. others: jobs whose end it waits for."""

    action: Literal["go", "take over", "stand by", "give up"]
    others: tuple[str, ...] = ()
    reason: str = ""
    lost: bool = False
    """One of them should be running, but shows no sign of life."""


def decide_turn(
    me: str,
    jobs: Sequence[str],
    states: Mapping[str, QueuedJob],
    owner: str | None,
    quiet_s: float,
    after_s: float,
) -> Decision:
    """Whose turn it is, from what SLURM's queue says.

    jobs: of this launch, the largest first. owner: the job that owned the folder last. quiet_s: since the owner's last
    sign of life.
    """
    jobs = jobs if me in jobs else (*jobs, me)
    position = jobs.index(me)

    def among(some: Sequence[str], *kinds: str) -> tuple[str, ...]:
        return tuple(job for job in some if job in states and states[job].state in kinds)

    last = owner if owner is not None and owner in jobs else jobs[0]
    if last != me and not (last in states and states[last].alive):
        return Decision("give up", reason=f"job {last}, which it stood by for, was cancelled or has ended")
    larger, smaller = jobs[:position], jobs[position + 1 :]
    ending = among([*larger, *smaller], "COMPLETING")
    running = among(larger, "RUNNING")
    if running and quiet_s < after_s:
        return Decision("stand by", running, f"job {running[0]} runs")
    others = (*running, *among(smaller, "RUNNING"), *ending)
    return Decision("take over", others, lost=bool(running)) if others else Decision("go")


def claim(spec: JobSpec, me: str) -> bool:
    """Whether this incarnation (JOB.RESTART) may own the folder now, all others of its launch having ended.

    Called by the batch script of a job before its ranks. False: it is back in the queue, or has nothing to do any more;
    the script has to end.
    """
    folder, (job, restart) = spec.job, me.split(".")
    held = lock.read(folder)
    jobs = held.jobs if held is not None else ()
    if len(jobs) < 2 and job in (jobs or (job,)):
        return True
    facts: dict[str, Any] = {"job": job, "restart": int(restart), "steps": steps_done(Path(spec.folder))}
    if over(folder):
        _say("the run has ended: nothing is left to do")
        return False

    def ask() -> Decision | None:
        states = _patiently(queue.my_jobs)
        if states is None or job not in states:
            return None  # a list without this very job is another user's, as in a container with other user names
        last = (lock.owner(folder) or "").partition(".")[0] or None
        return decide_turn(job, jobs, states, last, seconds_old(folder.beat), spec.limits.after_s)

    decision = ask()
    if decision is not None and decision.lost:
        time.sleep(LISTEN_S)  # it may have begun a moment ago: then it shows by now
        decision = ask()
    if decision is None:
        if job == jobs[0]:
            return True  # the fence keeps whoever else may run from writing
        _say("SLURM does not say whether another job runs: this stand-by ends")
        return False
    if decision.action == "give up":
        _say(f"{decision.reason}: this job ends")
        folder.tell("gave_up", reason=decision.reason, **facts)
        cancel_others(folder, job, only_waiting=True)
        return False
    if decision.action == "stand by":
        return _back_into_the_queue(folder, decision, facts)
    folder.beat.touch()
    if decision.others:
        for other in decision.others:
            folder.tell("takes_over", **facts, **{"from": other})
        _say(f"waiting until job {', '.join(decision.others)} has saved and ended")
        _end_of(folder, decision.others, spec.limits.signal_delay_s)
        if over(folder):
            _say("the run has ended meanwhile: nothing is left to do")
            return False
    return True


def _back_into_the_queue(folder: JobFolder, decision: Decision, facts: dict[str, Any]) -> bool:
    """SLURM lets a requeued job wait a little; meanwhile the keeper of the running one pushes it on."""
    waits = 0
    for event in reversed(folder.events()):
        if event["event"] in ("started", "submitted"):
            break
        waits += event["event"] == "waits" and event["job"] == facts["job"]
    if waits >= MOST_WAITS:
        _say(f"{decision.reason}, but its keeper does not hold this stand-by back: it ends")
        return False
    folder.tell("waits", reason=decision.reason, **facts)
    _say(f"{decision.reason}: back into the queue")
    _patiently(lambda: queue.requeue(facts["job"]))
    time.sleep(60)  # SLURM ends this script meanwhile
    return False


def _end_of(folder: JobFolder, others: Sequence[str], save_s: float) -> None:
    """Ask the others to save and stop, and wait until none runs; what does not listen is requeued without its leave."""
    began, told, forced = time.monotonic(), -REMIND_S, False
    while True:
        folder.beat.touch()
        states = _patiently(queue.my_jobs) or {}
        running = [job for job in others if job in states and states[job].state == "RUNNING"]
        ending = [job for job in others if job in states and states[job].state == "COMPLETING"]
        waited = time.monotonic() - began
        if not running and (not ending or waited > UNSEEN_S):
            return
        if running and waited > save_s and not forced:
            _say(f"job {', '.join(running)} has not stopped within {save_s:.0f} s: requeueing it")
            for job in running:
                _patiently(lambda job=job: queue.requeue(job))  # type: ignore[misc]
            forced = True
        elif running and not forced and time.monotonic() - told > REMIND_S:
            for job in running:
                _quietly(lambda job=job: queue.signal(job, patience_s=REMIND_S))  # type: ignore[misc]
            told = time.monotonic()
        if waited > save_s + UNSEEN_S:
            return  # fenced off from here on
        time.sleep(POLL_S)


def makes_room(folder: JobFolder, job: str) -> str | None:
    """For whom this job was asked to stop in its present incarnation: another job's id, or None."""
    for event in reversed(folder.events()):
        if event["event"] == "started" and event["job"] == job:
            return None
        if event["event"] == "takes_over" and event.get("from") == job:
            return str(event["job"])
        if event["event"] == "makes_room" and event["job"] == job:
            return str(event["for"])
    return None


def over(folder: JobFolder) -> bool:
    """Whether this launch has ended, well or not."""
    return outcome_of(folder.events()) != ""


def cancel_others(folder: JobFolder, job: str, only_waiting: bool = False) -> None:
    """Cancel the other jobs of this launch, as far as SLURM answers: they would find nothing to do."""
    held = lock.read(folder)
    others = [other for other in (held.jobs if held else ()) if other != job]
    if others and only_waiting:
        states = _quietly(queue.my_jobs) or {}
        others = [other for other in others if other in states and states[other].state == "PENDING"]
    if others:
        _quietly(lambda: queue.cancel(others))


def left_over(folder: JobFolder, held: lock.Lock, states: Mapping[str, QueuedJob]) -> list[str]:
    """Stand-bys that wait for a run that has ended, or for a job that its user has cancelled: once they begin, they
    will find nothing to do."""
    holder = (lock.owner(folder) or "").partition(".")[0] or None
    waiting = [job for job in held.jobs if job in states and states[job].alive]
    if any(states[job].state != "PENDING" for job in waiting):
        return []
    if over(folder):
        return waiting
    return [job for job in waiting if decide_turn(job, held.jobs, states, holder, 0.0, 1.0).action == "give up"]


def cancel_left_over(folder: JobFolder, held: lock.Lock) -> None:
    """Raises SilentError."""
    queue.cancel(left_over(folder, held, queue.my_jobs()))


def _patiently(ask: Callable[[], T]) -> T | None:
    """What SLURM answers; None after it has been silent for SILENT_S."""
    deadline = time.monotonic() + SILENT_S
    while True:
        try:
            return ask()
        except SilentError as error:
            if time.monotonic() > deadline:
                return None
            _say(str(error))
            time.sleep(5 * POLL_S)


def _quietly(ask: Callable[[], T]) -> T | None:
    try:
        return ask()
    except SilentError as error:
        _say(str(error))
        return None


def _say(text: str) -> None:
    print(f"llamagen: {text}", file=sys.stderr, flush=True)
