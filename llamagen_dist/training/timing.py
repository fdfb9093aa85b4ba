"""How long this run needs to stop well: measured while it trains, and compared with what the cluster gives it."""

import json
import math
import os
import platform
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from llamagen_dist.files import write_text
from llamagen_dist.program import SIGNAL_DELAY

MARGIN = 2.0  # a save may be under way when the signal comes, and the next one be slower


@dataclass(frozen=True)
class Timing:
    """Seconds, as rank 0 measured them.

    step_s: the longest step of a start, without its first one, which compiles.
    validation_s: the longest validation; 0 without.
    save_s: the last save, from its beginning until it was committed.
    """

    step_s: float
    validation_s: float
    save_s: float
    host: str

    @property
    def needed_s(self) -> float:
        """From a signal to the end of its save: a step or a validation is finished first."""
        return MARGIN * (max(self.step_s, self.validation_s) + self.save_s)

    def warning(self, signal_delay_s: float) -> str | None:
        """A sentence where that is more than the signal comes before the time limit."""
        if signal_delay_s >= self.needed_s:
            return None
        name = "step" if self.step_s >= self.validation_s else "validation"
        return (
            f"signal_delay_s: a signal {signal_delay_s:g} s before the time limit may be too late for a save: the "
            f"longest {name} took {max(self.step_s, self.validation_s):.3g} s and a save {self.save_s:.3g} s (on "
            f"{self.host}); give twice both, {math.ceil(self.needed_s)} s, in the cluster profile"
        )


class Stopwatch:
    """Measures one start of a run and keeps log/timing.json up to date (on rank 0, which alone knows of commits).

    log: the run's folder log/.
    say(text): prints a line; called once, where a cluster signals its jobs too late before their time limit.
    """

    def __init__(self, log: Path, say: Callable[[str], None]) -> None:
        self._path, self._say = log / "timing.json", say
        self._longest = {"step": 0.0, "validation": 0.0}
        self._written: Timing | None = None
        self._warned = False

    @contextmanager
    def timing(self, what: str, counts: bool = True) -> Iterator[None]:
        """what: step or validation, which happens inside. counts: False for the first step."""
        began = time.monotonic()
        yield
        if counts:
            self._longest[what] = max(self._longest[what], time.monotonic() - began)

    def saved(self, save_s: float | None) -> None:
        """save_s: of the last committed save; None before the first, and on other ranks."""
        if save_s is None:
            return
        now = Timing(self._longest["step"], self._longest["validation"], save_s, platform.node())
        # a save is written down once, and again only when steps have become noticeably longer since
        if self._written and self._written.save_s == save_s and now.needed_s < 1.1 * self._written.needed_s:
            return
        self._written = now
        with suppress(OSError):  # a full disk ends a run by its checkpoints, not by this
            write_text(self._path, json.dumps(asdict(now) | {"time": time.time()}, indent=1))
        given = os.environ.get(SIGNAL_DELAY)
        text = now.warning(float(given)) if given else None
        if text and not self._warned:
            self._warned = True
            self._say(text)


def measured(folder: Path) -> Timing | None:
    """What a run has measured so far; of a folder of runs (a ladder) the one that needs longest; None if nothing."""
    timings = []
    for path in (folder / "log" / "timing.json", *folder.glob("*/log/timing.json")):
        try:
            known = json.loads(path.read_text(encoding="utf-8"))
            step_s, validation_s, save_s = (float(known[name]) for name in ("step_s", "validation_s", "save_s"))
            timings.append(Timing(step_s, validation_s, save_s, str(known["host"])))
        except (OSError, ValueError, KeyError, TypeError):
            continue
    return max(timings, key=lambda timing: timing.needed_s, default=None)


def warning(folder: Path, signal_delay_s: float) -> str | None:
    """A sentence where what was measured in ``folder`` does not fit into the time between signal and time limit."""
    timing = measured(folder)
    return None if timing is None else timing.warning(signal_delay_s)
