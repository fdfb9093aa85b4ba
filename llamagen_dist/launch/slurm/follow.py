"""Jobs that belong together (a sweep's points, a pipeline's stages): what goes on, and staying until the end."""

import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from llamagen_dist.console import Screen
from llamagen_dist.errors import UserError
from llamagen_dist.launch.pipeline import command
from llamagen_dist.launch.slurm import queue
from llamagen_dist.launch.slurm.records import Place, read_json
from llamagen_dist.launch.slurm.run import ENDING_PATIENCE_S, Found, describe, find

POLL_S = 2.0
FILES_PER_S = 25.0  # of many folders fewer are looked at, for the disk's sake
ASK_EVERY_S = 15.0
GONE = "no job runs or waits for it any more"


@dataclass(frozen=True)
class Part:
    """name: for people. folder: what find() reads. done: the file that says that it has ended well."""

    name: str
    folder: Path
    done: Path


def settled(parts: Sequence[Part], screen: Screen) -> dict[str, Found]:
    """What goes on in every folder, by the part's name, once none is between two states (a job just ending, another
    launch just submitting). SLURM is asked once for all of them. Raises UserError."""
    deadline, told = time.monotonic() + ENDING_PATIENCE_S, False
    while True:
        jobs = queue.mine()
        found = {part.name: find(part.folder, jobs) for part in parts}
        between = [name for name, one in found.items() if one.kind == "submitting" or _ending(one)]
        if not between:
            return found
        if time.monotonic() > deadline:
            raise UserError(f"{between[0]}: its job is still starting or ending; try again later")
        if not told:
            screen.say(f"waiting for jobs that are just starting or ending ({between[0]}, …)")
            told = True
        time.sleep(0.5)


def _ending(found: Found) -> bool:
    """Whether its job will be gone in a moment."""
    state = found.state
    return (
        state is not None
        and state.alive
        and (state.state == "COMPLETING" or state.reason == "DependencyNeverSatisfied")
    )


def watch(parts: Sequence[Part], screen: Screen) -> Mapping[str, str]:
    """Stay until none of the jobs runs or waits, and say what happens to them, through requeues.

    Returns for every part that did not end well why (by name); GONE where it was cancelled. Ctrl-C ends the watching,
    not the jobs: SystemExit(130).
    """
    seen = {part.name: len(Place.of(part.folder).events()) for part in parts}
    sizes = {part.name: _size(part) for part in parts}
    open_parts = {part.name: part for part in parts if not part.done.exists()}
    ended: dict[str, str] = {}
    asked = time.monotonic()
    try:
        while open_parts:
            time.sleep(max(POLL_S, len(open_parts) / FILES_PER_S))
            for name, part in list(open_parts.items()):
                if _size(part) == sizes[name]:
                    continue
                sizes[name] = _size(part)
                events = Place.of(part.folder).events()
                for event in events[seen[name] :]:
                    screen.say(f"{name}: {describe(event)}")
                seen[name] = len(events)
                end = read_json(Place.of(part.folder).end)
                if part.done.exists():
                    del open_parts[name]
                elif end is not None:
                    ended[name] = str(end.get("reason", ""))
                    del open_parts[name]
            if open_parts and time.monotonic() - asked > ASK_EVERY_S:
                asked = time.monotonic()
                for name in _gone(open_parts, screen.say):
                    ended[name] = GONE
                    screen.say(f"{name}: {ended[name]}")
                    del open_parts[name]
    except KeyboardInterrupt:
        screen.say(f"the jobs go on; follow them again with:\n  {command()}")
        sys.exit(130)
    return ended


def _gone(parts: Mapping[str, Part], say: Callable[[str], None]) -> list[str]:
    """Parts that nothing runs for, and that have not ended either; none where SLURM gives no answer."""
    try:
        jobs = queue.mine()
    except queue.SilentError as error:
        say(str(error))
        return []
    return [
        name
        for name, part in parts.items()
        if find(part.folder, jobs).kind not in ("running", "submitting", "finished", "failed")
    ]


def _size(part: Part) -> int:
    try:
        return Place.of(part.folder).history.stat().st_size
    except FileNotFoundError:
        return 0
