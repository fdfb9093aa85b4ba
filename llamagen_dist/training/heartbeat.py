"""A small file per rank that says what it is doing, so that a rank that has stopped can be named by the others."""

import json
import platform
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from llamagen_dist.files import disk_time
from llamagen_dist.process import Identity, identify

WAITING = "communication"
GAVE_UP = "gave up: "
"""Begins the end of a rank that left because of another: what follows it is about that other one."""


@dataclass(frozen=True)
class Heartbeat:
    """step: completed ones. phase: start, train, validation or save. part: of the clock, and ``since`` when (seconds
    since the epoch). time: when this was written. ended: empty while it runs, else why it ended."""

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
    target = path(log, beat.rank)
    scratch = target.with_suffix(".tmp")
    scratch.write_text(json.dumps(asdict(beat)), encoding="utf-8")
    scratch.replace(target)


def read(log: Path, ranks: int) -> list[Heartbeat]:
    """The heartbeats that can be read, with their times brought to this host's clock.

    Hosts' clocks may differ by more than a rank may be silent. How old a heartbeat is says the disk: the time of its
    file against the disk's time now. The writer's own clock only says how long before that ``since`` was.
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
    """Remove what an earlier start with more ranks has left; theirs would be taken for a sign of life."""
    for file in log.glob("heartbeat-rank-*"):
        number = file.stem.removeprefix("heartbeat-rank-")
        if number.isdecimal() and int(number) >= ranks:
            file.unlink(missing_ok=True)


def first(rank: int) -> Heartbeat:
    me, now = identify(), time.time()
    return Heartbeat(rank, platform.node(), me.pid, me.started, 0, "start", "", now, now)


def gone(beats: list[Heartbeat], stale_s: float) -> list[str]:
    """A clause for every rank that has ended by itself, was killed, or gives no sign of life for ``stale_s``."""
    found = []
    for beat in beats:
        place = f"in step {beat.step + 1}, {_doing(beat)}"
        quiet = time.time() - beat.time
        if beat.ended and not beat.ended.startswith(GAVE_UP):
            found.append(f"{beat.name} ended in step {beat.step + 1}: {beat.ended}")
        elif beat.ended:
            continue
        elif beat.host == platform.node() and not Identity(beat.pid, beat.started).alive():
            found.append(f"{beat.name} was killed, last seen {place}")
        elif quiet > stale_s:
            found.append(
                f"{beat.name} gives no sign of life for {quiet:.0f} s, last seen {place}: its machine is lost, or "
                "it is stopped or stuck in C code"
            )
    return found


def behind(beats: list[Heartbeat]) -> list[str]:
    """A clause for every living rank that the others wait for: fewest steps, or the same and not itself waiting."""
    living = [beat for beat in beats if not beat.ended]
    if not living:
        return []
    fewest = min(beat.step for beat in living)
    slow = [beat for beat in living if beat.step == fewest]
    busy = [beat for beat in slow if beat.part != WAITING]
    if busy and len(busy) < len(living):
        slow = busy
    if len(slow) == len(living) and len(living) > 1:
        return []
    now = time.time()
    return [f"{b.name} is in step {b.step + 1}, {_doing(b)} for {now - b.since:.1f} s" for b in slow]


def told(beats: list[Heartbeat]) -> list[str]:
    """What ranks that have given up said of others."""
    return [beat.ended.removeprefix(GAVE_UP) for beat in beats if beat.ended.startswith(GAVE_UP)]


def _doing(beat: Heartbeat) -> str:
    return beat.phase if beat.phase != "train" or not beat.part else beat.part


def refreshed(beat: Heartbeat, **changes: object) -> Heartbeat:
    return replace(beat, time=time.time(), **changes)  # type: ignore[arg-type]
