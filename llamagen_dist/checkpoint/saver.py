"""Saving while training continues: copy to host memory, then write from a thread of every rank."""

import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import Tensor

from llamagen_dist.checkpoint import folder as folders
from llamagen_dist.checkpoint.folder import Abandoned
from llamagen_dist.checkpoint.plan import Plan, Round, make_plan
from llamagen_dist.checkpoint.staging import HostBuffer, LocalCopy, write_file
from llamagen_dist.console import LOG
from llamagen_dist.errors import Superseded, UserError
from llamagen_dist.parallel.entries import TensorEntry
from llamagen_dist.parallel.topology import Topology

PATIENCE_S = 600.0
GOODBYE_S = 30.0  # a run that ends by an exception waits no longer than this for a rank that writes nothing


@dataclass
class _Save:
    """One save under way. ``error`` is set once, by whoever fails on this rank."""

    folder: Path
    plan: Plan
    state: Mapping[str, Any]
    config_text: str
    classes: Sequence[str] | None
    begun: float
    sums: dict[str, str] = field(default_factory=dict)
    error: str | None = None
    written: threading.Event = field(default_factory=threading.Event)  # this rank's files are done, or failed
    given_up: threading.Event = field(default_factory=threading.Event)
    thread: threading.Thread | None = None


class Saver:
    """Writes the checkpoints of one run; every rank has one. At most one save is under way.

    background: training is blocked only while each rank copies what it holds itself (1/ranks of the state, or what it
        will write where all ranks hold everything) into host memory, which stays allocated between saves; shards travel
        to the ranks that write them afterwards, over a gloo group of their own. False: training is blocked until all is
        on disk, nothing is copied, and the extra memory is what is gathered at once (SHARD_BYTES, or one tensor).
    keep_last, keep_every_images, in_use: see ``folder.prune``.
    patience_s: for a rank that writes nothing.
    fence(): asked before anything in the run directory changes, COMPLETE above all; it raises Superseded where the run
        continues in another process, which then finds its checkpoints untouched.

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
        in_use: Callable[[], Iterable[Path]] = tuple,
        patience_s: float = PATIENCE_S,
        fence: Callable[[], None] = lambda: None,
    ) -> None:
        self._run_dir, self._topology = run_dir, topology
        self._fence = fence
        self._background = background
        self._keep = (keep_last, keep_every_images, in_use)
        self._patience_s = patience_s
        self._buffer = HostBuffer(pinned=topology.device.type == "cuda")
        self._group: dist.ProcessGroup | None = None  # for the shards; made when there are any
        self._current: _Save | None = None
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
        return self._current is not None and self._current.error is not None

    def save(
        self,
        step: int,
        images_seen: int,
        entries: Sequence[TensorEntry],
        state: Mapping[str, Any],
        config_text: str,
        classes: Sequence[str] | None = None,
    ) -> Path:
        """Save ``run_dir/checkpoints/step_…`` (collective), once the save before it is on disk.

        step, images_seen: where the run stands.
        entries: every tensor, in an order that is the same on all ranks.
        state: what else state.json is to hold.
        config_text: for config.yaml.
        classes: names, label 0 first, for classes.json.

        Returns the folder; with ``background`` it is not complete yet. Raises UserError on all ranks where this save
        cannot be begun or copied, or the one before could not be written; Superseded.
        """
        begin = time.monotonic()
        self.wait()
        begun = time.monotonic()
        folder, rank = folders.step_folder(self._run_dir, step), self._topology.rank
        self._topology.broadcast_from_rank0(lambda: self._begin(folder))
        plan = make_plan(entries, self._topology.world)
        state = {**state, "step": step, "images_seen": images_seen}
        save = _Save(folder, plan, state, config_text, classes, begun)
        if self._group is None and self._topology.world > 1 and any(entry.sharding for entry in entries):
            # its own: what travels beside training must not come between training's collectives; gloo, since shards are
            # in host memory; made late, since a run on one data-parallel rank needs none
            made = dist.new_group(backend="gloo", timeout=timedelta(seconds=self._patience_s))
            self._group = made if isinstance(made, dist.ProcessGroup) else None
        if self._background:
            copy = LocalCopy(entries, plan, rank, plan.rounds, self._buffer)
            copies = [(part, copy) for part in plan.rounds]
            save.thread = threading.Thread(
                target=self._write_beside, args=(save, copies), name="checkpoint", daemon=True
            )
            self._current = save
            save.thread.start()
        else:
            self._write_files(save, ((part, LocalCopy(entries, plan, rank, [part])) for part in plan.rounds))
            self._finish(save, lambda: self._guarded(save, lambda: self._commit(save)))
        self.blocked_s = time.monotonic() - begin
        return folder

    def wait(self) -> None:
        """Until the save under way is committed (collective). Raises UserError on all ranks if it failed on any."""
        self._fence()
        save = self._current
        if save is not None:
            thread = save.thread
            assert thread is not None
            # not ``join``: rank 0's thread also waits for every rank's report, which a rank that failed never writes
            save.written.wait()
            self._finish(save, thread.join)

    def close(self) -> None:
        """Wait for the save under way without the other ranks' help: they may be gone. For a run that ends early."""
        if self._current is not None and self._current.thread is not None:
            self._patience_s = min(self._patience_s, GOODBYE_S)
            # a rank that hangs keeps its shards for longer than anybody should wait
            self._current.thread.join(None if self._group is None else 2 * GOODBYE_S)
            if self._current.thread.is_alive():
                self._current.error = self._current.error or "another rank does not send its part"
            if self._current.error is not None:
                LOG.warning(f"checkpoint {self._current.folder} was not written: {self._current.error}")
        self._current = None

    def __enter__(self) -> "Saver":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is Superseded and self._current is not None:
            self._current.given_up.set()  # so that rank 0's thread stops waiting for reports; nothing may be committed
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

    def _finish(self, save: _Save, committed: Callable[[], None]) -> None:
        """All ranks have written or failed; ``committed()`` then returns on rank 0 when it has committed or failed.

        Two rounds: an error of any rank while writing, then one of rank 0 while committing.
        """
        self._raise_together(save)
        if self._topology.rank == 0:
            committed()
        self._raise_together(save)
        self._current = None

    def _raise_together(self, save: _Save) -> None:
        """Raise the first failing rank's sentence on all ranks, once nobody writes any more (collective)."""
        if not self._topology.any_rank(save.error is not None):
            return
        error = next(text for text in self._topology.gather(save.error) if text is not None)
        self._current = None  # before anything is raised: the next ``wait`` has nothing to wait for
        self._topology.broadcast_from_rank0(lambda: self._give_up(save, error))

    def _give_up(self, save: _Save, error: str) -> None:
        save.given_up.set()
        if save.thread is not None:
            save.thread.join()
        self._fence()  # else the folder may be another process's by now
        try:
            folders.remove(save.folder)
            left = ""
        except OSError as problem:
            left = f" (and its folder could not be removed: {problem.strerror})"
        before = folders.complete(self._run_dir)
        intact = f"the checkpoint before it is intact at {before[-1]}" if before else "there is none before it"
        raise UserError(f"checkpoint {save.folder} could not be written: {error}{left}; {intact}")

    # --- on the writing thread (or the caller's, in the foreground) ---

    def _write_beside(self, save: _Save, copies: Iterable[tuple[Round, LocalCopy]]) -> None:
        self._write_files(save, copies)
        if self._topology.rank == 0 and save.error is None:
            self._guarded(save, lambda: self._commit(save))

    def _write_files(self, save: _Save, copies: Iterable[tuple[Round, LocalCopy]]) -> None:
        """This rank's files, round by round, and its report of them; a failure is left in ``save.error``."""
        for part, copy in copies:
            # also after an error: a rank that cannot write still sends what the others write
            whole = self._exchange(save, copy, part)
            self._guarded(save, partial(self._write_round, save, part, whole))
        self._guarded(save, lambda: folders.write_report(save.folder, self._topology.rank, save.sums))
        save.written.set()

    def _guarded(self, save: _Save, work: Callable[[], None]) -> None:
        """Do ``work`` unless this rank has failed already; what it raises becomes ``save.error``, for all to see."""
        if save.error is not None:
            return
        try:
            self._fence()
            work()
        except Superseded as lost:
            save.error = str(lost)
        except Abandoned as reason:
            save.error = str(reason)
        except OSError as error:
            file = f", file {Path(error.filename).name}" if error.filename else ""
            save.error = f"{error.strerror or error} (rank {self._topology.rank}{file})"
        except Exception as error:  # a bug in a thread must not end as a checkpoint that never comes
            save.error = f"{type(error).__name__}: {error} (rank {self._topology.rank})"

    def _exchange(self, save: _Save, copy: LocalCopy, part: Round) -> dict[int, Tensor]:
        whole, failed = copy.gather(part, self._group)
        if failed and save.error is None:
            reason = str(failed[0]).splitlines()[0]
            save.error = f"pieces of the state did not arrive (rank {self._topology.rank}): {reason}"
        return whole

    def _write_round(self, save: _Save, part: Round, whole: Mapping[int, Tensor]) -> None:
        for file in part.files[self._topology.rank]:
            save.sums[file.name] = write_file(save.folder, file, whole)

    def _commit(self, save: _Save) -> None:
        sums = folders.collect_reports(
            save.folder, save.plan, self._topology.world, lambda: self._patience_s, save.given_up
        )
        self._fence()  # the reports may have come late
        folders.commit(save.folder, save.plan, sums, save.state, save.config_text, save.classes, self._fence)
        self.committed_s = time.monotonic() - save.begun
        try:
            folders.prune(self._run_dir, *self._keep)
        except OSError as error:  # the new one counts all the same
            LOG.warning(f"an old checkpoint could not be removed: {error}")
