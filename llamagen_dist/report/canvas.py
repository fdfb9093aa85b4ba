"""How every plot of a report looks, and how a drawn one becomes a Figure block."""

import io
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_hex
from matplotlib.figure import Figure as Drawing
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter, NullLocator

from llamagen_dist.report.blocks import Figure
from llamagen_dist.report.quantities import tick
from llamagen_dist.report.style import FONT, THEME

Format = Literal["svg", "png"]
INK, SOFT, RULE, PAPER = (THEME[name][0] for name in ("ink", "soft", "rule", "paper"))
BLUE, ORANGE, GREEN = (THEME[name][0] for name in ("blue", "orange", "green"))
WIDTH = 4.7  # inches; as wide as a phone's screen in CSS pixels, so that 9.5 pt stays readable there

_STYLE = {
    "font.family": "DejaVu Sans",
    "font.size": 9.5,
    "axes.titlesize": 9.5,
    "axes.labelsize": 9.5,
    "xtick.labelsize": 9,
    "ytick.labelsize": 9,
    "text.color": INK,
    "axes.labelcolor": SOFT,
    "xtick.color": SOFT,
    "ytick.color": SOFT,
    "axes.edgecolor": RULE,
    "grid.color": RULE,
    "axes.grid": True,
    "grid.linewidth": 0.7,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "xtick.major.size": 3,
    "ytick.major.size": 0,
    "lines.linewidth": 1.8,
    "lines.solid_capstyle": "round",
    "lines.solid_joinstyle": "round",
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "savefig.facecolor": "none",
    "svg.fonttype": "none",
    "svg.hashsalt": "llamagen",
    "text.parse_math": False,
    "axes.formatter.use_mathtext": False,
    "legend.frameon": False,
}

# (smallest span in decades, where a decade is marked)
_LOG_STEPS = (
    (2.5, (1.0,)),
    (1.4, (1.0, 3.0)),
    (0.7, (1.0, 2.0, 5.0)),
    (0.0, (1.0, 1.5, 2.0, 3.0, 4.0, 5.0, 7.0)),
)


@contextmanager
def canvas(rows: Sequence[float], height: float) -> Iterator[tuple[Drawing, list[Axes]]]:
    """A drawing of stacked axes that share x; ``rows``: their relative heights; ``height`` in inches."""
    with matplotlib.rc_context(_STYLE):  # type: ignore[arg-type, unused-ignore]
        drawing = Drawing(figsize=(WIDTH, height), layout="constrained")
        FigureCanvasAgg(drawing)
        grid = drawing.subplots(len(rows), 1, sharex=True, squeeze=False, height_ratios=list(rows))
        yield drawing, list(grid[:, 0])


def ramp(number: int, of: int) -> tuple[str, str]:
    """(light, dark) colours of series ``number`` of an ordered family: perceptually even, colour-blind
    safe, and the largest member stands out most on either page."""
    share = number / (of - 1) if of > 1 else 1.0
    viridis = matplotlib.colormaps["viridis"]
    return to_hex(viridis(0.66 - 0.62 * share)), to_hex(viridis(0.42 + 0.5 * share))


def log_axis(axis: Any, low: float, high: float) -> None:
    """Ticks in plain words (20k, 10⁻³) and enough of them even where the data span less than a decade."""
    decades = np.log10(high / low) if high > low > 0 else 0.0
    steps = next(steps for span, steps in _LOG_STEPS if decades >= span)
    axis.set_major_locator(LogLocator(subs=steps, numticks=7))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda value, _: tick(value)))
    axis.set_minor_formatter(NullFormatter())


def linear_axis(axis: Any, ticks: int = 5) -> None:
    axis.set_major_locator(MaxNLocator(ticks, steps=[1, 2, 2.5, 5, 10]))
    axis.set_major_formatter(FuncFormatter(lambda value, _: tick(value)))


def title(axes: Axes, text: str) -> None:
    """What the y axis shows, written above it where it can be read without turning the head."""
    axes.set_title(text, loc="left", color=INK, pad=8, x=0)


def label_ends(axes: Axes, labels: Sequence[tuple[float, float, str, str]]) -> None:
    """(x, y, text, colour): names written right of the lines' ends, moved apart where they would overlap."""
    if not labels:
        return
    axes.autoscale_view()  # else the transform below still has yesterday's limits
    gap = 11.5 / (axes.get_window_extent().height * 72 / axes.figure.dpi * 0.9)  # of the axes' height, in points
    places = sorted(
        (
            (axes.transAxes.inverted().transform(axes.transData.transform((x, y)))[1], text, colour)
            for x, y, text, colour in labels
        ),
        key=lambda place: place[0],
    )
    heights = [place[0] for place in places]
    for _ in range(200):  # relax: push close neighbours apart, keep all on the canvas
        for i in range(len(heights) - 1):
            short = gap - (heights[i + 1] - heights[i])
            if short > 0:
                heights[i] -= short / 2
                heights[i + 1] += short / 2
        heights[0] = max(heights[0], 0.0)
        heights[-1] = min(heights[-1], 1.0)
    for at, (_, text, colour) in zip(heights, places, strict=True):
        axes.text(
            1.015,
            at,
            shorten(text),
            transform=axes.transAxes,
            color=colour,
            va="center",
            ha="left",
            fontsize=9,
            fontweight="bold",
            clip_on=False,
        )


def legend(axes: Axes, entries: Sequence[tuple[str, str]]) -> None:
    """(text, colour), one below the other in the upper right corner, where falling curves leave room."""
    for line, (text, colour) in enumerate(entries):
        axes.annotate(
            shorten(text, 40),
            (0.985, 0.95),
            xycoords="axes fraction",
            xytext=(0, -13 * line),
            textcoords="offset points",
            color=colour,
            ha="right",
            va="top",
            fontsize=9,
            fontweight="bold",
        )


def shorten(text: str, most: int = 20) -> str:
    plain = "".join(c for c in text if c.isprintable() or c.isspace())
    return plain if len(plain) <= most else plain[: most - 1] + "…"


def finish(
    drawing: Drawing,
    alt: str,
    caption: str,
    data: Mapping[str, Any],
    format: Format,
    colours: Mapping[str, str] | None = None,
) -> Figure:
    """Encode. SVG follows the reader's light or dark page; ``colours``: the drawing's extra colours,
    light -> dark. PNG is the light page's, at twice the size."""
    size = (round(drawing.get_size_inches()[0] * 96), round(drawing.get_size_inches()[1] * 96))
    buffer = io.BytesIO()
    if format == "png":
        drawing.savefig(buffer, format="png", dpi=192, facecolor=PAPER)
        return Figure(buffer.getvalue(), "png", size, alt, caption, data)
    drawing.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    svg = buffer.getvalue().decode()
    svg = svg[svg.index("<svg") :]  # without the DOCTYPE and its address
    svg = svg.replace("'DejaVu Sans'", FONT.replace('"', "'"))
    dark = {light: night for light, night in THEME.values()} | dict(colours or {})
    names = {light: f"--c{number}" for number, light in enumerate(dark)}
    svg = re.sub(
        r"((?:fill|stroke): ?)(#[0-9a-f]{6})",
        lambda found: f"{found[1]}var({names[found[2]]})" if found[2] in names else found[0],
        svg,
    )
    day = ";".join(f"{name}:{light}" for light, name in names.items())
    night = ";".join(f"{name}:{dark[light]}" for light, name in names.items())
    rules = f"<style>:root{{{day}}}@media(prefers-color-scheme:dark){{:root{{{night}}}}}</style>"
    head = svg.index(">") + 1
    return Figure((svg[:head] + rules + svg[head:]).encode(), "svg", size, alt, caption, data)
