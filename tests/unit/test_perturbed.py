"""Perturbed codes: a share of the positions, given neighbours only, the same wherever they are computed."""

import pytest
import torch

from llamagen_dist.evaluation.perturbed import perturb


def some_neighbours() -> torch.Tensor:
    """int64 [50, 3]: other codes, near or not."""
    return (torch.arange(50)[:, None] + torch.tensor([1, 7, 20])) % 50


def test_exactly_the_share_is_replaced_by_neighbours_alone():
    neighbours = some_neighbours()
    codes = torch.randint(0, 50, (64, 16), generator=torch.Generator().manual_seed(1))
    changed = perturb(codes, neighbours, 0.3, 0, torch.arange(64))
    moved = changed != codes
    assert (moved.sum(1) == round(0.3 * 16)).all()
    assert moved.any(0).all(), "every position is among them"
    assert ((neighbours[codes] == changed[..., None]).any(-1) | ~moved).all()
    used = (neighbours[codes] == changed[..., None])[moved].float().mean(0)
    assert used == pytest.approx([1 / 3] * 3, abs=0.1)
    assert (perturb(codes, neighbours, 1.0, 0, torch.arange(64)) != codes).all()


def test_noise_belongs_to_seed_and_sample_not_to_the_batch():
    neighbours = some_neighbours()
    codes = torch.randint(0, 50, (10, 16), generator=torch.Generator().manual_seed(1))
    whole = perturb(codes, neighbours, 0.5, 7, torch.arange(10))
    parts = [perturb(codes[i : i + 4], neighbours, 0.5, 7, torch.arange(i, min(i + 4, 10))) for i in (0, 4, 8)]
    assert torch.equal(torch.cat(parts), whole)
    assert not torch.equal(perturb(codes, neighbours, 0.5, 8, torch.arange(10)), whole)
    assert not torch.equal(perturb(codes, neighbours, 0.5, 7, torch.arange(1, 11)), whole), (
        "another sample number shows"
    )
