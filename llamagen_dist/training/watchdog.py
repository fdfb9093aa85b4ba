"""Notices that training hangs or a rank is gone, says which one, and ends this process so that it can start again."""

import faulthandler
import os
import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType

from llamagen_dist.console import LOG
from llamagen_dist.errors import EXIT_STOPPED, LOST_PEER, TIMED_OUT, Stopped
from llamagen_dist.files import remove_asides
from llamagen_dist.parallel.clock import Clock
from llamagen_dist.parallel.topology import Topology
from llamagen_dist.program import leave_sentence
from llamagen_dist.training import heartbeat

LONGEST_TICK_S = 10.0


class LostRankError(Exception):
    """Another rank is gone or hangs; the message names it. The same command resumes from the last checkpoint."""


class Watchdog:
    """One per rank, around the training loop; call ``beat`` after every step.

    A thread writes this rank's heartbeat file. Without a completed step for ``hang_s`` (``start_s`` before the first;
    in a ``phase``: without any change of the clock's part) it writes all stacks to log/stacks-rank-N.txt, names the
    rank that the others wait for in log/hang-rank-N.txt and on stderr, and ends the process with exit code 75. While
    Python itself is stuck in C code no thread of it can run: then faulthandler's timer, which needs no Python and
    which the thread resets at every tick, writes the stacks and ends the process with exit code 1.

    lost(): Fence.lost, asked in every tick: once it returns a sentence the run continues in another process, and this
        one prints the sentence and ends at once with exit code 75, without another heartbeat, which would be taken for
        the other process's.

    ``hang_s`` 0: heartbeats only. An exception that comes from a collective is turned into LostRankError once it is
    known which rank caused it. On CUDA the host runs ahead of the device, so a rank's part says less there; NCCL's
    flight recorder (topology.start) knows more.
    """

    def __init__(
        self,
        log: Path,
        topology: Topology,
        clock: Clock,
        hang_s: float,
        start_s: float,
        lost: Callable[[], str] = lambda: "",
    ) -> None:
        self._lost = lost
        self._log, self._topology, self._clock = log, topology, clock
        self._hang, self._limit = hang_s, max(hang_s, start_s) if hang_s else 0.0
        self._tick = min(LONGEST_TICK_S, max(0.05, hang_s / 20)) if hang_s else LONGEST_TICK_S
        self._over = threading.Event()
        self._beat = heartbeat.first(topology.rank)
        self._changes = -1
        self._alive = time.monotonic()
        self._lock = threading.Lock()  # the heartbeat: the loop's thread and ours write it

    def __enter__(self) -> "Watchdog":
        self._log.mkdir(parents=True, exist_ok=True)
        if (dump := os.environ.get("TORCH_FR_DUMP_TEMP_FILE")) is not None:
            Path(dump).parent.mkdir(parents=True, exist_ok=True)  # NCCL makes no folders
        self._stacks = open(self._log / f"stacks-rank-{self._topology.rank}.txt", "w", encoding="utf-8")
        if self._topology.rank == 0:
            heartbeat.forget(self._log, self._topology.world)
            remove_asides(self._log)
        self._write()
        self._topology.barrier()  # no rank may judge another by the file of an earlier start
        self._alive = time.monotonic()
        self._arm()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._thread.start()
        return self

    def beat(self, step: int) -> None:
        """``step`` steps are done."""
        starting = self._beat.phase == "start"
        self._limit, self._alive = self._hang, time.monotonic()
        with self._lock:
            self._beat = heartbeat.refreshed(self._beat, step=step, phase="train")
        if starting:  # steps may be quicker than a tick: stuck in the next one, the timer would wait for start_s
            self._arm()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Something long that is no step: any change of the clock's part is a sign of life meanwhile."""
        self._enter(name)
        try:
            yield
        finally:
            self._enter("train")

    def _enter(self, name: str) -> None:
        self._alive = time.monotonic()
        with self._lock:
            self._beat = heartbeat.refreshed(self._beat, phase=name)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()
        faulthandler.cancel_dump_traceback_later()
        self._thread.join()
        if error is None or isinstance(error, Stopped):
            self._stacks.close()
            for left in (heartbeat.path(self._log, self._topology.rank), Path(self._stacks.name)):
                left.unlink(missing_ok=True)
            return
        cause = self._cause(error) if self._topology.world > 1 and self._from_collective(error) else ""
        first_line = (str(error).splitlines() or [""])[0]
        self._write(ended=heartbeat.GAVE_UP + cause if cause else f"{type(error).__name__}: {first_line}"[:500])
        self._stacks.close()
        if cause:
            leave_sentence(cause)
            raise LostRankError(f"{cause}. The same command resumes from the last checkpoint") from error

    # --- on the watchdog's thread ---

    def _watch(self) -> None:
        while not self._over.wait(self._tick):
            if sentence := self._lost():
                LOG.error(f"llamagen: {sentence}")
                leave_sentence(sentence)
                os._exit(EXIT_STOPPED)  # the main thread may be in a collective that never returns: nothing unwinds it
            if self._clock.changes != self._changes:
                self._changes = self._clock.changes
                with self._lock:
                    self._beat = heartbeat.refreshed(self._beat, since=time.time())
                if self._beat.phase not in ("train", "start"):
                    self._alive = time.monotonic()
            self._write(part=self._clock.innermost)
            self._arm()
            if self._limit and time.monotonic() - self._alive > self._limit:
                self._give_up()

    def _arm(self) -> None:
        """Long enough that it comes only where this thread cannot."""
        if self._limit:
            left = self._limit - (time.monotonic() - self._alive)
            faulthandler.dump_traceback_later(max(left, 0) + 3 * self._tick + 1, exit=True, file=self._stacks)

    def _give_up(self) -> None:
        faulthandler.cancel_dump_traceback_later()
        faulthandler.dump_traceback(file=self._stacks, all_threads=True)
        quiet = time.monotonic() - self._alive
        beats = heartbeat.read(self._log, self._topology.world)
        clauses = heartbeat.gone(beats, self._stale) + heartbeat.reported(beats) or heartbeat.behind(beats)
        cause = "; ".join(dict.fromkeys(clauses)) or "all ranks are equally far and wait for each other"
        text = f"no step for {quiet:.1f} s after step {self._beat.step}: {cause}"
        with suppress(OSError):  # a full disk must not keep a hanging rank alive
            (self._log / f"hang-rank-{self._topology.rank}.txt").write_text(text + "\n", encoding="utf-8")
        LOG.error(f"llamagen: rank {self._topology.rank}: {text}")
        leave_sentence(text)
        # a rank that leaves now would end the others' collectives before they have written their stacks
        self._over.wait(2 * self._tick + 0.5)
        self._write(ended=heartbeat.GAVE_UP + text)
        os._exit(EXIT_STOPPED)

    @property
    def _stale(self) -> float:
        return 3 * self._tick + 1

    def _write(self, **changes: object) -> None:
        if self._lost():  # the file is another process's now
            return
        with self._lock:
            self._beat = heartbeat.refreshed(self._beat, **changes)
            with suppress(OSError):  # a full disk must not end the watch
                heartbeat.write(self._log, self._beat)

    # --- after an exception ---

    @staticmethod
    def _from_collective(error: BaseException) -> bool:
        return isinstance(error, RuntimeError) and bool(LOST_PEER.search(str(error)))

    def _cause(self, error: BaseException) -> str:
        """Who caused an error of a collective; waits until a rank on another machine would have gone stale."""
        # a time-out has been long enough for any heartbeat to go stale; the others' next ones say what they do
        waits = self._tick + 0.5 if TIMED_OUT.search(str(error)) else self._stale + self._tick
        deadline = time.monotonic() + waits
        while True:
            self._write(part=heartbeat.WAITING)
            beats = heartbeat.read(self._log, self._topology.world)
            clauses = heartbeat.gone(beats, self._stale) or heartbeat.reported(beats)
            late = time.monotonic() >= deadline
            if not clauses and late:
                clauses = heartbeat.behind(beats)
            if clauses or late:
                message = re.sub(r"^\[\S+\] ", "", (str(error).splitlines() or [""])[0])[:120]  # without gloo's file
                cause = "; ".join(dict.fromkeys(clauses)) or "a collective failed, all ranks live"
                return f"{cause} (noticed by: {message})"
            time.sleep(min(0.1, self._tick))
