"""The check's training step on two ranks, as GPUs would take it, and what it says of a rank that adds up wrongly."""

from pathlib import Path
from typing import Any

import deepspeed  # noqa: F401 - before the fork, so that ranks start at once
import torch
import torch._dynamo  # the optimizer imports it, seconds in each rank

from llamagen_dist.launch.check import network, step
from llamagen_dist.parallel.topology import start
from llamagen_dist.training.gpt_task import GPTTask
from tests.ranks.forked import run_ranks


def as_on_gpus(folder: Path) -> tuple[dict[str, Any], dict[str, Any], dict[str, float]]:
    topology = start()
    return step.train(topology, folder, True), network.all_reduce(topology), network.clock(topology)


def one_is_wrong(folder: Path) -> dict[str, Any]:
    original = GPTTask.step

    def wrong(self: GPTTask, batch: Any, images_seen: int) -> Any:
        metrics = original(self, batch, images_seen)
        if self.topology.rank == 1:
            with torch.no_grad():
                next(self.model.parameters()).view(-1)[0] += 1e-3
        return metrics

    GPTTask.step = wrong  # type: ignore[method-assign]
    return step.train(start(), folder)


def test_two_ranks_train_alike_under_zero(tmp_path: Path) -> None:
    for facts, speed, clock in run_ranks(as_on_gpus, 2, tmp_path):
        first, second = facts["losses"]
        assert facts["equal"]
        assert abs(first - facts["expected"]) < 1e-3
        assert second < first
        assert speed["bus_gb_s"] > 0
        assert abs(clock["offset_s"]) <= clock["error_s"] + 0.01


def test_weights_that_differ_are_noticed(tmp_path: Path) -> None:
    assert [facts["equal"] for facts in run_ranks(one_is_wrong, 2, tmp_path)] == [False, False]
