"""How far a program is: a bar on a terminal, plain lines in a job log, a small file for the launcher to watch."""

import json
import os
import sys
import time
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from types import TracebackType

PROGRESS_FILE = "LLAMAGEN_PROGRESS"  # environment variable: where rank 0 of a launched job writes


def main_rank_progress(label: str, total: int, rank: int, world: int) -> "AbstractContextManager[Progress | None]":
    """A Progress on rank 0, over its own share ``total`` of the work of ``world`` ranks, and None elsewhere."""
    if rank != 0:
        return nullcontext()
    return Progress(label if world == 1 else f"{label} (rank 0 of {world})", total)


class Progress:
    """``with Progress("packing", total) as p: p.advance(n, "text")``. Only the main rank should make one."""

    def __init__(self, label: str, total: int, every_s: float = 0.5, line_every_s: float = 10.0) -> None:
        self.label, self.total, self.done, self.text = label, total, 0, ""
        self._every, self._line_every = every_s, line_every_s
        self._last = self._last_line = 0.0
        target = os.environ.get(PROGRESS_FILE)
        self._file = Path(target) if target else None
        self._bar = None
        if self._file is None and sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
            from rich.progress import Progress as Bar

            columns = (
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.fields[text]}"),
            )
            self._bar = Bar(*columns, console=Console(stderr=True), transient=True)
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
            print(f"{self.label}: {self.done}/{self.total} ({share:.0f} %) {self.text}".rstrip(), flush=True)
