"""A whole, tiny training run through fit() on forked ranks, into which a test can put a fault."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from llamagen_dist.data.batch import TokenBatch
from llamagen_dist.data.order import position_to_sample
from llamagen_dist.training.fit import fit
from llamagen_dist.training.gpt_task import GPTTask
from llamagen_dist.training.run import open_run
from tests.ranks.layouts import BATCH, Layout, global_batch, local, make_task

SAMPLES = 40  # in the data set, so that a run of 10 steps of 12 crosses three epochs

Fault = Callable[[GPTTask, int], None]
"""Called before a step with the task and the step's number, from 1, on every rank."""


class Stream:
    """layouts.global_batch by position; ``before`` runs where a batch is read."""

    def __init__(self, task: GPTTask, before: Fault) -> None:
        self._task, self._before = task, before
        self._share = task.topology.per_rank_batch(BATCH)

    def batch(self, images_seen: int) -> TokenBatch:
        self._before(self._task, images_seen // BATCH + 1)
        mine = local(global_batch(images_seen), self._task.topology.dp_rank, self._share)
        samples = position_to_sample(mine.positions, SAMPLES, 3)[1]
        return TokenBatch(mine.tokens, mine.condition, mine.positions, samples)

    def where(self, sample: int) -> str:
        return f"shard-000007.tar: sample {sample}"


def nothing(task: GPTTask, number: int) -> None: ...


def run(
    layout: Layout, folder: Path, *settings: str, read: Fault = nothing, compute: Fault = nothing, **train: Any
) -> dict[str, torch.Tensor]:
    """Train in ``folder``; faults come while reading a batch or while computing. Returns the weights (rank 0)."""
    torch.set_num_threads(1)
    task = make_task(layout, f"run_dir={folder}", *settings, **train)
    original = task.step

    def step(batch: TokenBatch, images_seen: int) -> Any:
        compute(task, images_seen // BATCH + 1)
        return original(batch, images_seen)

    task.step = step  # type: ignore[method-assign]
    with open_run(task.config, task.topology, folder, label="tiny") as opened:
        fit(task, Stream(task, read), task.config, opened)
    found = {f"{e.group}:{e.key}": e.read(0) for e in task.entries()}
    return {key: tensor.clone() for key, tensor in found.items() if tensor is not None}


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
