"""Running on with fewer nodes, and growing again: whose turn it is among the jobs of one launch.

A requeued job keeps its number of tasks, so one job cannot shrink. A launch may therefore submit, beside the wanted
job, smaller jobs for the same folder that begin later (stand-bys). The running job's keeper pushes their begin into the
future; when it has been silent for ``after_s``, because its nodes are gone and do not come back, the next smaller one
begins, becomes the folder's owner and resumes from the last checkpoint at the same global batch. A larger one that
begins while a smaller one runs asks it to save, waits for its end and resumes from there. Whoever is not needed waits
in the queue.

Who may run is read from SLURM's queue, which is the same for all; owner.json then fences off who lives on unseen. What
SLURM does not answer is asked again: no silence of its may end a run.
"""

import functools
import itertools
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

from llamagen_dist.errors import UserError
from llamagen_dist.files import seconds_old
from llamagen_dist.launch.folder import JobFolder, JobSpec, outcome_of
from llamagen_dist.launch.scoring import Scoring
from llamagen_dist.launch.slurm import lock, queue
from llamagen_dist.launch.slurm.queue import NodeKind, QueuedJob, SilentError
from llamagen_dist.launch.slurm.task import facts_of
from llamagen_dist.process import Identity

POLL_S = 1.0
BEAT_EVERY = 5  # polls
REMIND_S = 5.0  # the signal is sent again: a job that has just begun has no ranks yet that could hear it
SILENT_S = 300.0  # how long SLURM may be silent at the start of a job
LISTEN_S = 15.0
UNSEEN_S = 600.0  # a job that has ended but whose nodes do not answer is waited for so long, then fenced off
LONGEST_PERIOD_S = 120.0
MOST_WAITS = 20  # a stand-by that began so many times in vain ends: the running job's keeper cannot push it
T = TypeVar("T")


@dataclass(frozen=True)
class Decision:
    """What a job that begins has to do. others: jobs whose end it waits for. lost: one of them should be running, but
    shows no sign of life."""

    action: Literal["go", "take over", "stand by", "give up"]
    others: tuple[str, ...] = ()
    reason: str = ""
    lost: bool = False


def decide_turn(
    me: str, jobs: Sequence[str], states: Mapping[str, QueuedJob], owner: str | None, quiet_s: float, after_s: float
) -> Decision:
    """Whose turn it is, from what SLURM's queue says.

    jobs: of this launch, the largest first. owner: the job that owned the folder last. quiet_s: since the owner's last
    sign of life.
    """
    jobs = jobs if me in jobs else (*jobs, me)
    larger, smaller = jobs[: jobs.index(me)], jobs[jobs.index(me) + 1 :]
    # A lost job is back in the queue, since SLURM requeues it. One that is not was cancelled, and so was the run.
    last = owner if owner is not None and owner in jobs else jobs[0]
    if last != me and not (last in states and states[last].alive):
        return Decision("give up", reason=f"job {last}, which it stood by for, was cancelled or has ended")
    # The largest that can run should: a smaller one begins beside it only where its keeper could not push.
    running = _in_state(larger, states, "RUNNING")
    if running and quiet_s < after_s:
        return Decision("stand by", running, f"job {running[0]} runs")
    # A larger one that is silent for so long is lost though SLURM has not noticed; smaller ones stood in for us. One
    # that is ending may still write, whatever its size.
    others = (*running, *_in_state(smaller, states, "RUNNING"), *_in_state([*larger, *smaller], states, "COMPLETING"))
    return Decision("take over", others, lost=bool(running)) if others else Decision("go")


def claim(spec: JobSpec, me: str) -> bool:
    """Whether this incarnation (JOB.RESTART) may own the folder now, all others of its launch having ended.

    Called by the batch script of a job before its ranks. False: it is back in the queue, or has nothing to do any more;
    the script has to end.
    """
    folder, job = spec.job, me.partition(".")[0]
    current = lock.read(folder)
    jobs = current.jobs if current is not None else ()
    if len(jobs) < 2 and job in (jobs or (job,)):
        return True
    if _over(folder):
        return False

    def ask() -> Decision | None:
        states = _ask(queue.my_jobs, SILENT_S)
        if states is None or job not in states:
            return None  # a list without this very job is another user's, as in a container with other user names
        return decide_turn(job, jobs, states, lock.last_job(folder), seconds_old(folder.beat), spec.limits.after_s)

    decision = ask()
    if decision is not None and decision.lost:
        time.sleep(LISTEN_S)  # it may have begun a moment ago: then it shows by now
        decision = ask()
    if decision is None:
        # the wanted job may run: the fence keeps whoever else does from writing
        if job != jobs[0]:
            _say("SLURM does not say whether another job runs: this stand-by ends")
        return job == jobs[0]
    facts = facts_of(spec, me)
    if decision.action == "give up":
        _say(f"{decision.reason}: this job ends")
        folder.tell("gave_up", reason=decision.reason, **facts)
        cancel_others(folder, job, only_waiting=True)
        return False
    if decision.action == "stand by":
        _back_into_the_queue(folder, decision.reason, facts)
        return False
    folder.beat.touch()
    if decision.others:
        for other in decision.others:
            folder.tell("takes_over", **facts, **{"from": other})
        _say(f"waiting until job {', '.join(decision.others)} has saved and ended")
        _end_of(folder, decision.others, spec.limits.signal_delay_s)
    return not decision.others or not _over(folder)


def _back_into_the_queue(folder: JobFolder, reason: str, facts: dict[str, Any]) -> None:
    """SLURM lets a requeued job wait a little; meanwhile the keeper of the running one pushes it."""
    since_start = itertools.takewhile(lambda e: e["event"] not in ("started", "submitted"), reversed(folder.events()))
    if sum(event["event"] == "waits" and event["job"] == facts["job"] for event in since_start) >= MOST_WAITS:
        _say(f"{reason}, but its keeper does not hold this stand-by back: it ends")
        return
    folder.tell("waits", reason=reason, **facts)
    _say(f"{reason}: back into the queue")
    _ask(lambda: queue.requeue(facts["job"]), SILENT_S)
    time.sleep(60)  # SLURM ends this script meanwhile


def _end_of(folder: JobFolder, others: Sequence[str], save_s: float) -> None:
    """Ask the others to save and stop, and wait until none runs; what does not listen is requeued without its leave."""
    began, asked, forced = time.monotonic(), -REMIND_S, False
    while True:
        folder.beat.touch()  # so that none of the still smaller ones begins meanwhile
        states = _ask(queue.my_jobs, SILENT_S) or {}
        running = _in_state(others, states, "RUNNING")
        now = time.monotonic()
        ending = _in_state(others, states, "COMPLETING") if now - began <= UNSEEN_S else ()
        if not (running or ending) or now - began > save_s + UNSEEN_S:
            return  # who lives on unseen is fenced off from here on
        if now - began > save_s and not forced:
            forced = True
            for job in running:
                _say(f"job {job} has not stopped within {save_s:.0f} s: requeueing it")
                _ask(functools.partial(queue.requeue, job), SILENT_S)
        elif now - asked > REMIND_S and not forced:
            asked = now
            for job in running:
                _ask(functools.partial(queue.signal, job, patience_s=REMIND_S))
        time.sleep(POLL_S)


def keep(spec: JobSpec, me: str, partition: str | None, script: Identity) -> None:
    """Beside the ranks, on their first node: show that the job lives, hold its stand-bys back, and have its checkpoints
    scored.

    me: this incarnation, JOB.RESTART. script: the batch script; with it this ends.
    """
    if spec.limits.after_s:  # a thread of its own: SLURM may be slow to answer, the beat may not
        threading.Thread(target=_tend, args=(spec, me, partition), name="stand-bys", daemon=True).start()
    scoring = Scoring.on_cluster(spec)
    for poll in itertools.count():
        if not script.alive():
            return
        scoring.look()
        if poll % BEAT_EVERY == 0:
            with suppress(OSError):  # a full disk; the next one may come through
                if lock.owner(spec.job) == me:  # a zombie on a lost node is no sign of life
                    spec.job.beat.touch()
        time.sleep(POLL_S)


def _tend(spec: JobSpec, me: str, partition: str | None) -> None:
    """Push the stand-bys, make room for a larger job, again and again."""
    folder, after_s, job, seen = spec.job, spec.limits.after_s, me.partition(".")[0], None
    while True:
        try:
            current = lock.read(folder)
            if current is not None and len(current.jobs) > 1 and lock.owner(folder) == me:
                states = queue.my_jobs()
                for other, seconds in begins(job, current.jobs, states, after_s).items():
                    _ask(functools.partial(queue.delay_start, other, seconds))
                kinds = queue.partition(partition) if job != current.jobs[0] else []
                larger = room_for(job, current.jobs, states, kinds, folder.events(), after_s, time.time())
                if larger is not None and larger == seen:  # twice: SLURM had the time to start it beside this one
                    folder.tell("makes_room", job=job, **{"for": larger})
                    queue.signal(job)
                    larger = None
                seen = larger
        except (UserError, OSError) as error:
            _say(f"stand-by jobs are not held back: {error}")
        time.sleep(period_s(after_s))


def period_s(after_s: float) -> float:
    """How often the stand-bys are pushed: often enough that one silent call to SLURM wakes none of them."""
    return min(LONGEST_PERIOD_S, max(1.0, after_s / 4))


def begins(me: str, jobs: Sequence[str], states: Mapping[str, QueuedJob], after_s: float) -> dict[str, int]:
    """In how many seconds each waiting smaller job may begin at the earliest: the smaller, the later."""
    smaller = jobs[jobs.index(me) + 1 :] if me in jobs else ()
    waiting = _in_state(smaller, states, "PENDING")
    return {job: round((smaller.index(job) + 1) * after_s + period_s(after_s)) for job in waiting}


def room_for(
    me: str,
    jobs: Sequence[str],
    states: Mapping[str, QueuedJob],
    kinds: Sequence[NodeKind],
    events: Sequence[Mapping[str, Any]],
    after_s: float,
    now: float,
) -> str | None:
    """The larger job that could run if this one gave its nodes back, where it is time to try; else None.

    SLURM's reason tells jobs that lack room (Resources) from those whose nodes are down or that wait for others; how
    much room there is, is a guess (its nodes may have to be of a kind), so after a try that only cost time the next one
    waits twice as long.
    events: of this launch, the oldest first. now: seconds since the epoch.
    """
    if me not in jobs or me not in states:
        return None
    larger = jobs[: jobs.index(me)]
    tries: list[float] = []
    for event in events:
        if event["event"] == "started" and event["job"] in larger:
            tries = []  # that one had helped
        elif event["event"] == "makes_room":
            tries.append(event["time"])
    if tries and now - tries[-1] < after_s * 2 ** len(tries):
        return None
    waiting = [job for job in _in_state(larger, states, "PENDING") if states[job].reason == "Resources"]
    room = sum(kind.idle for kind in kinds) + states[me].nodes
    return waiting[0] if waiting and states[waiting[0]].nodes <= room else None


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


def cancel_others(folder: JobFolder, job: str, only_waiting: bool = False) -> None:
    """Cancel the other jobs of this launch, as far as SLURM answers: they would find nothing to do."""
    current = lock.read(folder)
    others = tuple(other for other in (current.jobs if current else ()) if other != job)
    if others and only_waiting:
        others = _in_state(others, _ask(queue.my_jobs) or {}, "PENDING")
    _ask(lambda: queue.cancel(others))


def left_over(folder: JobFolder, current: lock.Lock, states: Mapping[str, QueuedJob]) -> list[str]:
    """Stand-bys that wait for a run that has ended, or for a job that its user has cancelled: once they begin, they
    will find nothing to do."""
    alive = [job for job in current.jobs if job in states and states[job].alive]
    if any(states[job].state != "PENDING" for job in alive):
        return []
    if outcome_of(folder.events()):
        return alive
    owner = lock.last_job(folder)
    return [job for job in alive if decide_turn(job, current.jobs, states, owner, 0.0, 1.0).action == "give up"]


def _over(folder: JobFolder) -> bool:
    ended = outcome_of(folder.events()) != ""
    if ended:
        _say("the run has ended: nothing is left to do")
    return ended


def _in_state(jobs: Sequence[str], states: Mapping[str, QueuedJob], state: str) -> tuple[str, ...]:
    return tuple(job for job in jobs if job in states and states[job].state == state)


def _ask(call: Callable[[], T], patience_s: float = 0.0) -> T | None:
    """What SLURM answers; None after it has been silent for so long."""
    deadline = time.monotonic() + patience_s
    while True:
        try:
            return call()
        except SilentError as error:
            _say(str(error))
            if time.monotonic() >= deadline:
                return None
            time.sleep(5 * POLL_S)


@functools.cache
def _say(text: str) -> None:
    """Once each, however often it is asked."""
    print(f"llamagen: {text}", file=sys.stderr, flush=True)
