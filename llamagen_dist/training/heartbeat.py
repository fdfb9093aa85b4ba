"""A small file per rank that says what it is doing, so that a rank that has stopped can be named by the others."""

import json
import platform
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from llamagen_dist.files import disk_time
from llamagen_dist.process import Identity, identify

WAITING = "communication"
"""The part of a rank that waits for others in a collective."""
GAVE_UP = "gave up: "
"""Begins ``ended`` of a rank that left because of another one; the rest is about that one."""


@dataclass(frozen=True)
class Heartbeat:
    """What one rank was doing when it last wrote its file.

    pid, started: the process (process.Identity), so that a reused pid is not taken for it.
    step: completed steps.
    phase: start, train, validation or save.
    part: the clock's innermost part.
    since: when that part began, in seconds since the epoch.
    time: when this was written, likewise.
    ended: empty while the rank runs, else why it ended.
    """

    rank: int
    host: str
    pid: int
    started: str
    step: int
    phase: str
    part: str
    since: float
    time: float
    ended: str = ""

    @property
    def name(self) -> str:
        return f"rank {self.rank} (process {self.pid} on {self.host})"


def path(log: Path, rank: int) -> Path:
    return log / f"heartbeat-rank-{rank}.json"


def write(log: Path, beat: Heartbeat) -> None:
    # renamed but not synced, as files.write_text would: every rank writes one a tick, and none need survive a power cut
    target = path(log, beat.rank)
    scratch = target.with_suffix(".tmp")
    scratch.write_text(json.dumps(asdict(beat)), encoding="utf-8")
    scratch.replace(target)


def read(log: Path, ranks: int) -> list[Heartbeat]:
    """The heartbeats of ranks 0 … ``ranks`` - 1 that can be read, with their times converted to this host's clock.

    Hosts' clocks may differ by more than a rank may be silent, so the age of a heartbeat is measured on the disk: the
    time of its file against the disk's time now. The writer's own clock is used only for the difference between
    ``since`` and ``time``.
    """
    now = time.time()
    try:
        offset = now - disk_time(log)
    except OSError:  # a full disk takes no new file: then this host's clock has to do
        offset = 0.0
    beats = []
    for rank in range(ranks):
        try:
            file = path(log, rank)
            written = file.stat().st_mtime + offset
            beat = Heartbeat(**json.loads(file.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError):
            continue
        beats.append(replace(beat, time=written, since=written - (beat.time - beat.since)))
    return beats


def forget(log: Path, ranks: int) -> None:
    """Remove the files of an earlier start with more ranks, which would be taken for signs of life."""
    for file in log.glob("heartbeat-rank-*"):
        number = file.stem.removeprefix("heartbeat-rank-")
        if number.isdecimal() and int(number) >= ranks:
            file.unlink(missing_ok=True)


def first(rank: int) -> Heartbeat:
    me, now = identify(), time.time()
    return Heartbeat(rank, platform.node(), me.pid, me.started, 0, "start", "", now, now)


def gone(beats: list[Heartbeat], stale_s: float) -> list[str]:
    """A clause for every rank that has ended by itself, was killed, or gives no sign of life for ``stale_s``."""
    clauses = []
    for beat in beats:
        last_seen = f"last seen in step {beat.step + 1}, {_doing(beat)}"
        silent_s = time.time() - beat.time
        if beat.ended.startswith(GAVE_UP):
            continue  # because of another rank, which has a clause of its own
        if beat.ended:
            clauses.append(f"{beat.name} ended in step {beat.step + 1}: {beat.ended}")
        elif beat.host == platform.node() and not Identity(beat.pid, beat.started).alive():
            clauses.append(f"{beat.name} was killed, {last_seen}")
        elif silent_s > stale_s:  # a process of another host cannot be asked: only its silence is known
            clauses.append(
                f"{beat.name} gives no sign of life for {silent_s:.0f} s, {last_seen}: its machine is lost, or "
                "it is stopped or stuck in C code"
            )
    return clauses


def behind(beats: list[Heartbeat]) -> list[str]:
    """A clause for every living rank that the others wait for: fewest steps, or the same and not itself waiting.

    None where that is all of them: then the files do not tell who is at fault.
    """
    living = [beat for beat in beats if not beat.ended]
    if not living:
        return []
    fewest = min(beat.step for beat in living)
    slow = [beat for beat in living if beat.step == fewest]
    # a step ends for all ranks in the same collective, so equal steps are the rule; who is not in one yet is late
    busy = [beat for beat in slow if beat.part != WAITING]
    if busy and len(busy) < len(living):
        slow = busy
    if len(slow) == len(living) and len(living) > 1:
        return []
    now = time.time()
    return [f"{b.name} is in step {b.step + 1}, {_doing(b)} for {now - b.since:.1f} s" for b in slow]


def reported(beats: list[Heartbeat]) -> list[str]:
    """What ranks that have given up wrote about the rank they waited for."""
    return [beat.ended.removeprefix(GAVE_UP) for beat in beats if beat.ended.startswith(GAVE_UP)]


def _doing(beat: Heartbeat) -> str:
    return beat.phase if beat.phase != "train" or not beat.part else beat.part


def refreshed(beat: Heartbeat, **changes: object) -> Heartbeat:
    return replace(beat, time=time.time(), **changes)  # type: ignore[arg-type]
