"""The life of a checkpoint folder: begun, reported on by every writer, committed, pruned; or left half-written."""

import json
import shutil
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llamagen_dist.files import sha256_file, sync_folder, write_text

if TYPE_CHECKING:  # it loads torch, which whoever only looks for checkpoints can do without
    from llamagen_dist.checkpoint.plan import Plan

FORMAT = 1
POLL_S = 0.05


def step_folder(run_dir: Path, step: int) -> Path:
    return run_dir / "checkpoints" / f"step_{step:08d}"


def complete(run_dir: Path) -> list[Path]:
    """The committed checkpoints of a run, oldest first."""
    return sorted(f.parent for f in (run_dir / "checkpoints").glob("step_*/COMPLETE"))


def remove(folder: Path) -> None:
    (folder / "COMPLETE").unlink(missing_ok=True)  # first: what is half removed must not count
    shutil.rmtree(folder)


def remove_leftovers(run_dir: Path) -> list[Path]:
    """Delete what interrupted saves left behind. Only while nothing is being written."""
    left = [f for f in (run_dir / "checkpoints").glob("step_*") if f.is_dir() and not (f / "COMPLETE").exists()]
    for folder in left:
        shutil.rmtree(folder, ignore_errors=True)
    return sorted(left)


def prune(
    run_dir: Path, keep_last: int, keep_every_images: int = 0, in_use: Callable[[], Iterable[Path]] = tuple
) -> None:
    """Remove all but the last ``keep_last``, the first at or after each multiple of ``keep_every_images``, and those
    that are ``in_use``."""
    folders = complete(run_dir)
    kept = {*folders[-keep_last:], *in_use()}
    if keep_every_images:
        reached = 0
        for folder in folders:
            try:
                multiple = json.loads((folder / "state.json").read_text())["images_seen"] // keep_every_images
            except (OSError, ValueError, KeyError, TypeError):
                continue  # damaged: it marks no multiple
            if multiple > reached:
                kept.add(folder)
                reached = multiple
    for folder in folders:
        if folder not in kept:
            remove(folder)


class Abandoned(Exception):
    """The save was given up: another rank failed or is gone."""


def _report_path(folder: Path, rank: int) -> Path:
    return folder / f"report-{rank:05d}.json"


def write_report(folder: Path, rank: int, sums: Mapping[str, str]) -> None:
    """Say that this rank's files (name -> sha256) are on disk."""
    write_text(_report_path(folder, rank), json.dumps(sums))


def collect_reports(
    folder: Path, plan: "Plan", world: int, patience_s: Callable[[], float], given_up: threading.Event
) -> dict[str, str]:
    """Wait for every rank's report; returns file -> sha256 of all of them.

    Files are used, not collectives: this runs beside training, whose collectives must keep their order.

    folder: the checkpoint being written.
    plan: which says what files a rank writes.
    world: ranks.
    patience_s(): seconds that a rank may neither report nor write anything; called at every poll, as it may shrink.
    given_up: set when another rank has failed.

    Raises Abandoned when it is, or when a rank's patience is over.
    """
    sums: dict[str, str] = {}
    missing = list(range(world))
    sizes: dict[int, int] = {}
    since = time.monotonic()
    while missing:
        for rank in list(missing):
            if _report_path(folder, rank).exists():
                sums |= json.loads(_report_path(folder, rank).read_text())
                missing.remove(rank)
                since = time.monotonic()
        if not missing:
            break
        if given_up.wait(POLL_S):
            raise Abandoned
        # a slow disk is no reason to give up: growing files are progress, and only silence counts
        now = {rank: _written(folder, plan, rank) for rank in missing}
        if now != sizes:
            sizes, since = now, time.monotonic()
        elif time.monotonic() - since > patience_s():
            who = ", ".join(str(rank) for rank in missing)
            raise Abandoned(f"rank {who} neither reported nor wrote anything for {patience_s():.0f} s")
    return sums


def _written(folder: Path, plan: "Plan", rank: int) -> int:
    """Bytes of the rank's files that are in the folder so far."""
    total = 0
    for name in plan.file_names(rank):
        try:
            total += (folder / name).stat().st_size
        except FileNotFoundError:
            break  # files are written in this order
    return total


def commit(
    folder: Path,
    plan: "Plan",
    sums: Mapping[str, str],
    state: Mapping[str, Any],
    config_text: str,
    classes: Sequence[str] | None,
    allowed: Callable[[], None],
) -> None:
    """Write what describes the files, and COMPLETE as the very last, unless ``allowed()`` raises just before it."""
    texts = {"state.json": json.dumps(dict(state), indent=1, sort_keys=True), "config.yaml": config_text}
    if classes is not None:
        texts["classes.json"] = json.dumps(list(classes), ensure_ascii=False)
    for name, text in texts.items():
        write_text(folder / name, text)
    # the hashes of tensors are those of the bytes that were meant, taken while writing; nothing is read back
    files = dict(sums) | {name: sha256_file(folder / name) for name in texts}
    index = {"format": FORMAT, "files": files, "tensors": plan.where()}
    write_text(folder / "index.json", json.dumps(index, indent=1, sort_keys=True))
    for report in folder.glob("report-*.json"):
        report.unlink()
    sync_folder(folder.parent)  # the folder itself must survive what the older ones, which prune removes, do not
    allowed()
    write_text(folder / "COMPLETE", sha256_file(folder / "index.json") + "\n")
