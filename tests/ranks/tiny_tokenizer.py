"""What the tests of tiny tokenizers on ranks share: their pictures, their steps, what a checkpoint would hold."""

from collections.abc import Iterator

import torch
from torch import Tensor

from llamagen_dist.data.batch import ImageBatch
from llamagen_dist.parallel.topology import Topology
from tokenizer_training.task import TokenizerTask

BATCH = 8


def batch(step: int, topology: Topology) -> ImageBatch:
    """This rank's share of smooth random pictures."""
    coarse = torch.rand(BATCH, 3, 4, 4, generator=torch.Generator().manual_seed(step)) * 2 - 1
    images = torch.nn.functional.interpolate(coarse, size=16, mode="bilinear")
    mine = slice(topology.rank * (share := BATCH // topology.world), (topology.rank + 1) * share)
    return ImageBatch(images[mine], torch.arange(BATCH)[mine])


def steps(task: TokenizerTask, chosen: range) -> Iterator[dict[str, float]]:
    for step in chosen:
        metrics = task.step(batch(step, task.topology), step * BATCH)
        yield {name: float(task.topology.mean(value.double())) for name, value in metrics.items()}


def kept(task: TokenizerTask) -> dict[str, Tensor]:
    return {f"{entry.group}/{entry.key}": entry.local().clone() for entry in task.entries()}
