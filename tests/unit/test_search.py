"""The search's decisions as a function of results, its bands, what it refuses, and how a report shows it."""

import json
import math
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import ttest_rel

from llamagen_dist.config import SearchConfig, load
from llamagen_dist.config.section import build
from llamagen_dist.errors import UserError
from llamagen_dist.evaluation.bands import bootstrap_fid, drawn
from llamagen_dist.evaluation.frechet import frechet_distance, gaussian_of
from llamagen_dist.evaluation.search import Measured, Point, curves, grid, next_point, summary
from llamagen_dist.launch.listing import size
from llamagen_dist.launch.points import sweep
from llamagen_dist.report.collect import collect
from llamagen_dist.report.files import write
from llamagen_dist.report.sections import build as build_report

ROOT = Path(__file__).parent.parent.parent
NEEDED = {"kind": "search", "checkpoint": "gpt", "tokenizer": "vq", "reference": "real.npz", "out": "out"}


def config(**changes: object) -> SearchConfig:
    return build(SearchConfig, {**NEEDED, **changes}, "search.yaml")


def path(given: SearchConfig, value, least: int = 0) -> dict[Point, float]:
    """All points in the order in which a search measures them."""
    measured: dict[Point, float] = {}
    while (point := next_point(given, measured)) is not None:
        assert point not in measured
        measured[point] = value(point)
    assert len(measured) >= least
    return measured


def test_the_grid_has_every_combination_once_and_one_point_without_guidance():
    axes = {"guidance": ["linear", "step"], "top_k": [0, 5], "temperature": [0.9], "cfg_scale": [2, 1]}
    given = config(grid={**axes, "cfg_scale_of": {"step": [1, 8]}}, top_p=0.5)
    points = grid(given)
    assert [(p.guidance, p.cfg_scale, p.top_k) for p in points] == [
        ("linear", 1, 0),
        ("linear", 2, 0),
        ("linear", 1, 5),
        ("linear", 2, 5),
        ("step", 8, 0),
        ("step", 8, 5),
    ]
    assert {(p.temperature, p.top_p) for p in points} == {(0.9, 0.5)}
    assert len({p.name for p in points}) == len(points)
    shared = [[p.name for p in points if p.lies_on(curve)] for curve in curves(given)]
    assert shared[2] == ["linear_cfg-1_t-0.9_k-0_p-0.5", "step_cfg-8_t-0.9_k-0_p-0.5"]


@pytest.mark.parametrize(
    ("table", "coarse", "then"),
    [
        # LlamaGen (arXiv 2406.06525) table 8, 256 pixels, 300 epochs: FID by guidance scale of GPT-B and GPT-L
        ({1: 26.262, 1.5: 8.738, 1.75: 6.116, 2: 5.464, 2.25: 5.641, 2.5: 6.390}, [1, 1.5, 2, 2.5], [2.25, 1.75]),
        ({1: 13.452, 1.5: 4.079, 1.75: 3.805, 2: 4.407}, [1, 1.5, 2], [1.75]),
    ],
)
def test_published_tables_are_searched_to_their_best_row(table, coarse, then):
    given = config(grid={"cfg_scale": coarse}, resolution=0.25)
    found = path(given, lambda point: table[point.cfg_scale])
    assert [point.cfg_scale for point in found] == [*coarse, *then]
    assert min(found, key=found.get).cfg_scale == min(table, key=table.get)


curve_of = st.tuples(st.floats(1.0, 12.0), st.floats(0.1, 5.0), st.floats(-1.0, 1.0))


@settings(deadline=None, max_examples=60)
@given(
    optima=st.lists(curve_of, min_size=2, max_size=2),
    scales=st.lists(st.integers(4, 20).map(lambda n: n / 4), min_size=2, max_size=5, unique=True),
    metric=st.sampled_from(["fid", "precision"]),
    finer=st.integers(0, 60),
    order=st.randoms(),
)
def test_the_optimum_stays_between_the_neighbours_of_the_best(optima, scales, metric, finer, order: random.Random):
    """Curves with one optimum each: bracketed, never measured twice, and decided by the results alone."""
    given = config(grid={"cfg_scale": scales, "guidance": ["constant", "step"]}, metric=metric, finer=finer)
    sign = 1 if metric == "fid" else -1

    def value(point: Point) -> float:
        at, slope, base = optima[point.guidance == "step"]
        return sign * (base + slope * math.log(point.cfg_scale / at) ** 2)

    found = path(given, value)
    assert len(found) <= len(grid(given)) + finer
    items = list(found.items())
    for length in range(len(items)):  # resumed anywhere, with the results in any order
        some = items[:length]
        order.shuffle(some)
        assert next_point(given, dict(some)) == items[length][0]
    best = min(found, key=lambda point: sign * found[point])
    at = optima[best.guidance == "step"][0]
    if len(found) < len(grid(given)) + finer and best.cfg_scale > 1:  # ended because nothing was left to resolve
        assert abs(best.cfg_scale - at) < 2 * given.resolution
    if len(items) > len(grid(given)):  # twin: a forgotten point is measured again, and not the one after it
        forgotten = order.choice(items[:-1])[0]
        left = {point: v for point, v in items[: items.index((forgotten, found[forgotten])) + 1] if point != forgotten}
        assert next_point(given, left) == forgotten


def test_another_result_takes_another_path():
    given = config(grid={"cfg_scale": [1, 2, 3]}, finer=1)
    values = {point: abs(point.cfg_scale - 2.2) for point in grid(given)}
    assert next_point(given, values).cfg_scale == 2.5
    assert next_point(given, {point: abs(point.cfg_scale - 1.8) for point in values}).cfg_scale == 1.5
    assert next_point(given, {point: point.cfg_scale for point in values}).cfg_scale == 1.5
    assert next_point(given, {point: -point.cfg_scale for point in values}).cfg_scale == 4, "beyond the end of the axis"


def measured(scale: float, values: list[float], replicates: tuple[float, ...] = ()) -> Measured:
    return Measured(Point("constant", scale, 1.0, 0, 1.0), {"fid": values}, replicates)


def test_points_are_told_apart_by_their_differences_on_shared_noise():
    r = np.random.RandomState(0)
    common = r.randn(50)
    near, far = 10.3 + common + 0.05 * r.randn(50), 10 + common
    best, other = measured(1, [10.0], tuple(far)), measured(2, [10.3], tuple(near))
    assert best.deviation("fid") > 0.5
    assert best.indistinct(other, "fid") is False
    shuffled = measured(2, [10.3], tuple(r.permutation(near)))
    assert best.indistinct(shuffled, "fid") is True, "twin: other pictures in every replicate"
    assert measured(1, [10.0]).indistinct(measured(2, [10.3]), "fid") is None


@pytest.mark.parametrize("shift", [0.02, 0.08, 0.3])
def test_seeds_are_compared_by_students_paired_test(shift):
    r = np.random.RandomState(1)
    a = r.randn(4)
    b = a + shift + 0.05 * r.randn(4)
    same = measured(1, a.tolist()).indistinct(measured(2, b.tolist()), "fid")
    assert same == (ttest_rel(a, b).pvalue > 0.05)
    assert measured(1, a.tolist()).deviation("fid") == pytest.approx(a.std(ddof=1))


@pytest.mark.parametrize(("n", "reference"), [(30, 25), (60, 90), (130, 90), (130, 20)])
def test_replicates_are_the_distances_of_the_pictures_that_were_drawn(n, reference):
    """By pictures (fewer of them than the reference's rank) and by dimensions, against the plain distance."""
    r = np.random.RandomState(n)
    dimensions = 64
    pool = torch.from_numpy(r.rand(n, dimensions).astype(np.float32))
    real = gaussian_of(torch.from_numpy(r.rand(reference, dimensions) + 0.1))
    found = bootstrap_fid(pool, real, 3)
    for number, distance in enumerate(found):
        rows = torch.repeat_interleave(torch.arange(n), drawn(number, n).long())
        assert len(rows) == n
        assert distance == pytest.approx(frechet_distance(gaussian_of(pool[rows]), real), rel=1e-6)
        other = torch.repeat_interleave(torch.arange(n), drawn(number + 3, n).long())
        assert distance != pytest.approx(frechet_distance(gaussian_of(pool[other]), real), rel=1e-6), "twin"
    pool[3, 4] = torch.nan
    with pytest.raises(ValueError, match="features"):
        bootstrap_fid(pool, real, 3)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"grid": {"top_k": []}}, "grid: top_k: [] leaves nothing to try; give at least one value"),
        ({"grid": {"cfg_scale": []}}, "cfg_scale: [] leaves nothing to try"),
        ({"grid": {"cfg_scale": [-1, 2]}}, "grid.cfg_scale.0: Input should be greater than or equal to 1"),
        ({"grid": {"temperature": [1, 1.0]}}, "temperature: 1.0 stands there twice"),
        ({"grid": {"guidance": ["constnat"]}}, "guidance: 'constnat' is no schedule; did you mean constant?"),
        ({"grid": {"cfg_scale_of": {"linaer": [1]}}}, "cfg_scale_of: 'linaer' is no schedule; did you mean linear?"),
        ({"grid": {"cfg_scale_of": {"linear": [1]}}}, "grid.cfg_scale_of: linear is not among the schedules, constant"),
        ({"grid": {"cfg_scale": [2]}}, "finer: 8 finer points need a coarse axis; give grid.cfg_scale at least two"),
        ({"grid": {"cfg_scales": [2]}}, "grid.cfg_scales: unknown key; did you mean grid.cfg_scale?"),
        ({"seeds": [0, 1, 0]}, "seeds: 0 stands there twice"),
        ({"seeds": []}, "seeds: [] leaves nothing to try"),
        ({"bootstrap": 1}, "bootstrap: 1 replicate has no deviation; give more, or 0"),
        ({"images": 1}, "images: 1 is no distribution"),
        ({"metric": "kid_mean"}, "metric: kid_mean is not measured; add kid to metrics"),
        ({"metrics": ["fid", "class_agreement"]}, "metrics: class_agreement needs a classifier"),
        ({"tensor": 2}, "tensor: each rank draws alone here"),
        ({"cfg_interval": 3, "grid": {"guidance": ["constant", "step"]}}, "cfg_interval: 3 belongs to guidance"),
        ({"resolution": 0}, "resolution: "),
    ],
)
def test_a_search_that_makes_no_sense_gets_one_sentence(changes, sentence):
    with pytest.raises(UserError) as refused:
        config(**changes)
    assert sentence.removeprefix("grid: ") in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.fixture
def folder(tmp_path) -> Path:
    """What a search leaves: two schedules, a finer point, made-up scores."""
    given = config(grid={"cfg_scale": [1, 2, 3], "guidance": ["constant", "step"]}, finer=1, bootstrap=9)
    noise = np.random.RandomState(0).randn(9)

    def result(point: Point) -> Measured:
        fid = 10 + abs(point.cfg_scale - 2.2) + 0.25 * (point.guidance == "step")
        values = {"fid": [fid], "precision": [0.1 * point.cfg_scale], "recall": [1 / (1 + point.cfg_scale)]}
        return Measured(point, values, tuple(fid + noise + 0.2 * point.cfg_scale * noise[::-1]))

    found = [result(point) for point in path(given, lambda point: result(point).mean("fid"))]
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "search.json").write_text(json.dumps(summary(given, found)))
    (tmp_path / "launch").mkdir()
    (tmp_path / "launch" / "job.json").write_text("{}")
    (tmp_path / "launch" / "config.yaml").write_text("kind: search\n")
    return tmp_path


def test_a_report_shows_the_search(folder):
    content = json.loads((folder / "out" / "search.json").read_text())
    assert content["best"]["fid"]["name"] == "constant_cfg-2_t-1_k-0_p-1"
    assert content["best"]["precision"]["indistinct"] is None, "one seed, and no replicates of the precision"
    for place in (folder / "out", folder / "out" / "search.json"):
        report = build_report(collect(place))
        write(report, folder / "shown")
        text = (folder / "shown" / "report.md").read_text()
        assert "The search for the best FID" in text
        assert "| constant | 2 | **10.20 ±" in text
        assert "| step | 2 | 10.45 ±" in text
        assert "Points after the coarse grid: 1" in text
        assert "Best FID 10.20 ±" in text
        assert (folder / "shown" / "figure-01.png").read_bytes()[:4] == b"\x89PNG"
    (run,) = collect(folder).runs  # as a point of a sweep
    assert run.score == pytest.approx(10.2)


def test_a_sweep_of_searches_gives_each_a_folder(tmp_path):
    (tmp_path / "search.yaml").write_text(json.dumps(NEEDED))
    point = {"kind": "sweep", "title": "t", "module": "eval.search", "config": "search.yaml"}
    (tmp_path / "sweep.yaml").write_text(json.dumps({**point, "grid": {"weights": ["trained", "ema"]}}))
    nodes = sweep(tmp_path / "sweep.yaml", tmp_path / "swept").nodes
    assert [node.config.out for node in nodes] == [node.folder / "out" for node in nodes]
    assert [node.config.weights for node in nodes] == ["trained", "ema"]
    assert size(nodes[0]) == "5 points and up to 8 finer, 5,000 pictures each"


def test_the_shipped_search_has_its_schedules_own_scales():
    shipped = load(ROOT / "configs" / "eval" / "search.yaml", kind="search")
    assert [p.cfg_scale for p in grid(shipped) if p.guidance == "power-cosine"] == [4, 8, 16]
