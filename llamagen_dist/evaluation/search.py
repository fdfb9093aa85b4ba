"""Which settings of the sampler are measured next, and which are the best: pure functions of the results so far.

First the grid of all axes. Then, while points are left, the scale of guidance is refined: on the curve (one schedule,
temperature, top-k and top-p) with the best point, the wider of the two gaps beside that point is halved, or, where the
best scale is the end of its axis, one more step is taken beyond it. On a curve with a single optimum this keeps it
between the neighbours of the best scale. A curve that is resolved leaves the rest to the next best.
"""

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from scipy.special import ndtri, stdtrit

from llamagen_dist.config import SearchConfig
from llamagen_dist.config.search import FREE

LOWER_IS_BETTER = ("fid", "sfid", "fid_infinity", "kid_mean")
HIGHER_IS_BETTER = ("inception_score", "precision", "recall", "density", "coverage")
CONFIDENCE = 0.95
_UNGUIDED = 1.0


class Point(NamedTuple):
    """Settings of the sampler. Without guidance (scale 1) all schedules are one point."""

    guidance: str
    cfg_scale: float
    temperature: float
    top_k: int
    top_p: float

    @property
    def name(self) -> str:
        """As part of a file name; different for different points."""
        scale, temperature, top_p = (
            f"{x!r}".removesuffix(".0") for x in (self.cfg_scale, self.temperature, self.top_p)
        )
        return f"{self.guidance}_cfg-{scale}_t-{temperature}_k-{self.top_k}_p-{top_p}"

    @property
    def settings(self) -> dict[str, Any]:
        """Keys of the config that draw it. Of a guidance-free GPT the scale stands for its inverse, beta."""
        if self.guidance != FREE:
            return self._asdict()
        return self._asdict() | {"guidance": "constant", "cfg_scale": 1.0, "beta": round(1 / self.cfg_scale, 4)}

    def lies_on(self, curve: "Point") -> bool:
        """Whether this is a point of the curve; curve: one of ``curves``."""
        same = self.guidance == curve.guidance or self.cfg_scale == _UNGUIDED
        return same and self[2:] == curve[2:]


def curves(config: SearchConfig) -> list[Point]:
    """One per schedule, temperature, top-k and top-p, in the config's order, as its point without guidance."""
    others = [config.axis(name) for name in ("temperature", "top_k", "top_p")]
    return [Point(*values) for values in itertools.product(config.axis("guidance"), (_UNGUIDED,), *others)]


def grid(config: SearchConfig) -> list[Point]:
    """The coarse points, curve by curve with ascending scales."""
    every = (
        _canonical(config, curve._replace(cfg_scale=scale))
        for curve in curves(config)
        for scale in config.scales(curve.guidance)
    )
    return list(dict.fromkeys(every))


def _canonical(config: SearchConfig, point: Point) -> Point:
    """Without guidance a point belongs to the first schedule."""
    return point if point.cfg_scale > _UNGUIDED else point._replace(guidance=config.axis("guidance")[0])


def next_point(config: SearchConfig, measured: Mapping[Point, float]) -> Point | None:
    """What to measure after ``measured``; None where the search is over.

    measured: the value of ``config.metric`` (a mean over the seeds) at the points so far; their order does not matter.
    """
    coarse = grid(config)
    if left := [point for point in coarse if point not in measured]:
        return left[0]
    if len(measured) - len(coarse) >= config.finer:
        return None
    sign = 1 if config.metric in LOWER_IS_BETTER else -1
    lines = [
        (curve, sorted((p.cfg_scale, sign * value) for p, value in measured.items() if p.lies_on(curve)))
        for curve in curves(config)
    ]
    for curve, line in sorted(lines, key=lambda pair: min(value for _, value in pair[1])):
        if (scale := _refined(line, config.resolution)) is not None:
            return _canonical(config, curve._replace(cfg_scale=scale))
    return None


def _refined(line: Sequence[tuple[float, float]], resolution: float) -> float | None:
    """The next scale beside the lowest value; None where its neighbours are near enough.

    line: (scale, value) by ascending scale.
    """
    if len(line) < 2:
        return None
    scales = [scale for scale, _ in line]
    best = min(range(len(line)), key=lambda n: line[n][1])
    if best == len(line) - 1:
        return _round(2 * scales[-1] - scales[-2])
    if best == 0 and scales[0] > _UNGUIDED:
        return max(_UNGUIDED, _round(2 * scales[0] - scales[1]))
    beside = [line[n] for n in (best - 1, best + 1) if n >= 0]
    # the wider gap; of equal ones that towards the better neighbour
    other, _ = max(beside, key=lambda one: (_round(abs(one[0] - scales[best])), -one[1]))
    if abs(other - scales[best]) < 2 * resolution * (1 - 1e-9):
        return None
    return _round((other + scales[best]) / 2)


def _round(scale: float) -> float:
    return round(scale, 6)


@dataclass(frozen=True)
class Measured:
    """One point's results.

    values: metric -> one value per seed.
    replicates: FIDs of its pictures drawn again with replacement, the same pictures at every point; with one seed.
    """

    point: Point
    values: Mapping[str, Sequence[float]]
    replicates: Sequence[float] = field(default_factory=tuple)

    def mean(self, metric: str) -> float:
        return float(np.mean(self.values[metric]))

    def deviation(self, metric: str) -> float | None:
        """Over the seeds, or with one seed over the replicates; None where there is neither."""
        if (spread := self._spread(metric)) is None or len(spread) < 2:
            return None
        return float(np.std(spread, ddof=1))

    def _spread(self, metric: str) -> Sequence[float] | None:
        values = self.values[metric]
        return values if len(values) > 1 else self.replicates if metric == "fid" and len(self.replicates) else None

    def indistinct(self, other: "Measured", metric: str) -> bool | None:
        """Whether the difference to another point may be chance, at CONFIDENCE; None where nothing tells.

        Noise and classes are shared, so the differences themselves are looked at, seed by seed (Student's t) or
        replicate by replicate (normal): they vary less than the values do.
        """
        mine, theirs = self._spread(metric), other._spread(metric)
        if mine is None or theirs is None or len(mine) < 2:
            return None
        deviation = float(np.std(np.subtract(theirs, mine), ddof=1))
        upper = (1 + CONFIDENCE) / 2
        allowed = ndtri(upper) * deviation
        if len(self.values[metric]) > 1:
            allowed = stdtrit(len(mine) - 1, upper) * deviation / len(mine) ** 0.5
        return bool(abs(other.mean(metric) - self.mean(metric)) <= allowed)


def summary(config: SearchConfig, results: Iterable[Measured]) -> dict[str, Any]:
    """Everything of ``search.json`` that follows from the results, in the order in which they were measured."""
    every = list(results)
    coarse = set(grid(config))
    metrics = [metric for metric in every[0].values if metric in (*LOWER_IS_BETTER, *HIGHER_IS_BETTER)]
    points = [
        {
            "name": one.point.name,
            **one.point._asdict(),
            "stage": "coarse" if one.point in coarse else "finer",
            "scores": {
                metric: {"mean": one.mean(metric), "sd": one.deviation(metric), "values": list(one.values[metric])}
                for metric in metrics
            },
        }
        for one in every
    ]
    best = {}
    for metric in metrics:
        sign = 1 if metric in LOWER_IS_BETTER else -1
        ranked = sorted(every, key=lambda one: sign * one.mean(metric))
        alike = [ranked[0].indistinct(other, metric) for other in ranked[1:]]
        best[metric] = {
            "name": ranked[0].point.name,
            **ranked[0].point._asdict(),
            "mean": ranked[0].mean(metric),
            "sd": ranked[0].deviation(metric),
            "indistinct": None
            if None in alike
            else [other.point.name for other, same in zip(ranked[1:], alike, strict=True) if same],
        }
    lines = [
        {"guidance": curve.guidance, "temperature": curve.temperature, "top_k": curve.top_k, "top_p": curve.top_p}
        | {"points": [one.point.name for one in sorted(every, key=lambda one: one.point) if one.point.lies_on(curve)]}
        for curve in curves(config)
    ]
    bands = f"over {len(config.noises)} seeds" if len(config.noises) > 1 else ""
    if not bands and any(len(one.replicates) for one in every):
        bands = f"of the FID over {config.bootstrap} bootstrap replicates of the pictures"
    return {
        "metric": config.metric,
        "n": config.images,
        "sd": bands or None,
        "best": best,
        "curves": lines,
        "points": points,
    }
