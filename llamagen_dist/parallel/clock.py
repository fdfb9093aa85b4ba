"""Where a step's time goes: data, compute, optimizer, and the wait for other ranks."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd import Variable

PARTS = ("data", "compute", "optimizer", "communication")

# Every way from Python into a collective: torch.distributed's functions, and so DeepSpeed's and Megatron's, end here.
# Names differ between torch versions; those that the installed one lacks are passed over.
_COLLECTIVES = (
    *("allreduce", "allreduce_coalesced", "reduce", "broadcast", "barrier", "monitored_barrier"),
    *("allgather", "_allgather_base", "allgather_coalesced", "allgather_into_tensor_coalesced"),
    *("all_gather_single", "all_gather_single_coalesced", "gather", "gather_single", "gather_into_tensor"),
    *("reduce_scatter", "_reduce_scatter_base", "reduce_scatter_tensor_coalesced", "reduce_scatter_single"),
    *("reduce_scatter_single_coalesced", "scatter", "alltoall", "alltoall_base", "all_to_all_single"),
    *("send", "recv", "recv_anysource"),
)


class Clock:
    """Adds up seconds by part until ``take()``.

    Parts nest, and a second is counted once, in the innermost part: what a collective inside ``compute`` waits is
    ``communication``. On a CPU the times are the host's. On CUDA they are the device's: an event on the stream that
    was current when the clock was made marks every change of part, so ``data`` is what the device really waited for
    data, and a collective counts as far as that stream waited for it (not verified: no GPU was at hand).

    Only the thread that made the clock reports (and autograd's own threads): what a background thread does costs a
    step nothing.
    """

    def __init__(self, device: torch.device = torch.device("cpu")) -> None:  # noqa: B008 - immutable
        self._stream = torch.cuda.current_stream(device) if device.type == "cuda" else None
        self._owner = threading.get_ident()
        self._open: list[str] = []
        self._since: Any = None
        self._seconds = dict.fromkeys(PARTS, 0.0)
        self.changes = 0
        """How often the part has changed: it stands still where the process does (read from any thread)."""
        self._events: list[tuple[str, Any, Any]] = []

    @property
    def innermost(self) -> str:
        """The part that is being charged, empty outside all (read from any thread)."""
        opened = self._open[-1:]  # one look: another thread may close the last part in between
        return opened[0] if opened else ""

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Charge what happens inside to ``name``, one of PARTS."""
        if not self._ours():
            yield
            return
        self._begin(name)
        try:
            yield
        finally:
            self._end()

    def _begin(self, name: str) -> None:
        self._charge()
        self._open.append(name)

    def _end(self) -> None:
        self._charge()
        self._open.pop()

    def _ours(self) -> bool:
        """Whether the calling thread's time counts: the clock's own thread, or one of autograd's."""
        me = threading.get_ident()
        # On CUDA the backward pass runs on threads of the C++ engine, which Python's list does not know; a saver's or a
        # prefetcher's thread is in it. On a CPU the backward pass runs on the caller's thread.
        return me == self._owner or (
            self._stream is not None and all(me != thread.ident for thread in threading.enumerate())
        )

    def _charge(self) -> None:
        """Book the time since the last change to the innermost open part."""
        self.changes += 1
        now: Any
        if self._stream is None:
            now = time.perf_counter()
            if self._open:
                self._seconds[self._open[-1]] += now - self._since
        else:
            now = torch.cuda.Event(enable_timing=True)
            now.record(self._stream)  # returns at once; the elapsed time is read in ``take``, when the device is there
            if self._open:
                self._events.append((self._open[-1], self._since, now))
        self._since = now

    def take(self) -> dict[str, float]:
        """Seconds by part since the last call, and start again. On CUDA it waits for the device."""
        if self._events:
            self._events[-1][2].synchronize()
            for name, first, last in self._events:
                self._seconds[name] += first.elapsed_time(last) / 1000
            self._events = []
        taken, self._seconds = self._seconds, dict.fromkeys(PARTS, 0.0)
        return taken

    @contextmanager
    def backward(self, loss: Tensor) -> Iterator[None]:
        """Around ``loss.backward()``: what DDP waits for its all-reduces at the end of it is ``communication``.

        DDP's reducer is C++ and out of reach of ``collectives``; but it waits in a callback of the autograd engine,
        and those run in the order in which they were queued. Ours, queued by the loss's own hook, comes first.
        """
        waiting = False

        def computed() -> None:
            """All gradients are computed; from here to the end of the backward pass DDP only waits."""
            nonlocal waiting
            waiting = self._ours()
            if waiting:
                self._begin("communication")

        # the hook runs as the first act of the backward pass: only inside one does the engine take callbacks
        hook = loss.register_hook(lambda _: Variable._execution_engine.queue_callback(computed))
        try:
            yield
        finally:
            hook.remove()
            if waiting:
                self._end()

    @contextmanager
    def collectives(self) -> Iterator[None]:
        """While inside, the time that Python calls of collectives and waits for them take is ``communication``.

        The methods of torch's process groups are wrapped, not torch.distributed's functions: libraries keep
        references to those. What C++ does by itself (DDP's reducer, see ``backward``) does not come past here.
        """
        originals: list[tuple[type, str, Any]] = [
            *(
                (dist.ProcessGroup, n, vars(dist.ProcessGroup)[n])
                for n in _COLLECTIVES
                if hasattr(dist.ProcessGroup, n)
            ),
            (dist.Work, "wait", vars(dist.Work)["wait"]),
        ]  # from the classes' own dictionaries: getattr would strip what binds a method to its object
        for owner, name, _ in originals:
            setattr(owner, name, self._timed(getattr(owner, name)))
        try:
            yield
        finally:
            for owner, name, original in originals:
                setattr(owner, name, original)

    def _timed(self, function: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(function)
        def timed(*arguments: Any, **named: Any) -> Any:
            with self.part("communication"):
                return function(*arguments, **named)

        return timed
