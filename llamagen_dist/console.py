"""What a person sees: progress, lines and durations; a bar on a terminal, plain lines in a job log. Light to import."""

import json
import logging
import os
import sys
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from types import TracebackType
from typing import Any

PROGRESS_FILE = "LLAMAGEN_PROGRESS"  # environment variable: where rank 0 of a launched job writes how far it is
LINE_EVERY_S = 10.0

LOG = logging.getLogger("llamagen")
"""What the programs report as they run: ``info`` and ``warning`` go to stdout, ``error`` to stderr."""


class _Stream(logging.Handler):
    """Writes to what sys.stdout or sys.stderr is at that moment, which a caller may have redirected.

    One handler for each of the two: a handler holds its lock while it writes, and the watchdog's last sentence on
    stderr must not wait for a rank that is stuck writing to stdout. Unlike logging's own handlers it lets a broken
    pipe be raised, as print does.
    """

    def __init__(self, name: str) -> None:
        super().__init__()
        self._stream = name

    def filter(self, record: logging.LogRecord) -> bool:
        return (record.levelno >= logging.ERROR) == (self._stream == "stderr")

    def emit(self, record: logging.LogRecord) -> None:
        print(self.format(record), file=getattr(sys, self._stream), flush=True)


class _RankLines(logging.Formatter):
    """``2026-11-26 14:01:02 rank 3 | text``, at every line of a message of several."""

    def __init__(self, rank: str) -> None:
        super().__init__(datefmt="%Y-%m-%d %H:%M:%S")
        self._rank = rank

    def format(self, record: logging.LogRecord) -> str:
        prefix = f"{self.formatTime(record, self.datefmt)} rank {self._rank} | "
        return "\n".join(prefix + line for line in record.getMessage().split("\n"))


# At import and not in set_up_logging: a program called as a function, and ``import llamagen_dist``, print plain lines.
_STREAMS = (_Stream("stdout"), _Stream("stderr"))
LOG.handlers[:] = _STREAMS
LOG.setLevel(logging.INFO)
LOG.propagate = False  # what libraries hang on the root logger would print every line a second time


def set_up_logging(launched: bool) -> None:
    """Put time and rank before every line where this process is one rank of several, or ``launched`` by llamagen.

    A person with a single process at a terminal reads plain lines. RANK and WORLD_SIZE are taken as they come: values
    that make no sense are refused later, in one sentence.
    """
    world = os.environ.get("WORLD_SIZE", "")
    one_of_several = world.isdecimal() and int(world) > 1
    formatter = _RankLines(os.environ.get("RANK") or "0") if launched or one_of_several else None
    for handler in _STREAMS:
        handler.setFormatter(formatter)


def duration(seconds: float) -> str:
    """``84 s``, ``12 min``, ``3.5 h``."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 100 * 60 else f"{seconds / 3600:.1f} h"


def count(number: float) -> str:
    """``999``, ``12.3 k``, ``111 M``."""
    for unit, name in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= unit:
            return f"{number / unit:.3g} {name}"
    return f"{number:.0f}"


def aligned(rows: Sequence[Sequence[str]], left: int = 1) -> str:
    """Rows as columns of a text; the first ``left`` of them are aligned to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join(
            cell.ljust(w) if n < left else cell.rjust(w) for n, (cell, w) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]
    return "\n".join(line.rstrip() for line in lines)


def _bar(console: Any, elapsed: bool = False) -> Any:
    """A rich.progress.Progress whose rows have the field ``text``; elapsed: with the time since the start."""
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = [TextColumn("   {task.description}"), BarColumn(bar_width=30), MofNCompleteColumn()]
    if elapsed:
        columns += [TimeElapsedColumn(), TextColumn("left")]
    columns += [TimeRemainingColumn(), TextColumn("{task.fields[text]}")]
    return Progress(*columns, console=console, transient=True)


def main_rank_progress(label: str, total: int, rank: int, world: int) -> "AbstractContextManager[Progress | None]":
    """A Progress on rank 0, over its own share ``total`` of the work of ``world`` ranks, and None elsewhere."""
    if rank != 0:
        return nullcontext()
    return Progress(label if world == 1 else f"{label} (rank 0 of {world})", total)


class Progress:
    """``with Progress("packing", total) as p: p.advance(n, "text")``. Only the main rank should make one."""

    def __init__(self, label: str, total: int, every_s: float = 0.5, line_every_s: float = LINE_EVERY_S) -> None:
        self.label, self.total, self.done, self.text = label, total, 0, ""
        self._every, self._line_every = every_s, line_every_s
        self._last = self._last_line = 0.0
        target = os.environ.get(PROGRESS_FILE)
        self._file = Path(target) if target else None
        self._bar: Any = None
        if self._file is None and sys.stderr.isatty():
            from rich.console import Console

            self._bar = _bar(Console(stderr=True))
            self._row = self._bar.add_task(label, total=total, text="")

    def __enter__(self) -> "Progress":
        if self._bar:
            self._bar.start()
        self._show(force=True)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._show(force=kind is None)
        if self._bar:
            self._bar.stop()

    def advance(self, count: int = 1, text: str | None = None) -> None:
        self.set(self.done + count, text)

    def set(self, done: int, text: str | None = None) -> None:
        self.done = done
        if text is not None:
            self.text = text
        self._show()

    def _show(self, force: bool = False) -> None:
        now = time.monotonic()
        if not force and now - self._last < self._every:
            return
        self._last = now
        if self._bar:
            self._bar.update(self._row, completed=self.done, text=self.text)
            return
        if self._file:
            scratch = self._file.with_suffix(".tmp")
            scratch.write_text(
                json.dumps({"label": self.label, "done": self.done, "total": self.total, "text": self.text})
            )
            scratch.replace(self._file)
        if force or now - self._last_line >= self._line_every:
            self._last_line = now
            share = 100 * self.done / self.total if self.total else 100.0
            LOG.info(f"{self.label}: {self.done}/{self.total} ({share:.0f} %) {self.text}".rstrip())


class Screen:
    """``say`` prints a line above any bar, on stdout; a pipe or job log gets no control characters."""

    def __init__(self) -> None:
        from rich.console import Console

        width = None if sys.stdout.isatty() else 120
        self.console = Console(width=width, file=sys.stdout, highlight=False, soft_wrap=True, markup=False, emoji=False)

    def say(self, text: str) -> None:
        self.console.print(text)
        self.console.file.flush()

    def follow(self, file: Path) -> "Follow":
        return Follow(self, file)


class Follow:
    """``with screen.follow(progress_json) as tick``: call tick() often."""

    def __init__(self, screen: Screen, file: Path) -> None:
        self._screen, self._file = screen, file
        self._label, self._last_line, self._last_text = "", 0.0, ""
        self._bar: Any = None
        if screen.console.is_terminal:
            self._bar = _bar(screen.console, elapsed=True)
            self._row = self._bar.add_task("starting", total=None, text="")

    def __enter__(self) -> "Follow":
        if self._bar:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar:
            self._bar.stop()

    def __call__(self) -> None:
        try:
            state = json.loads(self._file.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return  # the program has not begun to count yet
        label, done, total, text = state["label"], state["done"], state["total"], state["text"]
        if self._bar:
            if label != self._label:
                self._bar.reset(self._row, description=label, total=total, text=text)
            self._bar.update(self._row, completed=done, total=total, description=label, text=text)
        else:
            now = time.monotonic()
            share = 100 * done / total if total else 100
            line = f"      {label}: {done}/{total} ({share:.0f} %) {text}".rstrip()
            if (label != self._label or now - self._last_line > LINE_EVERY_S) and line != self._last_text:
                self._screen.say(line)
                self._last_line, self._last_text = now, line
        self._label = label
