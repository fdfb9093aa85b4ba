"""Metrics in the conventions of other evaluators, against these evaluators' own numbers or formulas."""

from typing import get_args

import numpy as np
import pytest
import torch

from llamagen_dist.config.evaluate import InceptionScoreSplits
from llamagen_dist.evaluation.inception_score import MEANING, SPLITS, ScoreSums


@pytest.fixture(scope="module")
def logits() -> torch.Tensor:
    r = np.random.RandomState(0)
    pool = np.maximum(r.randn(6000, 2048) * 0.4 + 0.1, 0).astype(np.float32)
    return torch.from_numpy(pool @ (r.randn(1008, 2048) * 0.06).astype(np.float32).T)


def inception_score(logits: torch.Tensor, splits: str) -> tuple[float, float]:
    """In batches that come in no particular order."""
    sums = ScoreSums(SPLITS[splits](len(logits)), logits.shape[1])
    for rows in torch.randperm(len(logits)).split(700):
        sums.update(rows, logits[rows])
    return sums.score()


ADM = np.array([1.2984253168, 1.2989592552])


@pytest.mark.parametrize(
    ("splits", "expected"),
    [
        ("whole", (1.2985868368, 0.0)),  # torch-fidelity 0.4.0, isc_splits=1
        ("torch-fidelity", (1.2979342375, 0.0011535391)),  # with its defaults
        ("adm", (1.2986922264, ADM.std())),  # its two splits, of 5000 and of 1000 images
    ],
)
def test_inception_score_has_the_values_of_other_evaluators(logits, splits, expected):
    # ADM's softmax is in float32
    assert inception_score(logits, splits) == pytest.approx(expected, abs=5e-8 if splits == "adm" else 2e-8)
    others = {name for name in SPLITS if name != splits}
    for other in others:  # sabotage twin: another convention gives another number
        assert abs(inception_score(logits, other)[0] - expected[0]) > 5e-5
    assert get_args(InceptionScoreSplits) == tuple(SPLITS) == tuple(MEANING)


def test_the_order_of_the_images_matters_to_consecutive_splits_alone(logits):
    backwards = logits.flip(0)
    assert inception_score(backwards, "whole") == pytest.approx(inception_score(logits, "whole"), rel=1e-12)
    assert abs(inception_score(backwards, "adm")[0] - inception_score(logits, "adm")[0]) > 1e-5
    # the bias of the last layer would give another score
    biased = logits + torch.linspace(-2, 2, logits.shape[1])
    assert abs(inception_score(biased, "whole")[0] - inception_score(logits, "whole")[0]) > 1e-4


def test_a_few_images_have_a_score_in_every_convention():
    few = torch.randn(7, 20, generator=torch.Generator().manual_seed(0))
    for splits in SPLITS:
        assert inception_score(few, splits)[0] >= 1.0
