"""A torch profiler trace of a few steps, for chrome://tracing or Perfetto."""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch

from llamagen_dist.parallel.topology import Topology


class StepProfiler:
    """Traces steps ``span`` = (first, last), counted from 1, on the first and last rank to log/trace-rank-N.json.gz.

    None traces nothing and costs nothing. A run that ends in between writes what it has.
    """

    def __init__(self, log: Path, topology: Topology, span: tuple[int, int] | None) -> None:
        self._file = log / f"trace-rank-{topology.rank}.json.gz"
        self._span = span if topology.rank in (0, topology.world - 1) else None
        self._say = topology.log0
        self._cuda = topology.device.type == "cuda"
        self._profile: Any = None

    @contextmanager
    def step(self, number: int) -> Iterator[None]:
        if self._span is None or not self._span[0] <= number <= self._span[1]:
            yield
            return
        if self._profile is None:
            kinds = [torch.profiler.ProfilerActivity.CPU]
            kinds += [torch.profiler.ProfilerActivity.CUDA] if self._cuda else []
            self._profile = torch.profiler.profile(activities=kinds, record_shapes=True)
            self._profile.start()
        with torch.profiler.record_function(f"step {number}"):
            yield
        if number == self._span[1]:
            self._write()

    def _write(self) -> None:
        profile, self._profile, self._span = self._profile, None, None
        if self._cuda:
            torch.cuda.synchronize()
        profile.stop()
        self._file.parent.mkdir(parents=True, exist_ok=True)
        profile.export_chrome_trace(str(self._file))
        self._say(f"profiler trace: {self._file}")

    def __enter__(self) -> "StepProfiler":
        return self

    def __exit__(self, *_: object) -> None:
        if self._profile is not None:
            with suppress(OSError):  # the run has ended for some other reason, which counts
                self._write()
