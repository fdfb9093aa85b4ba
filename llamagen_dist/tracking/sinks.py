"""A run directory, shown elsewhere: what W&B or trackio lacks of metrics.jsonl is sent, and nothing twice.

metrics.jsonl is the record, and a sink is fed from nothing but the run directory: while the run trains by a process of
its own (follow.py), afterwards by ``llamagen wandb-sync``. Both do the same, and both may be killed and started again:

* What a sink has is always a beginning of the run. It is asked for its last step, and gets the steps after it.
* A run that dies resumes at a checkpoint, and metrics.jsonl is cut back to it. Steps behind it that a sink had already
  got are computed again (to the same numbers) but not sent again, so that each step is there once; neither W&B, where
  steps only grow, nor a file that is already written could take them back.
* The lines of one step (training's and validation's) are one row, sent once no other line of it can follow.
"""

import json
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from llamagen_dist.checkpoint.folder import complete
from llamagen_dist.config import load
from llamagen_dist.config.training import TrackioSection, TrainingConfig, WandbSection
from llamagen_dist.errors import UserError
from llamagen_dist.files import locked_where_possible, read_json
from llamagen_dist.tracking.evaluations import Lines
from llamagen_dist.tracking.trackio_sink import TrackioSink
from llamagen_dist.tracking.wandb_sink import WandbSink


class Sink(Protocol):
    """Where a run is shown. Any method may raise, or block: nobody who trains waits for it."""

    where: str
    """For people, once it is open."""

    def open(self) -> int:
        """Connect. Returns the first step of which it has no row."""
        ...

    def row(self, step: int, values: Mapping[str, float], pictures: Mapping[str, Path]) -> None:
        """What metrics.jsonl says of one step, and the PNG files that were drawn at it."""
        ...

    def checkpoint(self, folder: Path) -> bool:
        """Refer to a complete checkpoint. Returns whether it was new here."""
        ...

    def evaluation(self, values: Mapping[str, float]) -> bool:
        """Scores of one checkpoint: eval/METRIC, with eval/step and eval/images_seen, which are those of the checkpoint
        and lie behind the rows already there; a coming row takes them along. Returns whether they were new here."""
        ...

    def settle(self) -> None:
        """No row comes any more: send evaluations that none took along."""
        ...

    def scores(self, values: Mapping[str, float | str]) -> int:
        """What was measured on the run's weights. Returns how many of them were new here."""
        ...

    def close(self, summary: Mapping[str, Any], exit_code: int) -> None:
        """summary: summary.json; empty for a run that is not finished. Returns once all is sent."""
        ...


@dataclass
class Row:
    """One step. values: numbers only; a sink has no use for the digest of the samples."""

    step: int
    values: dict[str, float] = field(default_factory=dict)


class Rows:
    """The rows of a metrics.jsonl that grows."""

    def __init__(self, path: Path) -> None:
        self._path, self._offset = path, 0
        self._last: Row | None = None

    def new(self, closed: float) -> Iterator[Row]:
        """Rows that are complete and have not been returned before.

        closed: the last step that gets no more lines although none of a later step is there.

        A line without its end is still being written, or a killed writer's, and is left for later.
        Raises RuntimeError where the file has become shorter: the run was started once more, and has a new reader.
        """
        if not self._path.exists():
            return
        with open(self._path, "rb") as file:
            if file.seek(0, 2) < self._offset:
                raise RuntimeError(f"{self._path} was cut back while it was read")
            file.seek(self._offset)
            text = file.read()
        text = text[: text.rfind(b"\n") + 1]
        self._offset += len(text)
        for line in text.splitlines():
            with suppress(ValueError):  # of a writer that was killed on a disk without order
                values = json.loads(line)
                if self._last is not None and values["step"] != self._last.step:
                    yield self._last
                    self._last = None
                self._last = self._last or Row(values["step"])
                numbers = {k: v for k, v in values.items() if isinstance(v, (int, float)) and k != "step"}
                self._last.values.update(numbers)
        if self._last is not None and self._last.step <= closed:
            yield self._last
            self._last = None


class Mirror:
    """Sends one run directory to one sink. ``rows``, ``checkpoints``, ``evaluations``: how many were sent."""

    def __init__(self, folder: Path, sink: Sink) -> None:
        self._folder, self._sink = folder, sink
        self._rows, self._lines = Rows(folder / "metrics.jsonl"), Lines(folder)
        self._first = 0
        self._referred: set[Path] = set()
        self.rows = self.checkpoints = self.evaluations = 0

    def open(self) -> None:
        self._first = self._sink.open()

    def send(self, everything: bool = False) -> None:
        """What is new. everything: the last step too, of a run that no longer trains."""
        folders = complete(self._folder)
        # a checkpoint is written after all that belongs to its step
        closed = int(folders[-1].name.removeprefix("step_")) if folders else -1
        over = everything or self._finished()
        for line in self._lines.new():
            scores = {f"eval/{key}": value for key, value in line.items() if isinstance(value, (int, float))}
            self.evaluations += self._sink.evaluation(scores)
        for row in self._rows.new(float("inf") if over else closed):
            if row.step >= self._first:
                pictures = self._folder.glob(f"pictures/step_{row.step:08d}/*.png")
                self._sink.row(row.step, row.values, {path.stem: path for path in sorted(pictures)})
                self.rows += 1
        for folder in folders:
            if folder not in self._referred:
                with suppress(FileNotFoundError):  # pruned since then
                    self.checkpoints += self._sink.checkpoint(folder)
                self._referred.add(folder)
        if over:
            self._sink.settle()

    def close(self, exit_code: int) -> None:
        summary = read_json(self._folder / "summary.json") if self._finished() else {}
        self._sink.close(summary, exit_code)

    def _finished(self) -> bool:
        return (self._folder / "summary.json").exists()


def tracking_of(folder: Path) -> dict[str, WandbSection | TrackioSection]:
    """The trackers that the config of a run names."""
    config = load(folder / "config.yaml")
    return config.tracking.named() if isinstance(config, TrainingConfig) else {}


def open_sink(folder: Path, section: WandbSection | TrackioSection, process: int | None = None) -> Sink:
    """process: the one that trains, whose CPU and memory are watched; None: nobody's."""
    if isinstance(section, WandbSection):
        return WandbSink(folder, section, process)
    return TrackioSink(folder, section)


@contextmanager
def sending(folder: Path, name: str, patience_s: float = 0.0) -> Iterator[None]:
    """Be the only process that sends ``folder`` to the tracker ``name``, for the length of a block.

    Raises UserError where another one is for longer than ``patience_s``. On a disk without locks nobody is kept out.
    """
    (folder / "log").mkdir(exist_ok=True)
    deadline = time.monotonic() + patience_s

    def wait() -> None:
        if time.monotonic() >= deadline:
            raise UserError(f"{folder}: another process is sending it to {name} (see {folder}/log/{name}.log)")
        time.sleep(0.5)

    with locked_where_possible(folder / "log" / f"{name}.lock", wait):
        yield


def runs_in(folder: Path) -> list[Path]:
    """A run directory, or those in a sweep, a ladder or a pipeline. Raises UserError where there is none."""
    patterns = ("metrics.jsonl", "*/metrics.jsonl", "*/*/metrics.jsonl", "*/*/*/metrics.jsonl")
    found = [file.parent for pattern in patterns for file in sorted(folder.glob(pattern))]
    runs = [run for run in found if (run / "config.yaml").exists()]
    if not runs:
        raise UserError(f"{folder}: holds no run (a folder with metrics.jsonl and config.yaml)")
    return runs
