"""Learning rates are functions of position; decay goes to matrices only."""

import pytest
import torch

from llamagen_dist.config import OptimSection
from llamagen_dist.parallel.optim import groups, learning_rate


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, {0: 1.0, 99: 1.0, 10**9: 1.0}),
        ({"schedule": "warmup", "warmup_images": 100}, {0: 0.01, 49: 0.5, 99: 1.0, 100: 1.0, 10**9: 1.0}),
        (
            {"schedule": "wsd", "warmup_images": 100, "cooldown_from": 200, "cooldown_images": 400},
            {0: 0.01, 150: 1.0, 200: 1.0, 300: 0.75, 400: 0.5, 599: 0.0025, 600: 0.0, 900: 0.0},
        ),
        (
            {"schedule": "wsd", "cooldown_from": 200, "cooldown_images": 400, "final_lr": 0.5},
            {0: 1.0, 200: 1.0, 400: 0.75, 600: 0.5, 900: 0.5},
        ),
        (
            {"schedule": "cosine", "warmup_images": 100, "cosine_images": 500, "final_lr": 0.1},
            {49: 0.5, 100: 1.0, 200: 0.1 + 0.9 * (2 + 2**0.5) / 4, 300: 0.55, 500: 0.1, 900: 0.1},
        ),
    ],
)
def test_schedules(settings, expected):
    optim = OptimSection(lr=1.0, **settings)
    assert {at: pytest.approx(rate) for at, rate in expected.items()} == {
        at: learning_rate(optim, at) for at in expected
    }


@pytest.mark.parametrize(
    "settings",
    [
        {"schedule": "wsd"},
        {"cooldown_images": 5},
        {"warmup_images": 5},
        {"schedule": "cosine"},
        {"cosine_images": 5},
        {"schedule": "cosine", "warmup_images": 5, "cosine_images": 5},
        {"schedule": "wsd", "warmup_images": 9, "cooldown_from": 5, "cooldown_images": 1},
    ],
)
def test_a_schedule_without_its_lengths_is_refused(settings):
    with pytest.raises(ValueError, match=r"warm|cooldown|cosine"):
        OptimSection(**settings)


def test_only_matrices_decay():
    module = torch.nn.Sequential(torch.nn.Embedding(3, 4), torch.nn.LayerNorm(4), torch.nn.Linear(4, 2))
    matrices, vectors = groups(module, OptimSection())
    assert (matrices["weight_decay"], len(matrices["params"])) == (0.05, 2)
    assert (vectors["weight_decay"], len(vectors["params"])) == (0.0, 3)
