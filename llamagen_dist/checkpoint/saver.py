"""Saving while training goes on: copy to host memory, then write from a thread of every rank."""

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch.distributed as dist

from llamagen_dist.checkpoint import folder as folders
from llamagen_dist.checkpoint.folder import Abandoned, Patience
from llamagen_dist.checkpoint.plan import Plan, make_plan
from llamagen_dist.checkpoint.staging import LocalCopy, Staging, stage, write_file
from llamagen_dist.errors import Superseded, UserError
from llamagen_dist.parallel.entries import TensorEntry
from llamagen_dist.parallel.topology import Topology

PATIENCE_S = 600.0
GOODBYE_S = 30.0  # a run that ends by an exception waits no longer than this for a rank that writes nothing


@dataclass
class _Flight:
    """One save on its way. ``error`` is set once, by whoever fails on this rank."""

    folder: Path
    plan: Plan
    state: Mapping[str, Any]
    config_text: str
    classes: Sequence[str] | None
    begun: float
    sums: dict[str, str] = field(default_factory=dict)
    error: str | None = None
    copy: LocalCopy | None = None
    written: threading.Event = field(default_factory=threading.Event)  # this rank's files are done, or failed
    given_up: threading.Event = field(default_factory=threading.Event)
    thread: threading.Thread | None = None


class Saver:
    """Writes the checkpoints of one run; every rank has one. At most one save is under way.

    background: training is blocked only while each rank copies what it holds itself (1/ranks of the state, or what it
    will write where all ranks hold everything) into host memory, which stays allocated between saves; pieces travel to
    the ranks that write them afterwards, over a gloo group of their own. False: until all is on disk, with one
    SHARD_BYTES buffer and one tensor of extra memory whatever the model's size. keep_last, keep_every_images: see
    ``folder.prune``. pace(bytes) is called from the writing thread after each block. patience_s: for a rank that writes
    nothing. fence() is asked before anything in the run directory changes, COMPLETE above all; it raises Superseded
    where the run has gone on in another process, which then finds its checkpoints untouched.

    A failure to write reaches all ranks as one UserError from the next ``wait`` or ``save``; the half-written folder
    is gone by then and the checkpoint before it untouched.
    """

    def __init__(
        self,
        run_dir: Path,
        topology: Topology,
        *,
        background: bool = True,
        keep_last: int = 2,
        keep_every_images: int = 0,
        pace: Callable[[int], None] | None = None,
        patience_s: float = PATIENCE_S,
        fence: Callable[[], None] = lambda: None,
    ) -> None:
        self._run_dir, self._topology = run_dir, topology
        self._fence = fence
        self._background, self._pace = background, pace
        self._keep = (keep_last, keep_every_images)
        self._patience = Patience(patience_s)
        self._staging = Staging(pinned=topology.device.type == "cuda")
        self._rounds = Staging()
        self._group: dist.ProcessGroup | None = None  # for the pieces; made when there are any
        self._flight: _Flight | None = None
        self.blocked_s = 0.0
        """Seconds that the last ``save`` took from its caller."""
        self.committed_s: float | None = None
        """Seconds from the beginning of the last committed ``save`` to its COMPLETE; only rank 0 knows."""
        if topology.rank == 0:
            fence()
            for left in folders.remove_leftovers(run_dir):
                topology.log0(f"removed {left}: its writing was interrupted")

    @property
    def failed(self) -> bool:
        """Whether this rank's part of the save under way has failed (not collective; then call ``wait`` on all)."""
        return self._flight is not None and self._flight.error is not None

    def save(
        self,
        step: int,
        images_seen: int,
        entries: Sequence[TensorEntry],
        state: Mapping[str, Any],
        config_text: str,
        classes: Sequence[str] | None = None,
    ) -> Path:
        """Save ``run_dir/checkpoints/step_…`` (collective), after the one before is on disk. Returns its path."""
        begin = time.monotonic()
        self.wait()
        begun = time.monotonic()
        folder = folders.step_folder(self._run_dir, step)
        self._topology.broadcast_from_rank0(lambda: self._begin(folder))
        plan = make_plan(entries, self._topology.world)
        state = {**state, "step": step, "images_seen": images_seen}
        flight = _Flight(folder, plan, state, config_text, classes, begun)
        if self._background:
            if all(entry.sharding is None for entry in entries):
                for number in range(len(plan.rounds)):
                    self._stage(entries, flight, number, number)
            else:
                if self._group is None and self._topology.world > 1:
                    limit = timedelta(seconds=self._patience.seconds)
                    made = dist.new_group(backend="gloo", timeout=limit)
                    self._group = made if isinstance(made, dist.ProcessGroup) else None
                # taken before the thread needs it, where a lack of memory can still be told
                self._rounds.buffer(0, max(part.staged(self._topology.rank) for part in plan.rounds))
                flight.copy = LocalCopy(entries, plan, self._topology.rank, self._staging)
            flight.thread = threading.Thread(target=self._write_beside, args=(flight,), name="checkpoint", daemon=True)
            self._flight = flight
            flight.thread.start()
        else:
            for number in range(len(plan.rounds)):
                self._stage(entries, flight, number, 0)
                self._guarded(flight, partial(self._write_round, flight, number, 0, self._staging))
                self._raise_together(flight)
            self._staging.drop()
            self._guarded(flight, lambda: self._report(flight))
            flight.written.set()
            self._finish(flight, lambda: self._guarded(flight, lambda: self._commit(flight)))
        self.blocked_s = time.monotonic() - begin
        return folder

    def wait(self) -> None:
        """Until the save under way is committed (collective). Raises UserError on all ranks if it failed on any."""
        self._fence()
        flight = self._flight
        if flight is not None:
            thread = flight.thread
            assert thread is not None
            flight.written.wait()
            self._finish(flight, thread.join)

    def close(self) -> None:
        """Wait for the save under way without the other ranks' help: they may be gone. For a run that ends early."""
        if self._flight is not None and self._flight.thread is not None:
            self._patience.seconds = min(self._patience.seconds, GOODBYE_S)
            # a rank that hangs keeps its pieces for longer than anybody should wait
            self._flight.thread.join(None if self._flight.copy is None else 2 * GOODBYE_S)
            if self._flight.thread.is_alive():
                self._flight.error = self._flight.error or "another rank does not send its part"
            if self._flight.error is not None:
                print(f"checkpoint {self._flight.folder} was not written: {self._flight.error}", flush=True)
        self._flight = None

    def __enter__(self) -> "Saver":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is Superseded and self._flight is not None:
            self._flight.given_up.set()
        self.close()
        if kind is None and self._group is not None:
            dist.destroy_process_group(self._group)
            self._group = None

    # --- on the caller's thread ---

    def _begin(self, folder: Path) -> None:
        try:
            folders.remove_leftovers(self._run_dir)
            if folder.exists():
                folders.remove(folder)
            folder.mkdir(parents=True)
        except OSError as error:
            raise UserError(f"checkpoint {folder} could not be begun: {error.strerror}") from None

    def _stage(self, entries: Sequence[TensorEntry], flight: _Flight, number: int, place: int) -> None:
        part, rank = flight.plan.rounds[number], self._topology.rank
        buffer = self._staging.buffer(place, part.staged(rank))
        stage(entries, flight.plan, part, rank, buffer)

    def _finish(self, flight: _Flight, committed: Callable[[], None]) -> None:
        """All ranks have written or failed; ``committed()`` then returns on rank 0 when it has committed or failed."""
        self._raise_together(flight)
        if self._topology.rank == 0:
            committed()
        self._raise_together(flight)
        self._flight = None

    def _raise_together(self, flight: _Flight) -> None:
        """Raise the first failing rank's sentence on all ranks, once nobody writes any more (collective)."""
        if not self._topology.any_rank(flight.error is not None):
            return
        errors: list[Any] = [flight.error]
        if self._topology.world > 1:
            errors = [None] * self._topology.world
            dist.all_gather_object(errors, flight.error)
        self._flight = None
        error = next(text for text in errors if text is not None)
        self._topology.broadcast_from_rank0(lambda: self._give_up(flight, error))

    def _give_up(self, flight: _Flight, error: str) -> None:
        flight.given_up.set()
        if flight.thread is not None:
            flight.thread.join()
        self._fence()  # else the folder may be another process's by now
        try:
            folders.remove(flight.folder)
            left = ""
        except OSError as problem:
            left = f" (and its folder could not be removed: {problem.strerror})"
        before = folders.complete(self._run_dir)
        intact = f"the checkpoint before it is intact at {before[-1]}" if before else "there is none before it"
        raise UserError(f"checkpoint {flight.folder} could not be written: {error}{left}; {intact}")

    # --- on the writing thread (or the caller's, in the foreground) ---

    def _write_beside(self, flight: _Flight) -> None:
        for number in range(len(flight.plan.rounds)):
            if flight.copy is None:
                self._guarded(flight, partial(self._write_round, flight, number, number, self._staging))
            else:  # a rank that cannot write goes on sending what the others write
                self._exchange(flight, flight.copy, number)
                self._guarded(flight, partial(self._write_round, flight, number, 0, self._rounds))
        self._guarded(flight, lambda: self._report(flight))
        flight.written.set()
        if self._topology.rank == 0 and flight.error is None:
            self._guarded(flight, lambda: self._commit(flight))

    def _guarded(self, flight: _Flight, work: Callable[[], None]) -> None:
        if flight.error is not None:
            return
        try:
            self._fence()
            work()
        except Superseded as lost:
            flight.error = str(lost)
        except Abandoned as reason:
            flight.error = str(reason)
        except OSError as error:
            file = f", file {Path(error.filename).name}" if error.filename else ""
            flight.error = f"{error.strerror or error} (rank {self._topology.rank}{file})"
        except Exception as error:  # a bug in a thread must not end as a checkpoint that never comes
            flight.error = f"{type(error).__name__}: {error} (rank {self._topology.rank})"

    def _exchange(self, flight: _Flight, copy: LocalCopy, number: int) -> None:
        part, rank = flight.plan.rounds[number], self._topology.rank
        failed = copy.fill(part, self._rounds.buffer(0, part.staged(rank)), self._group)
        if failed and flight.error is None:
            flight.error = f"pieces of the state did not arrive (rank {rank}): {str(failed[0]).splitlines()[0]}"

    def _write_round(self, flight: _Flight, number: int, place: int, staging: Staging) -> None:
        part, rank = flight.plan.rounds[number], self._topology.rank
        buffer = staging.buffer(place, part.staged(rank))
        for file in part.files[rank]:
            flight.sums[file.name] = write_file(flight.folder, file, buffer, self._pace)

    def _report(self, flight: _Flight) -> None:
        folders.write_report(flight.folder, self._topology.rank, flight.sums)

    def _commit(self, flight: _Flight) -> None:
        sums = folders.collect_reports(
            flight.folder, flight.plan, self._topology.world, self._patience, flight.given_up
        )
        self._fence()  # the reports may have come late
        folders.commit(flight.folder, flight.plan, sums, flight.state, flight.config_text, flight.classes, self._fence)
        self.committed_s = time.monotonic() - flight.begun
        try:
            folders.prune(self._run_dir, *self._keep)
        except OSError as error:  # the new one counts all the same
            print(f"an old checkpoint could not be removed: {error}", flush=True)
