"""Metrics in the conventions of other evaluators, against these evaluators' own numbers or formulas."""

from typing import get_args

import numpy as np
import pytest
import torch

from llamagen_dist.config.evaluate import InceptionScoreSplits, Manifold
from llamagen_dist.evaluation import extrapolation, frechet, kid, manifold
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


def sets(n: int, m: int) -> tuple[np.ndarray, np.ndarray]:
    """Real and generated points on a grid, so that many lie on a border."""
    r = np.random.RandomState(n)
    return r.randint(-4, 5, (n, 3)).astype(float), r.randint(-3, 7, (m, 3)).astype(float)


def prdc(real: np.ndarray, made: np.ndarray, k: int, border: bool) -> tuple[float, ...]:
    """The four by their definitions, with whole matrices of differences."""

    def distance(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        return ((a[:, None] - b[None]) ** 2).sum(-1)

    inside = np.less_equal if border else np.less
    real_radii, made_radii = (np.sort(distance(z, z), 1)[:, k] for z in (real, made))
    between = distance(real, made)
    in_real = inside(between, real_radii[:, None])
    return (
        in_real.any(0).mean(),
        inside(between, made_radii[None]).any(1).mean(),
        in_real.sum(0).mean() / k,
        inside(between.min(1), real_radii).mean(),
    )


@pytest.mark.parametrize(
    ("name", "k", "border"),
    [("exact", 3, True), ("adm", 3, True), ("torch-fidelity", 3, True), ("dgm-eval", 5, False)],
)
def test_precision_recall_density_and_coverage_in_every_convention(name, k, border):
    assert get_args(Manifold) == tuple(manifold.CONVENTIONS)
    real, made = sets(60, 45)
    found = manifold.manifold_scores(
        torch.from_numpy(made), torch.from_numpy(real), manifold.CONVENTIONS[name], block=7
    )
    assert found == pytest.approx(prdc(real, made, k, border), abs=1e-12)
    for twin in ((k + 1, border), (k, not border)):
        assert found != pytest.approx(prdc(real, made, *twin), abs=1e-3)
    assert found != pytest.approx(prdc(made, real, k, border), abs=1e-3), "swapping the sets would be noticed"


def test_memory_of_the_manifold_is_that_of_a_block():
    """Distances of 1,500 to 1,500 images are 18 MB in float64; a block of 100 rows of them 1.2."""
    generator = torch.Generator().manual_seed(0)
    made, real = (torch.randn(1500, 4, generator=generator) for _ in range(2))

    def largest(block: int) -> int:
        with torch.profiler.profile(profile_memory=True) as profiled:
            manifold.manifold_scores(made, real, block=block)
        return max(event.cpu_memory_usage for event in profiled.events())

    assert largest(100) < 4e6
    assert largest(1500) > 17e6  # the twin: the whole matrix is seen


def test_kid_draws_the_subsets_of_torch_fidelity():
    """Its rule: one RandomState(2020), a choice without replacement for input 1 (generated), then for input 2."""
    drawn = kid.torch_fidelity_subsets(40, 30, 3, 20)
    r = np.random.RandomState(2020)
    for mine, theirs in drawn:
        assert np.array_equal(mine, r.choice(40, 20, replace=False))
        assert np.array_equal(theirs, r.choice(30, 20, replace=False))
    hashed = kid.hashed_subsets(40, 30, 3, 20, 2020)
    assert not any(torch.equal(a, b) for a, b in zip(drawn[0], hashed[0], strict=True))


def test_fid_infinity_reads_a_line_over_one_over_n_at_zero():
    counts = np.array([100, 150, 200, 400])
    assert extrapolation.at_infinity(counts, 7.5 + 320.0 / counts) == pytest.approx(7.5, rel=1e-12)
    assert extrapolation.at_infinity(counts, 7.5 + 320.0 / counts**2) != pytest.approx(7.5, rel=1e-3)
    assert extrapolation.counts_of(50_000, 4).tolist() == [5000, 20000, 35000, 50000]
    assert extrapolation.counts_of(600, 3).tolist() == [300, 450, 600]
    with pytest.raises(ValueError, match="no line over 1 / N"):
        extrapolation.counts_of(3, 15)


def test_fid_infinity_takes_the_bias_of_few_images_away():
    """Two standard normals: their distance is 0, what few images add is not."""
    made = torch.from_numpy(np.random.RandomState(0).randn(3000, 32))
    truth = frechet.Gaussian(torch.zeros(32, dtype=torch.float64), torch.eye(32, dtype=torch.float64))
    few = frechet.frechet_distance(frechet.gaussian_of(made), truth)
    assert few > 0.05
    found = extrapolation.fid_infinity(made, truth, 15, 0)
    assert abs(found.value) < 0.15 * few
    assert found.distances[-1] == pytest.approx(few, rel=1e-9)
    assert found.distances[0] > 1.5 * few
    made[0, 0] = torch.nan
    with pytest.raises(ValueError, match="NaN"):
        extrapolation.fid_infinity(made, truth, 15, 0)


def test_the_triangle_of_a_product_with_a_triangle():
    """In blocks that do not divide the side."""
    x = torch.from_numpy(np.random.RandomState(0).randn(50, 30))
    lower, whole = torch.linalg.cholesky(x.T @ x), x[:40].T @ x[:40]
    expected = (lower.T @ whole @ lower).tril()
    assert torch.allclose(frechet._congruent(lower, whole, block=7).tril(), expected, rtol=1e-12)
    full = lower + lower.tril(-1).T  # the twin: what is left out are zeros only in a triangle
    assert not torch.allclose(
        frechet._congruent(full, whole, block=7).tril(), (full.T @ whole @ full).tril(), rtol=1e-3
    )
