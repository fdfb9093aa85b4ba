"""Beside the ranks of a running job, on its first node: shows that it lives, and holds its stand-bys back.

    python -m llamagen_dist.launch.slurm.keeper SPECS INDEX PID

Started by ``batch begin``; ends with the batch script, whose process id is PID. Nothing here may end a run: what SLURM
does not answer is said once and tried again.
"""

import os
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any

from llamagen_dist.errors import UserError
from llamagen_dist.launch.folder import JobSpec, read_spec
from llamagen_dist.launch.slurm import lock, queue
from llamagen_dist.launch.slurm.queue import NodeKind, QueuedJob
from llamagen_dist.launch.slurm.task import owner
from llamagen_dist.process import Identity, identify

TICK_S = 1.0
BEAT_S = 5.0
LONGEST_PERIOD_S = 120.0


def period_s(after_s: float) -> float:
    """How often the stand-bys are pushed: often enough that one silent call to SLURM wakes none of them."""
    return min(LONGEST_PERIOD_S, max(1.0, after_s / 4))


def begins(me: str, jobs: Sequence[str], states: Mapping[str, QueuedJob], after_s: float) -> dict[str, int]:
    """In how many seconds each waiting smaller job may begin at the earliest: the smaller, the later."""
    if me not in jobs:
        return {}
    smaller = jobs[jobs.index(me) + 1 :]
    return {
        job: round(number * after_s + period_s(after_s))
        for number, job in enumerate(smaller, start=1)
        if job in states and states[job].state == "PENDING"
    }


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
    tries: list[float] = []
    for event in events:
        if event["event"] == "started" and event["job"] in jobs[: jobs.index(me)]:
            tries = []
        elif event["event"] == "makes_room":
            tries.append(event["time"])
    if tries and now - tries[-1] < after_s * 2 ** len(tries):
        return None
    idle, mine = sum(kind.idle for kind in kinds), states[me].nodes
    for job in jobs[: jobs.index(me)]:
        state = states.get(job)
        if state is not None and (state.state, state.reason) == ("PENDING", "Resources"):
            return job if state.nodes <= idle + mine else None
    return None


class Keeper:
    def __init__(self, spec: JobSpec, me: str, partition: str | None) -> None:
        """me: this incarnation, JOB.RESTART."""
        self.folder, self.after_s, self.partition = spec.job, spec.limits.after_s, partition
        self.me = me
        self.job = me.split(".")[0]
        self._larger: str | None = None
        self._said: set[str] = set()

    def beat(self) -> None:
        """Only for the owner: a zombie on a lost node is no sign of life."""
        with suppress(OSError):  # a full disk; the next one may come through
            if lock.owner(self.folder) == self.me:
                self.folder.beat.touch()

    def look(self) -> None:
        """Push the stand-bys, make room for a larger job."""
        with self._saying():
            held = lock.read(self.folder)
            if held is None or len(held.jobs) < 2 or lock.owner(self.folder) != self.me:
                return
            states = queue.my_jobs()
            for job, seconds in begins(self.job, held.jobs, states, self.after_s).items():
                with self._saying():
                    queue.delay_start(job, seconds)
            if self.job == held.jobs[0]:
                return
            kinds = queue.partition(self.partition)
            events = self.folder.events()
            before, self._larger = self._larger, None
            larger = room_for(self.job, held.jobs, states, kinds, events, self.after_s, time.time())
            if larger is None or larger != before:  # seen twice: SLURM has had the time to start it beside this one
                self._larger = larger
            else:
                self.folder.tell("makes_room", job=self.job, **{"for": larger})
                queue.signal(self.job)

    @contextmanager
    def _saying(self) -> Iterator[None]:
        try:
            yield
        except (UserError, OSError) as error:
            if str(error) not in self._said:
                print(f"llamagen: stand-by jobs are not held back: {error}", file=sys.stderr, flush=True)
                self._said.add(str(error))

    def run(self, script: Identity) -> None:
        """Until the batch script has ended. SLURM may be slow to answer, the beat is not."""

        def watch() -> None:
            while True:
                self.look()
                time.sleep(period_s(self.after_s))

        if self.after_s:
            threading.Thread(target=watch, name="stand-bys", daemon=True).start()
        beaten = -BEAT_S
        while script.alive():
            if time.monotonic() - beaten >= BEAT_S:
                self.beat()
                beaten = time.monotonic()
            time.sleep(TICK_S)


def main(argv: list[str]) -> None:
    specs, index, pid = argv
    Keeper(read_spec(specs, int(index)), owner(os.environ), os.environ.get("SLURM_JOB_PARTITION")).run(
        identify(int(pid))
    )


if __name__ == "__main__":
    main(sys.argv[1:])
