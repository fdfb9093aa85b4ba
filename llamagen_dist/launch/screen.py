"""What the launching person sees: a bar that follows progress.json on a terminal, plain lines elsewhere."""

import json
import sys
import time
from pathlib import Path
from types import TracebackType

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

LINE_EVERY_S = 10.0


def duration(seconds: float) -> str:
    """``84 s``, ``12 min``, ``3.5 h``."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 100 * 60 else f"{seconds / 3600:.1f} h"


class Screen:
    """``say`` prints a line above any bar, on stdout; a pipe or job log gets no control characters."""

    def __init__(self) -> None:
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
        self._bar: Progress | None = None
        if screen.console.is_terminal:
            columns = (
                TextColumn("   {task.description}"),
                BarColumn(bar_width=30),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TextColumn("left"),
                TimeRemainingColumn(),
                TextColumn("{task.fields[text]}"),
            )
            self._bar = Progress(*columns, console=screen.console, transient=True)
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
