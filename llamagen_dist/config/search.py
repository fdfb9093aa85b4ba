"""``kind: search``: which settings of the sampler are tried, on how many pictures, and what the best one is best in."""

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import Field

from llamagen_dist.config.evaluate import (
    DrawSection,
    Guidance,
    InceptionScoreSplits,
    InceptionSection,
    Manifold,
    Metric,
)
from llamagen_dist.config.section import CountInt, Pictures, PositiveFloat, PositiveInt, Section, Threads, nearest

SCHEDULES: tuple[str, ...] = get_args(Guidance)
FREE = "free"
"""The guidance of points that are drawn with a beta."""
Scales = tuple[Annotated[float, Field(ge=1)], ...]
_MEASURED_BY = {
    **dict.fromkeys(("precision", "recall"), "precision_recall"),
    **dict.fromkeys(("density", "coverage"), "density_coverage"),
    "kid_mean": "kid",
}


class GridSection(Section):
    """The axes of the coarse grid. One that is left out has one value, that of the config's key of this name."""

    cfg_scale: Scales = (1.0, 1.5, 2.0, 2.5, 3.0)
    """Scales of classifier-free guidance; 1 is none, where all schedules are one point."""
    cfg_scale_of: dict[str, Scales] | None = None
    """Those of a schedule that needs others, as in ``{power-cosine: [1, 4, 8, 16]}``."""
    beta: tuple[Annotated[float, Field(gt=0, le=1)], ...] | None = Field(default=None, exclude_if=lambda b: b is None)
    """Of a GPT with ``model.guidance: free``: takes the place of ``cfg_scale``, with 1 / beta as the scale."""
    guidance: tuple[str, ...] | None = None
    """Schedules: constant, linear, power-cosine, step."""
    temperature: tuple[Annotated[float, Field(ge=0)], ...] | None = None
    top_k: tuple[CountInt, ...] | None = None
    top_p: tuple[Annotated[float, Field(gt=0, le=1)], ...] | None = None

    def rules(self) -> Iterator[str]:
        axes: dict[str, Any] = {key: value for key, value in self.__dict__.items() if key != "cfg_scale_of"}
        axes |= {f"cfg_scale_of.{schedule}": values for schedule, values in (self.cfg_scale_of or {}).items()}
        for key, values in axes.items():
            yield from unlike(key, values)
        for key, names in (("guidance", self.guidance or ()), ("cfg_scale_of", self.cfg_scale_of or ())):
            for name in names:
                if name not in SCHEDULES:
                    yield f"{key}: {name!r} is no schedule; {nearest(name, SCHEDULES)}"


def unlike(key: str, values: tuple[Any, ...] | None) -> Iterator[str]:
    """What is wrong with a list of values to try, None being no list at all."""
    if values is not None and not values:
        yield f"{key}: [] leaves nothing to try; give at least one value"
    for value in dict.fromkeys(value for value in values or () if values and values.count(value) > 1):
        yield f"{key}: {value} stands there twice"


class SearchConfig(DrawSection):
    """``kind: search``, read by ``eval.search``."""

    kind: Literal["search"]  # type: ignore[assignment]
    reference: Path
    """The real images, or their statistics, that every point is compared with, as ``kind: evaluate`` takes them. Their
    features are computed once."""
    out: Path
    """Folder for points/NAME.json, search.json, search.md and search.png."""
    images: Pictures = 5000
    """Pictures of every point and seed; samples of one number share their class and their noise at all points. So many
    images are taken of the reference too, where it is no file of statistics."""
    grid: GridSection = GridSection()
    metric: Literal["fid", "sfid", "kid_mean", "inception_score", "precision", "recall", "density", "coverage"] = "fid"
    """What the finer points look for the best value of: the lowest FID, sFID or KID, the highest of the others."""
    metrics: Annotated[tuple[Metric, ...], Field(min_length=1)] = ("fid", "sfid", "precision_recall", "inception_score")
    """What is measured at every point. The Inception Score is absent without ``inception.weights`` that have logits."""
    finer: CountInt = 8
    """At most so many points after the grid, each halving the distance to a neighbour of the best scale (or one step
    beyond it, where the best scale is the end of its axis)."""
    resolution: PositiveFloat = 0.05
    """Halving brings no two scales of a curve nearer to each other than this."""
    seeds: tuple[Annotated[int, Field(ge=0, lt=1 << 31)], ...] | None = None
    """Every point is measured with the noise of each, which gives a mean and a deviation. Empty: ``seed`` alone."""
    bootstrap: CountInt = 50
    """With one seed: how often the pictures of a point are drawn again, with replacement, for the band of its FID."""
    keep: PositiveInt = 20000
    """So many pictures at most give features to KID, precision, recall and the bootstrap."""
    resize_to: PositiveInt | None = None
    """Larger pictures are scaled down to this before they are scored, as ``kind: evaluate`` does."""
    manifold: Manifold = "exact"
    inception_score: InceptionScoreSplits = "whole"
    inception: InceptionSection = InceptionSection()
    threads: Threads = None

    def axis(self, name: str) -> tuple[Any, ...]:
        """The values of an axis, in the grid's order, or the one that the config's own key has."""
        if name == "guidance" and self.grid.beta is not None:
            return (FREE,)
        values: tuple[Any, ...] | None = getattr(self.grid, name)
        return (getattr(self, name),) if values is None else values

    def scales(self, schedule: str) -> Scales:
        """The coarse scales of a schedule, ascending."""
        if self.grid.beta is not None:
            return tuple(sorted(round(1 / beta, 4) for beta in self.grid.beta))
        return tuple(sorted((self.grid.cfg_scale_of or {}).get(schedule, self.grid.cfg_scale)))

    @property
    def noises(self) -> tuple[int, ...]:
        return (self.seed,) if self.seeds is None else self.seeds

    def guidances(self) -> Iterator[tuple[float, float | None]]:
        if self.grid.beta is not None:
            yield from ((1.0, beta) for beta in self.grid.beta)
        else:
            yield from ((scale, self.beta) for name in self.axis("guidance") for scale in self.scales(name))

    def rules(self) -> Iterator[str]:
        yield from super().rules()
        yield from unlike("seeds", self.seeds)
        if self.grid.beta is not None and (self.grid.guidance or self.grid.cfg_scale_of):
            yield "grid.beta: has no schedule; leave out grid.guidance and grid.cfg_scale_of"
        schedules = self.axis("guidance")
        for schedule in self.grid.cfg_scale_of or ():
            if schedule not in schedules:
                yield f"grid.cfg_scale_of: {schedule} is not among the schedules, {', '.join(schedules)} (or null)"
        if self.cfg_interval >= 0 and set(schedules) - {FREE} != {"constant"}:
            yield f"cfg_interval: {self.cfg_interval} belongs to guidance: constant, not to {', '.join(schedules)}"
        if self.finer and all(len(self.scales(schedule)) < 2 for schedule in schedules):
            yield (
                f"finer: {self.finer} finer points need a coarse axis; give grid.cfg_scale at least two values, or set "
                "finer=0"
            )
        if (needed := _MEASURED_BY.get(self.metric, self.metric)) not in self.metrics:
            yield f"metric: {self.metric} is not measured; add {needed} to metrics"
        if "class_agreement" in self.metrics:
            yield "metrics: class_agreement needs a classifier, which a search does not train; leave it out"
        if self.bootstrap == 1:
            yield "bootstrap: 1 replicate has no deviation; give more, or 0 for no band"
        for metric in sorted({"fd_dinov2", "clip_score"} & set(self.metrics)):
            yield f"metrics: {metric} is measured by eval.evaluate alone; leave it out"
        if self.images < 2:
            yield f"images: {self.images} is no distribution; give at least two"
        if self.tensor > 1:
            yield "tensor: each rank draws alone here, so the GPT must fit on one; set tensor=1"
