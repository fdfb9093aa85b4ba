"""The run directory: the same command again resumes the run; another config in it is refused."""

import errno
import json
import os
import platform
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from llamagen_dist import __version__
from llamagen_dist.checkpoint.checkpoint import Checkpoint
from llamagen_dist.checkpoint.folder import complete
from llamagen_dist.config import Section, dump
from llamagen_dist.config.resume import DATA, Change, compare
from llamagen_dist.config.training import TrackingSection
from llamagen_dist.errors import UserError
from llamagen_dist.files import UNLOCKABLE, own_folder, read_json, remove_asides, take_lock, write_text, written_aside
from llamagen_dist.parallel.topology import Topology
from llamagen_dist.tracking import evaluations, provenance
from llamagen_dist.tracking.follow import Followers
from llamagen_dist.training.fence import Fence

LOCK_PATIENCE_S = 90.0


@dataclass
class Run:
    """An opened run directory. Only rank 0 writes; ``log`` and ``metrics`` are no-ops elsewhere."""

    directory: Path
    topology: Topology
    config_text: str
    classes: list[str] | None = None
    fingerprint: str | None = None
    label: str = ""
    origin: dict[str, Any] = field(default_factory=dict)
    """What every checkpoint's state.json says besides progress: the tokenizer, and what the run was started from."""
    fence: Fence = field(default_factory=Fence.of_environment)
    """Asked before anything in the directory changes."""
    _metrics: IO[bytes] | None = field(default=None, repr=False)
    _followers: Followers | None = field(default=None, repr=False)

    def say(self, text: str) -> None:
        self.topology.log0(text)

    @cached_property
    def newest(self) -> Checkpoint | None:
        """The newest good checkpoint, None without one (collective the first time, which alone verifies it)."""
        return Checkpoint.newest(self.directory, self.topology)

    def metrics(self, **values: Any) -> None:
        """Append one line to metrics.jsonl. Raises UserError where the disk does not take it."""
        if self.topology.rank == 0:
            self.fence.check()
            path = self.directory / "metrics.jsonl"
            try:
                # unbuffered, a line a write: a killed process leaves whole lines and perhaps a cut last one, which
                # ``cut_metrics`` drops
                if self._metrics is None:
                    self._metrics = open(path, "ab", buffering=0)  # noqa: SIM115 - closed by open_run
                line = (json.dumps(values) + "\n").encode()
                if self._metrics.write(line) != len(line):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            except OSError as error:
                raise _unwritable(path, error) from None
            if self._followers is not None:
                self._followers.look()

    def pictures(self, step: int, pictures: Mapping[str, Tensor]) -> None:
        """Write PNG files beside the metrics of ``step``, one per name (rank 0). pictures: uint8 (3, H, W)."""
        from PIL import Image

        for name, pixels in pictures.items():
            self.fence.check()
            path = self.directory / "pictures" / f"step_{step:08d}" / f"{name}.png"
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                with written_aside(path) as aside:
                    Image.fromarray(pixels.permute(1, 2, 0).cpu().numpy()).save(aside)
            except OSError as error:
                raise _unwritable(path, error) from None

    def arrays(self, step: int, images_seen: int, arrays: Mapping[str, Mapping[str, NDArray[Any]]]) -> None:
        """Replace NAME.npz by the arrays of each name, and the position that they are of (rank 0)."""
        for name, content in arrays.items():
            self.fence.check()
            path = self.directory / f"{name}.npz"
            try:
                with written_aside(path) as aside:
                    np.savez(aside, step=step, images_seen=images_seen, **content)  # type: ignore[arg-type]
            except OSError as error:
                raise _unwritable(path, error) from None

    def track(self, section: TrackingSection) -> None:
        """Show the run, from now to its end, in the trackers that the config names (rank 0). metrics.jsonl has been cut
        by now."""
        if self.topology.rank == 0 and section.named():
            self._followers = Followers(self.directory, section, self.say)

    def cut_metrics(self, images_seen: int) -> None:
        """Forget lines after the checkpoint that is resumed, so that no step appears twice."""
        path = self.directory / "metrics.jsonl"
        if self.topology.rank == 0 and path.exists():
            kept = []
            for line in path.read_text(encoding="utf-8").splitlines():
                try:
                    if json.loads(line)["images_seen"] <= images_seen:
                        kept.append(line + "\n")
                except json.JSONDecodeError:
                    break  # the last line of a killed process
            self.fence.check()
            write_text(path, "".join(kept))
        self.topology.barrier()

    def logged(self, key: str, last: int) -> list[float]:
        """The last so many values of a key in metrics.jsonl, oldest first; rank 0 only, the others get none."""
        path = self.directory / "metrics.jsonl"
        if self.topology.rank or not path.exists():
            return []
        with open(path, encoding="utf-8") as file:
            return list(deque((line[key] for line in map(json.loads, file) if key in line), maxlen=last))

    def summary(self, **values: Any) -> None:
        if self.topology.rank == 0:
            self.fence.check()
            write_text(self.directory / "summary.json", json.dumps(values, indent=1))

    def finished(self) -> bool:
        return (self.directory / "summary.json").exists()


def _unwritable(path: Path, error: OSError) -> UserError:
    return UserError(
        f"{path}: cannot be written ({error.strerror}); once it can, the same command resumes from the last checkpoint"
    )


def _lock(directory: Path, fence: Fence, say: Callable[[str], None]) -> int | None:
    """Hold DIRECTORY/lock until the descriptor is closed; wait a little for an orphan that is just stopping.

    In a cluster's job the launcher's lock decides, and a process that still holds this one is on a machine that SLURM
    has lost: after the wait it is named, and the run continues without the lock (None, as on a disk without locks).
    Raises UserError elsewhere, Superseded.
    """
    path, deadline, waiting = directory / "lock", time.monotonic() + LOCK_PATIENCE_S, False
    descriptor: int | None = None
    while True:
        fence.check()
        try:
            if (descriptor := take_lock(path, wait=False)) is not None:
                break
        except OSError as error:
            if error.errno not in UNLOCKABLE:
                raise
            if not fence.active:
                say(f"{directory}: this disk knows no locks ({error.strerror}): never start this run twice at once")
            break
        holder = path.read_text(encoding="utf-8").strip() or "unknown"
        if time.monotonic() > deadline:
            if fence.active:
                say(f"{directory}: {holder}, which this job replaces, still has the run open; it may not write")
                break
            raise UserError(
                f"{directory}: another process ({holder}) is running in this run directory; stop it or choose another "
                "run_dir"
            )
        if not waiting:
            say(f"{directory}: waiting for another process ({holder}) that is running in this run directory")
            waiting = True
        time.sleep(0.5)
    path.write_text(f"pid {os.getpid()} on {platform.node()}", encoding="utf-8")
    return descriptor


@contextmanager
def open_run(
    config: Section,
    topology: Topology,
    directory: Path | None = None,
    classes: list[str] | None = None,
    fingerprint: str | None = None,
    label: str | None = None,
    held_out: str | None = None,
) -> Iterator[Run]:
    """Make or reopen a run directory for the length of a block (collective; rank 0 does the work).

    directory: None takes ``config.run_dir``.
    classes: names, label 0 first, for the checkpoints' classes.json.
    fingerprint, held_out: of the training and of the validation data.
    label: what log lines call the run; None takes the directory's name.

    Writes config.yaml and record.json. Raises UserError on every rank if the directory holds a run with another config
    (listing what differs) or other data, belongs to somebody else, or is in use.
    """
    directory = directory or getattr(config, "run_dir")  # noqa: B009 - every kind with runs has the key
    lock: int | None = None

    def claim() -> None:
        nonlocal lock
        own_folder(directory, "run_dir")
        lock = _lock(directory, run.fence, topology.log0)
        remove_asides(directory)
        change = compare(directory, config)
        file = directory / "record.json"
        record = read_json(file) if file.exists() else _record()
        data = {key: value for key, value in zip(DATA, (fingerprint, held_out), strict=True) if value is not None}
        _check_moved(directory, change.moved, record.get("data", {}), data)
        rewound = _rewind(directory, change)
        for line in change.lines(directory):
            topology.log0(line + rewound)
        # config.yaml last: until then ``compare`` sees the old config, so a start that is killed here is repeated whole
        write_text(directory / "config.yaml", dump(config))
        if "data" not in record:
            write_text(file, json.dumps(record | {"data": data}, indent=1))

    run = Run(directory, topology, dump(config), classes, fingerprint, label or directory.name)
    try:
        topology.broadcast_from_rank0(claim)
        yield run
    finally:
        if run._metrics is not None:
            run._metrics.close()
        if run._followers is not None:
            run._followers.close(run.finished(), at_once=bool(run.fence.lost()))
        if lock is not None:
            os.close(lock)


def _check_moved(directory: Path, moved: tuple[str, ...], recorded: Mapping[str, str], data: Mapping[str, str]) -> None:
    """Raise UserError where data that lie elsewhere now are not known to be the same.

    recorded: fingerprints by key, as of the run's first start. data: those of the data it is started with.
    """
    for key in moved:
        known = recorded.get(key)
        if known is None and key == "data.train" and (folders := complete(directory)):
            known = read_json(folders[-1] / "state.json")["data"]  # of a run that an older version began
        if known is None:
            raise UserError(
                f"{key}: another path than before, and {directory} does not record which data it was begun with; start "
                "it once from the old path, which records that, or choose another run_dir"
            )
        if known != data.get(key):
            raise UserError(
                f"{key}: {directory} was begun with other data (fingerprint {known}, now {data.get(key)}); point it at "
                "the same shards, wherever they lie now, or choose another run_dir"
            )


def _rewind(directory: Path, change: Change) -> str:
    """Make a run that grows, or whose schedule moved, unfinished; returns what to add to the line about it.

    Checkpoints that the old learning rates have led away from the new config's run are set aside, never deleted:
    a cooled-down model is a result. Raises UserError where no checkpoint from before is kept.
    """
    folders = complete(directory)
    reached = {folder: read_json(folder / "state.json")["images_seen"] for folder in folders}
    late = [folder for folder in folders if reached[folder] > change.alike_until]
    if late and len(late) == len(folders):
        raise UserError(
            f"{directory}: up to image {change.alike_until:,} the old and the new learning rates are the same, and no "
            f"checkpoint from before is kept (the first is at image {reached[late[0]]:,}): use the old optim.* again, "
            "or start another run from these weights (init_from)"
        )
    if change.grows or late:
        (directory / "summary.json").unlink(missing_ok=True)
    if not late:
        return ""
    aside = directory / "checkpoints" / f"set_aside_{time.strftime('%Y%m%d-%H%M%S')}"
    aside.mkdir()
    (directory / "wandb_id").unlink(missing_ok=True)  # what trackers show of those images is another run's by now
    for folder in reversed(late):  # newest first: what is left is at any time a run that can be continued
        if (scored := evaluations.folder_of(directory, evaluations.step_of(folder))).exists():
            scored.rename(aside / f"evaluation-{scored.name}")
        folder.rename(aside / folder.name)
    evaluations.write_lines(directory)
    last = reached[folders[len(folders) - len(late) - 1]]
    return (
        f"; the old learning rates differ from image {change.alike_until:,} on, so training continues from the "
        f"checkpoint at image {last:,}, and later ones are set aside in {aside}"
    )


def _record() -> dict[str, Any]:
    """What ran: a launched job runs a snapshot with a record of its own; elsewhere the checkout itself is asked."""
    root = Path(__file__).resolve().parents[2]
    taken = root / "record.json"
    code = json.loads(taken.read_text(encoding="utf-8")) if taken.exists() else provenance.record(root)
    versions = {name: version for name, version in code["versions"].items() if name != "llamagen-dist"}
    return {
        "llamagen_dist": __version__,
        **versions,
        "host": platform.node(),
        "cpus": os.cpu_count(),
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "commit": code["commit"],
        "diff": code["diff"],
    }
