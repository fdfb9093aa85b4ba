"""Follow jobs of a cluster to their end, and say what happens to them."""

import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

from llamagen_dist.console import Screen
from llamagen_dist.errors import EXIT_INTERRUPTED
from llamagen_dist.launch.folder import JobFolder
from llamagen_dist.launch.here import command
from llamagen_dist.launch.slurm import queue
from llamagen_dist.launch.state import state_of

POLL_S = 2.0
FILES_PER_S = 25.0  # of many folders fewer are looked at, for the disk's sake
ASK_EVERY_S = 15.0
GONE = "no job runs or waits for it any more"


def watch(jobs: Mapping[str, JobFolder], screen: Screen) -> dict[str, str]:
    """Stay until none of the jobs runs or waits, and say what happens to them, through requeues.

    jobs: by the name that people know; of a single one, progress is shown too, and no name.
    Returns for every one that did not end well why; GONE where it was cancelled. Ctrl-C ends the watching, not the
    jobs: SystemExit(130).
    """
    seen = {name: len(job.events()) for name, job in jobs.items()}
    sizes = {name: _size(job) for name, job in jobs.items()}
    left = {name: job for name, job in jobs.items() if not job.is_done()}
    ended: dict[str, str] = {}
    asked = time.monotonic()
    only = next(iter(jobs.values())) if len(jobs) == 1 else None

    def say(name: str, text: str) -> None:
        screen.say(text if only is not None else f"{name}: {text}")

    def look() -> None:
        nonlocal asked
        for name, job in list(left.items()):
            if _size(job) == sizes[name]:
                continue
            sizes[name] = _size(job)
            events = job.events()
            for event in events[seen[name] :]:
                say(name, describe(event))
            seen[name] = len(events)
            failed = job.read(job.failed)
            if job.is_done():
                del left[name]
            elif failed is not None:
                ended[name] = str(failed.get("reason", ""))
                del left[name]
        if left and time.monotonic() - asked > ASK_EVERY_S:
            asked = time.monotonic()
            for name in _gone(left, screen.say):
                ended[name] = GONE
                say(name, GONE)
                del left[name]

    try:
        with screen.follow(only.progress) if only is not None else nullcontext(lambda: None) as tick:
            while left:
                time.sleep(max(POLL_S, len(left) / FILES_PER_S))
                look()
                tick()
    except KeyboardInterrupt:
        screen.say(f"the jobs run on; follow them again with:\n  {command()}")
        sys.exit(EXIT_INTERRUPTED)
    return ended


def describe(event: Mapping[str, Any]) -> str:
    """One event of history.jsonl for people."""
    when = time.strftime("%H:%M:%S", time.localtime(event["time"]))
    steps = f" at step {event['steps']:.0f}" if "steps" in event else ""
    more = ", ".join(str(event[key]) for key in ("reason", "why", "to") if event.get(key))
    what = event["event"].replace("_", " ")
    return f"{when} job {event.get('job')} {what}{steps}{': ' if more else ''}{more}"


def _gone(jobs: Mapping[str, JobFolder], say: Callable[[str], None]) -> Sequence[str]:
    """Those that nothing runs for, and that have not ended either; none where SLURM gives no answer."""
    try:
        known = queue.my_jobs()
    except queue.SilentError as error:
        say(str(error))
        return []
    return [name for name, job in jobs.items() if state_of(job, known).kind == "open"]


def _size(job: JobFolder) -> int:
    try:
        return job.history.stat().st_size
    except FileNotFoundError:
        return 0
