"""What is wrong with a run after a fault, as sentences; an empty list is a pass. Each check sees only files."""

import itertools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llamagen_dist.checkpoint.checkpoint import opened, read_index
from llamagen_dist.checkpoint.folder import complete
from llamagen_dist.errors import UserError
from llamagen_dist.tracking.log_line import MEASURED
from tests import checkpoints as store
from tests.slurm.faults.trial import Step

SHOWN = 3  # differences named


def same_lines(found: Sequence[Mapping[str, Any]], wanted: Sequence[Mapping[str, Any]], tolerance: float) -> list[str]:
    """Lines of metrics.jsonl but for what a machine's speed decides. tolerance 0: equal to the last bit; else relative
    (and absolute, below 1)."""
    found, wanted = (
        [{k: v for k, v in line.items() if k not in MEASURED} for line in lines] for lines in (found, wanted)
    )
    problems = []
    if (steps := [line["step"] for line in found]) != (due := [line["step"] for line in wanted]):
        twice = sorted({s for s in steps if steps.count(s) > due.count(s)})
        missing = sorted(set(due) - set(steps))
        problems.append(
            f"metrics.jsonl: {len(steps)} lines for {len(due)}; too often: {twice[:5]}, missing: {missing[:5]}"
        )
    for line, other in zip(found, wanted, strict=False):
        for key in sorted(line.keys() | other.keys()):
            if not _close(line.get(key), other.get(key), tolerance):
                problems.append(f"step {line['step']}: {key} is {line.get(key)!r}, uninterrupted {other.get(key)!r}")
    return _some(problems)


def _close(a: Any, b: Any, tolerance: float) -> bool:
    if tolerance and isinstance(a, float) and isinstance(b, float):
        return abs(a - b) <= tolerance * max(1.0, abs(b))
    return bool(a == b)


def same_weights(found: Path, wanted: Path, tolerance: float) -> list[str]:
    """Every tensor of the newest checkpoints of two runs: weights, moving averages, optimizer states."""
    a, b = _tensors(found), _tensors(wanted)
    if a.keys() != b.keys():
        return [f"the last checkpoint holds other tensors: {sorted(a.keys() ^ b.keys())[:SHOWN]}"]
    problems = []
    for name, value in a.items():
        other = b[name]
        if tolerance == 0:
            if not torch.equal(value, other):
                problems.append(f"{name} differs by up to {(value - other).abs().max():.3g}")
        elif value.shape != other.shape or not bool(
            ((value - other).abs() <= tolerance * other.abs().clamp(min=1)).all()
        ):
            problems.append(f"{name} differs by up to {(value - other).abs().max():.3g}, more than {tolerance:g}")
    return _some(problems)


def _tensors(run: Path) -> dict[str, Tensor]:
    folder = complete(run)[-1]
    found = {}
    for full, name in read_index(folder)["tensors"].items():
        with opened(folder / name) as file:
            found[full] = file.get_tensor(full.split(":", 1)[1])
    return found


def right_samples(lines: Sequence[Mapping[str, Any]], due: Callable[[int], str]) -> list[str]:
    """No image was shown twice or left out: the digests say so at every line. due: images_seen -> the right one."""
    wrong = [line for line in lines if "samples" in line and line["samples"] != due(line["images_seen"])]
    if not any("samples" in line for line in lines):
        return ["no line of metrics.jsonl tells its samples"]
    return [f"from step {wrong[0]['step']} on the run has seen other samples than are due"] if wrong else []


def steps_redone(steps: Sequence[Step]) -> list[int]:
    """How many steps each restart had to do again: one number per change of incarnation."""
    return [a.number - b.number + 1 for a, b in itertools.pairwise(steps) if a.owner != b.owner]


def redone_too_many(steps: Sequence[Step], most: int) -> list[str]:
    """most: per restart; 0 after a signal, else the steps from one save to the next."""
    problems = [f"a restart did {n} steps again, more than {most}" for n in steps_redone(steps) if n > most]
    problems += [f"a restart left out {-n} steps" for n in steps_redone(steps) if n < 0]
    return problems


def leftovers(run: Path) -> list[str]:
    """Half-written files: a checkpoint that is none, a file that was to be renamed."""
    problems = []
    for folder in sorted((run / "checkpoints").glob("*")):
        if not (folder / "COMPLETE").exists():
            problems.append(f"{folder.name} is half a checkpoint")
            continue
        try:
            store.verify(folder)
        except UserError as error:
            problems.append(str(error))
    problems += [f"{f.relative_to(run)} is left over" for f in sorted(run.rglob("*")) if ".tmp" in f.suffixes]
    return problems


def _some(problems: list[str]) -> list[str]:
    return [*problems[:SHOWN], *([f"and {len(problems) - SHOWN} more"] if len(problems) > SHOWN else [])]
