"""The plots of a report, each drawn from plain numbers that stay with it as data."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from llamagen_dist.report import canvas as c
from llamagen_dist.report.blocks import Figure
from llamagen_dist.report.quantities import count, small

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Curve:
    """One run: x and y of its training loss, and of its held-out loss (``marks``), all 1-d float64."""

    name: str
    x: Floats
    y: Floats
    marks_x: Floats
    marks_y: Floats

    def data(self) -> dict[str, object]:
        return {
            "name": self.name,
            "x": self.x.tolist(),
            "loss": self.y.tolist(),
            "validation_x": self.marks_x.tolist(),
            "val_loss": self.marks_y.tolist(),
        }


def smooth(y: Floats, window: int) -> Floats:
    """Centred running mean; the window shrinks symmetrically towards both ends. Same length as y."""
    if len(y) == 0 or window < 2:
        return y
    total = np.concatenate([[0.0], np.cumsum(y)])
    at = np.arange(len(y))
    half = np.minimum(np.minimum(at, len(y) - 1 - at), window // 2)
    return (total[at + half + 1] - total[at - half]) / (2 * half + 1)


def _thin(x: Floats, y: Floats, most: int = 600) -> tuple[Floats, Floats]:
    """Means of neighbours, so that a long run does not make a large file; evenly spaced on a log x axis."""
    if len(x) <= most:
        return x, y
    edges = np.unique(np.concatenate([[0], np.geomspace(1, len(x), most).astype(int)]))
    sizes = np.diff(edges)
    return np.add.reduceat(x, edges[:-1]) / sizes, np.add.reduceat(y, edges[:-1]) / sizes


def ladder_curves(curves: Sequence[Curve], x_label: str, caption: str = "", format: c.Format = "svg") -> Figure:
    """Training loss (thin), its running mean, and held-out loss (dots) of runs sorted from small to large."""
    colours: dict[str, str] = {}
    with c.canvas([1], 3.5) as (drawing, (axes,)):
        ends, all_x, settled = [], [], []
        for number, curve in enumerate(curves):
            light, dark = c.ramp(number, len(curves))
            colours[light] = dark
            shown = (curve.x > 0) & np.isfinite(curve.y)
            x, y = curve.x[shown], curve.y[shown]
            marks = (curve.marks_x > 0) & np.isfinite(curve.marks_y)
            mx, my = curve.marks_x[marks], curve.marks_y[marks]
            axes.plot(*_thin(x, y), color=light, linewidth=0.6, alpha=0.28)
            axes.plot(*_thin(x, smooth(y, max(3, len(y) // 25))), color=light)
            axes.plot(
                mx,
                my,
                linestyle="none",
                marker="o",
                markersize=6,
                color=light,
                markeredgecolor=c.PAPER,
                markeredgewidth=1.3,
                zorder=5,
            )
            all_x += [*x, *mx]
            settled += [*smooth(y, max(3, len(y) // 25))[len(y) // 50 :], *my]
            tail = (mx[-1], my[-1]) if len(mx) else (x[-1], y[-1]) if len(x) else None
            if tail:
                ends.append((*tail, curve.name, light))
        if all_x:
            axes.set_xscale("log")
            c.log_axis(axes.xaxis, min(all_x), max(all_x))
            low, high = min(settled), max(settled)
            room = 0.06 * (high - low) or 0.1
            axes.set_ylim(low - room, high + room)
        c.linear_axis(axes.yaxis)
        axes.set_xlabel(x_label)
        c.title(axes, "loss (nats per token)")
        c.label_ends(axes, ends)
        alt = "Loss against " + x_label + " for " + ", ".join(curve.name for curve in curves)
        return c.finish(drawing, alt, caption, {"curves": [curve.data() for curve in curves]}, format, colours)


def loss_against_size(
    lines: Mapping[float, Sequence[tuple[float, float]]],
    unit: str,
    caption: str = "",
    format: c.Format = "svg",
) -> Figure:
    """lines: budget -> (parameters, held-out loss) of each rung; unit: what a budget counts (``tokens``)."""
    colours: dict[str, str] = {}
    with c.canvas([1], 3.5) as (drawing, (axes,)):
        ends, xs = [], [p for points in lines.values() for p, _ in points]
        axes.set_xscale("log")
        for number, (budget, points) in enumerate(sorted(lines.items())):
            light, dark = c.ramp(number, len(lines))
            colours[light] = dark
            x, y = zip(*sorted(points), strict=True)
            axes.plot(x, y, color=light, marker="o", markersize=6.5, markeredgecolor=c.PAPER, markeredgewidth=1.3)
            ends.append((x[-1], y[-1], f"{count(budget)} {unit}", light))
        if xs:
            axes.set_xlim(min(xs) / 1.35, max(xs) * 1.35)
            c.log_axis(axes.xaxis, min(xs), max(xs))
        axes.margins(y=0.12)
        c.linear_axis(axes.yaxis)
        axes.set_xlabel("parameters")
        c.title(axes, "validation loss (nats per token)")
        c.label_ends(axes, ends)
        data = {
            "unit": unit,
            "lines": [{"budget": b, "points": [list(p) for p in sorted(v)]} for b, v in sorted(lines.items())],
        }
        alt = f"Validation loss against parameters, one line for each of {len(lines)} training budgets"
        return c.finish(drawing, alt, caption, data, format, colours)


def tensor_parallel(
    steps: Floats,
    whole: Floats,
    split: Floats,
    window: int,
    names: tuple[str, str],
    caption: str = "",
    format: c.Format = "svg",
) -> Figure:
    """Two training losses at the same steps, and |their difference| on a log axis. All float64 [steps].

    The first ``window`` steps are shaded. Exact agreement has no logarithm: such steps are left out below.
    """
    gap = np.abs(split - whole)
    with c.canvas([1.25, 1], 4.6) as (drawing, (above, below)):
        above.plot(*_even(steps, whole), color=c.BLUE, linewidth=3.6, alpha=0.45)
        above.plot(*_even(steps, split), color=c.ORANGE, linewidth=1.1)
        c.title(above, "training loss (nats per token)")
        c.linear_axis(above.yaxis, 4)
        c.legend(above, list(zip(names, (c.BLUE, c.ORANGE), strict=True)))
        shown = gap > 0
        if shown.any():
            below.set_yscale("log")
            below.plot(steps[shown], gap[shown], color=c.INK, linewidth=0.8, marker="." if len(gap) < 30 else "")
            below.set_ylim(gap[shown].min() / 2.5, gap[shown].max() * 6)
            c.log_axis(below.yaxis, *below.get_ylim())
            first = gap[steps <= window]
            if len(first) and first.max() > 0:
                worst = steps[steps <= window][first.argmax()]
                below.plot([worst], [first.max()], marker="o", markersize=6, color=c.ORANGE, markeredgecolor=c.PAPER)
                below.text(
                    0.02,
                    0.95,
                    f"largest in the first {window}: {small(float(first.max()))}",
                    transform=below.transAxes,
                    va="top",
                    fontsize=9,
                    color=c.INK,
                )
        else:
            below.text(0.5, 0.5, "no difference at any step", transform=below.transAxes, ha="center", color=c.SOFT)
            below.set_yticks([])
        for axes in (above, below):
            axes.axvspan(float(steps.min()), float(min(window, steps.max())), color=c.BLUE, alpha=0.08, linewidth=0)
        c.title(below, "|difference| (nats per token)")
        c.linear_axis(below.xaxis)
        below.set_xlabel("optimizer step")
        data = {"steps": steps.tolist(), names[0]: whole.tolist(), names[1]: split.tolist(), "window": window}
        alt = f"Training loss of {names[0]} and {names[1]} overlaid, and the absolute difference below"
        return c.finish(drawing, alt, caption, data, format)


def _even(x: Floats, y: Floats, most: int = 800) -> tuple[Floats, Floats]:
    """Every k-th point, for a linear axis; both curves of a comparison lose the same ones."""
    return x[:: max(1, -(-len(x) // most))], y[:: max(1, -(-len(x) // most))]


def bars(
    names: Sequence[str],
    values: Sequence[float],
    labels: Sequence[str],
    heading: str,
    colour: str = c.BLUE,
    caption: str = "",
    format: c.Format = "svg",
) -> Figure:
    """Horizontal bars, first on top, each with its value in words at its end."""
    with c.canvas([1], 0.55 + 0.34 * max(1, len(names))) as (drawing, (axes,)):
        places = np.arange(len(names))
        axes.barh(places, values, height=0.62, color=colour, linewidth=0)
        axes.set_yticks(places, [c.shorten(name, 24) for name in names], color=c.INK)
        axes.set_ylim(len(names) - 0.4, -0.6)
        axes.set_xlim(0, max([*values, 1e-9]) * 1.28)
        for place, value, label in zip(places, values, labels, strict=True):
            axes.annotate(
                label,
                (value, place),
                xytext=(5, 0),
                textcoords="offset points",
                va="center",
                fontsize=9,
                color=c.INK,
            )
        axes.grid(visible=False)
        axes.set_xticks([])
        axes.spines["bottom"].set_visible(False)
        c.title(axes, heading)
        data = {"names": list(names), "values": list(values)}
        alt = heading + ": " + ", ".join(f"{n} {t}" for n, t in zip(names, labels, strict=True))
        return c.finish(drawing, alt, caption, data, format)


def tokenizer_curves(
    curve: Curve,
    psnr: Sequence[tuple[float, float]],
    events: Sequence[tuple[float, str]] = (),
    caption: str = "",
    format: c.Format = "svg",
) -> Figure:
    """Training loss (log y) with held-out loss, and held-out PSNR below if it was measured more than once.

    psnr: (images seen, dB). events: (images seen, what begins there).
    """
    twice = len(psnr) > 1
    with c.canvas([1.5, 1] if twice else [1], 4.6 if twice else 3.4) as (drawing, panels):
        axes = panels[0]
        good = np.isfinite(curve.y) & (curve.y > 0)
        x, y = curve.x[good], curve.y[good]
        axes.plot(*_even(x, y), color=c.BLUE, linewidth=0.6, alpha=0.3)
        axes.plot(*_even(x, smooth(y, max(3, len(y) // 25))), color=c.BLUE)
        marks = np.isfinite(curve.marks_y) & (curve.marks_y > 0)
        axes.plot(
            curve.marks_x[marks],
            curve.marks_y[marks],
            linestyle="none",
            marker="o",
            markersize=6,
            color=c.ORANGE,
            markeredgecolor=c.PAPER,
            markeredgewidth=1.3,
        )
        if len(y):
            axes.set_yscale("log")
            c.log_axis(axes.yaxis, float(y.min()), float(y.max()))
        c.title(axes, curve.name)
        c.legend(axes, [("training", c.BLUE), *([("held-out", c.ORANGE)] if marks.any() else [])])
        for at, text in events:
            for panel in panels:
                panel.axvline(at, color=c.SOFT, linewidth=0.9, linestyle=(0, (3, 3)))
            axes.annotate(
                text,
                (at, 0.6),
                xycoords=("data", "axes fraction"),
                xytext=(5 if at < 0.6 * x.max() else -5, 0),
                textcoords="offset points",
                ha="left" if at < 0.6 * x.max() else "right",
                fontsize=8.5,
                color=c.SOFT,
                bbox={"facecolor": c.PAPER, "alpha": 0.85, "linewidth": 0, "pad": 1.5},
            )
        if twice:
            panels[1].plot(*zip(*psnr, strict=True), color=c.ORANGE, marker="o", markersize=5)
            panels[1].margins(y=0.15)
            c.linear_axis(panels[1].yaxis, 4)
            c.title(panels[1], "held-out PSNR (dB)")
        c.linear_axis(panels[-1].xaxis)
        panels[-1].set_xlabel("images seen")
        data = {**curve.data(), "psnr": [list(p) for p in psnr], "events": [list(e) for e in events]}
        return c.finish(drawing, "Tokenizer loss against images seen", caption, data, format)
