"""Spike scores are a function of the losses logged before, and of nothing else."""

import math
import statistics

import pytest

from llamagen_dist.training.spikes import FEWEST, Spikes

LOSSES = [2.0 + 0.1 * math.sin(n) for n in range(40)]


def scores(losses: list[float], window: int = 16, threshold: float = 3.0) -> list[float | None]:
    spikes = Spikes(window, threshold)
    return [spikes.score(loss) for loss in losses]


def test_only_a_loss_far_above_those_before_is_a_spike():
    assert scores(LOSSES) == [None] * 40
    assert scores([loss if n != 30 else 1.0 for n, loss in enumerate(LOSSES)]) == [None] * 40, "downwards is no spike"
    found = scores([loss if n != 30 else 3.0 for n, loss in enumerate(LOSSES)])
    assert [n for n, score in enumerate(found) if score is not None] == [30]
    before = LOSSES[14:30]
    assert found[30] == pytest.approx((3.0 - statistics.mean(before)) / statistics.stdev(before))


def test_too_few_losses_and_equal_ones_have_no_score():
    assert scores([1.0] * (FEWEST - 1) + [99.0]) == [None] * FEWEST
    assert scores([1.0] * 20 + [99.0])[-1] is None


def test_a_resumed_run_scores_as_the_uninterrupted_one_did():
    losses = [loss if n != 30 else 3.0 for n, loss in enumerate(LOSSES)]
    for cut in (3, 12, 29, 31):
        spikes = Spikes(16, 3.0, losses[:cut])
        assert [spikes.score(loss) for loss in losses[cut:]] == scores(losses)[cut:]
    forgotten = Spikes(16, 3.0)  # sabotage twin
    assert [forgotten.score(loss) for loss in losses[25:]] != scores(losses)[25:]
