"""A tokenizer's codebook and its discriminator as figures: which codes are in use, where they lie, who is winning."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llamagen_dist.report.blocks import Block, Colour, Figure, Panel, Series, Style
from llamagen_dist.report.collect import Run
from llamagen_dist.report.figures import share, thin

Floats = NDArray[np.float64]
MOST_CODES = 3000
"""Points of a map: more would make a large file and no clearer picture."""
# Bounds of a code's use, as multiples of the average, and what the classes between them are called.
_BOUNDS = (0.25, 1.0, 4.0)
_CLASSES = ("below ¼ of the average", "¼ to 1", "1 to 4", "above 4 times the average")


@dataclass(frozen=True)
class Use:
    """How evenly held-out images used the codes. images_seen: when in training."""

    images_seen: int
    codes: int
    tokens: int
    used: int
    perplexity: float

    @property
    def dead(self) -> int:
        return self.codes - self.used

    @property
    def most_bits(self) -> float:
        return float(np.log2(self.codes))

    @property
    def bits(self) -> float:
        """Entropy of one code: what an ideal coder without context would need."""
        return float(np.log2(self.perplexity)) if self.perplexity else 0.0


def part(run: Run | None) -> tuple[dict[str, Any], dict[str, Block | None]]:
    """What the section reads, and the figures; each is None where the run has not logged it."""
    if run is None:
        return {}, {}
    counts = run.codebook.get("counts")
    known = counts is not None and bool(counts.sum())
    blocks: dict[str, Block | None] = {"health": health(run), "adversary": adversary(run)}
    if known:
        blocks |= {"usage": usage(run.codebook["counts"]), "codes": codes(run.codebook)}
    facts = {
        "use": use(run.codebook) if known else None,
        "has_health": blocks["health"] is not None,
        "has_training": len(run.points("train_usage")[0]) > 0,
        "has_adversary": blocks["adversary"] is not None,
    }
    return facts, blocks


def use(codebook: Mapping[str, NDArray[Any]]) -> Use:
    counts = codebook["counts"]
    p = counts[counts > 0] / counts.sum()
    perplexity = float(np.exp(-(p * np.log(p)).sum()))
    return Use(int(codebook["images_seen"]), len(counts), int(counts.sum()), len(p), perplexity)


def usage(counts: NDArray[np.int64]) -> Figure:
    """Counts of the codes, the most frequent first; shaded: those that never occurred."""
    ranked = np.sort(counts)[::-1].astype(np.float64)
    used = int((ranked > 0).sum())
    x = np.arange(1, len(ranked) + 1, dtype=np.float64)
    even = ranked.sum() / len(ranked)
    series = (
        Series("all alike", x[[0, -1]], np.array([even, even]), "dashed", "soft"),
        Series("tokens", *thin(x[:used], ranked[:used], log=False), "line"),
    )
    dead = len(ranked) - used
    legend: tuple[tuple[str, Colour], ...] = ((f"{dead:,} dead (shaded)", "blue"),) if dead else ()
    panel = Panel("how often a code was chosen", series, log_y=True, legend=legend)
    alt = f"Sorted counts of {len(ranked)} codes; {dead} never occurred"
    shaded = (float(used), float(len(ranked))) if dead else None
    caption = "Codes of the held-out images, the most frequent first. Dashed: if all were used alike."
    return Figure((panel,), alt, "codes by rank", caption=caption, shaded=shaded)


def codes(codebook: Mapping[str, NDArray[Any]]) -> Figure | None:
    """A table's codes on a plane, or the levels of the channels of a quantizer without one."""
    if "levels" in codebook:
        return _levels(codebook["counts"], codebook["levels"])
    return _map(codebook["counts"], codebook["map"], codebook["explained"]) if "map" in codebook else None


def _map(counts: NDArray[np.int64], flat: NDArray[np.float32], explained: Floats) -> Figure:
    """counts: [K]. flat: [K, 2]. explained: the share of the variance along either axis."""
    step = -(-len(counts) // MOST_CODES)
    shown, times = flat[::step].astype(np.float64), counts[::step] / counts.mean()
    kinds = np.where(times > 0, np.digitize(times, _BOUNDS), -1)  # -1: never used
    series, legend = [], []
    for kind, name in enumerate(("never used", *_CLASSES), -1):
        here = shown[kinds == kind]
        colour: Colour = "orange" if kind < 0 else share(kind, len(_CLASSES))
        series.append(Series(name, here[:, 0], here[:, 1], "crosses" if kind < 0 else "points", colour))
        if len(here):
            legend.append((name, colour))
    low, high = float(shown[:, 1].min()), float(shown[:, 1].max())
    low, high = low - 0.05 * (high - low or 1.0), high + 0.05 * (high - low or 1.0)
    limits = low, high + 0.1 * len(legend) * (high - low)  # the legend's lines
    panel = Panel("second direction", tuple(series), y_range=limits, legend=tuple(legend))
    some = f" One in {step} of {len(counts):,} codes." if step > 1 else ""
    caption = (
        f"The codes in the two directions in which they vary most ({explained.sum():.0%} of their variance), coloured "
        f"by how often held-out images chose them.{some}"
    )
    return Figure((panel,), f"A map of {len(shown)} codes by use", "first direction", caption=caption)


def _levels(counts: NDArray[np.int64], levels: NDArray[np.int64]) -> Figure:
    """How often each level of each channel occurred, as a multiple of even use."""
    every, below = np.arange(len(counts)), np.cumprod(levels) // levels
    most = int(levels.max())
    columns: list[list[tuple[float, float]]] = [[] for _ in range(most)]  # by level, from the lowest on
    for channel, count in enumerate(levels.tolist()):
        times = np.bincount(every // below[channel] % count, counts, count) / counts.sum() * count
        for level, value in enumerate(times):
            columns[round(level * (most - 1) / (count - 1)) if count > 1 else 0].append((channel, value))
    even = Series("all alike", np.array([-0.5, len(levels) - 0.5]), np.ones(2), "dashed", "soft")
    series = [even]
    for number, column in enumerate(columns):
        x, y = np.array(column, np.float64).reshape(-1, 2).T
        series.append(Series(f"level {number + 1} of {most}", x, y, "dots", share(number, most)))
    legend: tuple[tuple[str, Colour], ...] = (("lowest level", 0.0), ("highest level", 1.0))
    top = max(float(np.concatenate([s.y for s in series]).max()), 1.0)
    panel = Panel("use of a level (1: all alike)", tuple(series), y_range=(-0.05 * top, 1.35 * top), legend=legend)
    alt = f"Use of the levels of {len(levels)} channels"
    caption = "How often held-out images chose each level of each channel, as a multiple of even use. At 0: never."
    return Figure((panel,), alt, "channels, with their levels", caption=caption, ticks=tuple(map(str, levels.tolist())))


def health(run: Run) -> Figure | None:
    """Usage, perplexity and revived codes over training; None where at most one value is known of each."""
    size = run.config.model.codebook_size if run.config is not None else None
    panels = []
    window, held_out = run.points("train_usage"), run.points("codebook_usage")
    lines = _series("training", window, "line", "blue", "training")
    if lines := lines + _series("held out", held_out, "dotted line", "orange", "held out"):
        panels.append(Panel("share of the codes in use", lines, y_range=(0.0, 1.05)))
    lines = _series("training, perplexity", run.points("train_perplexity"), "line", "blue", "training")
    even = run.points("codebook_perplexity")
    if lines := lines + _series("held out, perplexity", even, "dotted line", "orange", "held out"):
        limit = None if size is None else (0.0, 1.05 * size)
        note = "" if size is None else f"of {size:,} codes"
        panels.append(Panel("perplexity of the codes", lines, y_range=limit, note=note))
    for key, title in (
        ("train_starved", "share of starved codes"),
        ("train_narrowest", "use of the narrowest channel"),
        ("revived", "codes revived since the last line"),
    ):
        if lines := _series(title, run.points(key), "thin", "green"):
            panels.append(Panel(title, lines))
    if not panels:
        return None
    return Figure(tuple(panels), f"Use of the codebook of {run.name} against images seen", "images seen")


def adversary(run: Run) -> Figure | None:
    """Logits of real images and of reconstructions, the discriminator's loss, the adaptive weight; None without any."""
    panels = []
    lines = _series("logits of real images", run.points("logits_real"), "line", "blue", "real")
    if lines := lines + _series("logits of reconstructions", run.points("logits_fake"), "line", "orange", "fake"):
        panels.append(Panel("mean logits", lines))
    for key, title, log_y in (
        ("discriminator", "discriminator's loss", False),
        ("adaptive_weight", "adaptive weight", True),
        ("r1", "R1 penalty", True),
        ("lecam", "LeCAM penalty", False),
    ):
        if lines := _series(title, run.points(key), "thin", "green"):
            panels.append(Panel(title, lines, log_y=log_y and bool((lines[0].y > 0).all())))
    if not panels:
        return None
    alt = f"The discriminator of {run.name} against images seen"
    return Figure(tuple(panels), alt, "images seen")


def _series(
    name: str, points: tuple[Floats, Floats], style: Style, colour: Colour, label: str = ""
) -> tuple[Series, ...]:
    """One line of at least two points, else none."""
    return (Series(name, *thin(*points, log=False), style, colour, label),) if len(points[0]) > 1 else ()
