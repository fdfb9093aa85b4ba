"""Out of memory, explained: what was expected, what was in use, what to set."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from llamagen_dist.errors import UserError
from llamagen_dist.parallel.engine import Engine, TorchEngine
from llamagen_dist.tracking.devices import GIB
from llamagen_dist.tracking.log_line import peak_memory_gb
from llamagen_dist.training.task import Task

_CPU = ("can't allocate memory", "not enough memory")  # torch's allocator on Linux and on Windows


def is_out_of_memory(error: BaseException) -> bool:
    """A device's allocator, torch's on the host (an ordinary RuntimeError), or Python's own."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in _CPU)


def engine_memory(engine: Engine | TorchEngine) -> str:
    """One line: what this rank's engine holds right now, in GiB."""
    parts = ", ".join(f"{name} {size / GIB:.2f}" for name, size in engine.held_bytes().items())
    return f"held by this rank's engine, in GiB: {parts}"


@contextmanager
def explained(task: Task) -> Iterator[None]:
    """Turns running out of memory inside into a UserError with the plan's table beside what is really in use."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:  # torch.OutOfMemoryError is a RuntimeError
        if not is_out_of_memory(error):
            raise
        first_line = (str(error).splitlines() or ["no memory"])[0]
        device, rank = task.topology.device, task.topology.rank
        kind = "device memory in use by torch" if device.type == "cuda" else "resident memory"
        lines = [
            f"out of memory on rank {rank} of {task.topology.world}: {first_line}",
            *task.memory(),
            f"peak {kind} of this rank: {peak_memory_gb(device) * 1e9 / GIB:.2f} GiB",
            f"set {task.smaller}, or use more ranks",
        ]
        raise UserError("\n".join(lines)) from None
