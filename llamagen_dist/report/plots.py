"""A Figure block as a picture, by matplotlib."""

import io
import re
from pathlib import Path
from typing import Any, Literal

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_hex
from matplotlib.figure import Figure as Drawing
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

from llamagen_dist.report.blocks import Figure, Panel, Series, printable
from llamagen_dist.report.quantities import tick

TEMPLATES = Path(__file__).parent / "templates"

# name -> (light, dark), as page.css and plots.mplstyle have them.
# Series: Okabe & Ito's colour-blind-safe set, lightened for the dark page.
THEME = {
    "ink": ("#1c2127", "#e8eaed"),
    "soft": ("#59636e", "#a3abb5"),
    "rule": ("#dfe3e8", "#343a41"),
    "paper": ("#ffffff", "#15181c"),
    "blue": ("#0b66a8", "#5fb4ec"),
    "orange": ("#d2601a", "#f2a04e"),
    "green": ("#0f8a68", "#45c9a0"),
}
INK, SOFT, RULE, PAPER = (THEME[name][0] for name in ("ink", "soft", "rule", "paper"))
WIDTH = 4.7  # inches; as wide as a phone's screen in CSS pixels, so that 9.5 pt stays readable there
_FONTS = "system-ui,-apple-system,'Segoe UI',Roboto,'Helvetica Neue',Arial,sans-serif"
_MARKS = {"linestyle": "none", "marker": "o", "markersize": 6.2, "markeredgewidth": 1.3, "zorder": 5}
_NAME: dict[str, Any] = {"fontsize": 9, "fontweight": "bold"}  # of a line, in its colour
_STYLES: dict[str, dict[str, Any]] = {
    "line": {"linewidth": 1.8},
    "thin": {"linewidth": 1.1},
    "wide": {"linewidth": 3.6, "alpha": 0.45},
    "faint": {"linewidth": 0.6, "alpha": 0.28},
    "dashed": {"linewidth": 1.8, "linestyle": (0, (3, 2))},
    "dots": {**_MARKS, "markeredgecolor": PAPER},
    "points": {**_MARKS, "markersize": 2.6, "markeredgewidth": 0},
    "crosses": {**_MARKS, "marker": "x", "markersize": 3, "markeredgewidth": 0.7, "zorder": 4},
    "rings": {**_MARKS, "markerfacecolor": "none"},
    "diamonds": {**_MARKS, "marker": "D", "markeredgecolor": PAPER},
    "dotted line": {**_MARKS, "linestyle": "-", "linewidth": 1.8, "markeredgecolor": PAPER},
}
# (smallest span in decades, where a decade is marked)
_LOG_STEPS = ((2.5, (1.0,)), (1.4, (1.0, 3.0)), (0.7, (1.0, 2.0, 5.0)), (0.0, (1.0, 1.5, 2.0, 3.0, 4.0, 5.0, 7.0)))


def colours(colour: str | float) -> tuple[str, str]:
    """(light, dark) of a Series' colour. The ordered family is perceptually even, colour-blind safe, and its largest
    member stands out most on either page."""
    if isinstance(colour, str):
        return THEME[colour]
    viridis = matplotlib.colormaps["viridis"]
    return to_hex(viridis(0.66 - 0.62 * colour)), to_hex(viridis(0.42 + 0.5 * colour))


def size(figure: Figure) -> tuple[int, int]:
    """(width, height) in CSS pixels."""
    return round(WIDTH * 96), round((3.5 if len(figure.panels) == 1 else 1.0 + 1.85 * len(figure.panels)) * 96)


def draw(figure: Figure, form: Literal["svg", "png"] = "svg") -> bytes:
    """The encoded picture. SVG follows the reader's light or dark page; PNG is the light page's, at twice the size."""
    width, height = size(figure)
    with matplotlib.rc_context(fname=str(TEMPLATES / "plots.mplstyle")):
        drawing = Drawing(figsize=(width / 96, height / 96), layout="constrained")
        FigureCanvasAgg(drawing)
        grid = drawing.subplots(len(figure.panels), 1, sharex=True, squeeze=False)[:, 0]
        for axes, panel in zip(grid, figure.panels, strict=True):
            _panel(axes, panel, figure)
        _x_axis(grid[-1], figure)
        for axes, panel in zip(grid, figure.panels, strict=True):
            _name_ends(axes, panel.series)
        buffer = io.BytesIO()
        if form == "png":
            drawing.savefig(buffer, format="png", dpi=192, facecolor=PAPER)
            return buffer.getvalue()
        drawing.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    used = [series.colour for panel in figure.panels for series in panel.series]
    return _recoloured(buffer.getvalue().decode(), [colours(colour) for colour in used]).encode()


def _panel(axes: Axes, panel: Panel, figure: Figure) -> None:
    for series in panel.series:
        colour = colours(series.colour)[0]
        if series.style == "band" and series.to is not None:
            axes.vlines(series.x, series.y, series.to, color=colour, linewidth=16, alpha=0.2)
        else:
            axes.plot(series.x, series.y, color=colour, **_STYLES[series.style])
    if panel.log_y and any((series.y > 0).any() for series in panel.series):
        axes.set_yscale("log")
    if panel.y_range:
        axes.set_ylim(*panel.y_range)
    else:
        axes.margins(y=0.1)
    _ticks(axes.yaxis, panel.log_y, 5 if len(figure.panels) == 1 else 4)
    axes.set_title(panel.title, x=0)
    if figure.shaded:
        axes.axvspan(*figure.shaded, color=THEME["blue"][0], alpha=0.08, linewidth=0)
    if panel.note:
        axes.text(0.02, 0.95, panel.note, transform=axes.transAxes, va="top", fontsize=9)
    for line, (text, named) in enumerate(panel.legend):  # upper right, where falling curves leave room
        look = {"color": colours(named)[0], "ha": "right", "va": "top", **_NAME}
        _write(axes, shorten(text, 40), (0.985, 0.95), "axes fraction", (0, -13 * line), look)
    for at, text in figure.events:
        axes.axvline(at, color=SOFT, linewidth=0.9, linestyle=(0, (3, 3)))
        if panel is figure.panels[0]:
            right = at < 0.6 * axes.get_xlim()[1]
            box = {"facecolor": PAPER, "alpha": 0.85, "linewidth": 0, "pad": 1.5}
            look = {"color": SOFT, "ha": "left" if right else "right", "fontsize": 8.5, "bbox": box}
            _write(axes, text, (at, 0.6), ("data", "axes fraction"), (5 if right else -5, 0), look)


def _write(axes: Axes, text: str, at: tuple[float, float], of: Any, points: tuple[int, int], look: Any) -> None:
    """Text so many points from ``at``, which is in the coordinates ``of``. look: matplotlib's names for it."""
    axes.annotate(text, at, xycoords=of, xytext=points, textcoords="offset points", **look)


def _x_axis(axes: Axes, figure: Figure) -> None:
    axes.set_xlabel(figure.x)
    if figure.ticks:
        axes.set_xticks(range(len(figure.ticks)), [shorten(name) for name in figure.ticks])
        axes.set_xlim(-0.6, len(figure.ticks) - 0.4)
        return
    log = figure.log_x and any((s.x > 0).any() for panel in figure.panels for s in panel.series)
    if log:
        axes.set_xscale("log")
    axes.margins(x=0.03)
    _ticks(axes.xaxis, log, 5)


def _ticks(axis: Any, log: bool, most: int) -> None:
    """Plain words (20k, 10⁻³), and enough of them even where the data span less than a decade."""
    if log:
        low, high = axis.get_view_interval()
        decades = np.log10(high / low) if high > low > 0 else 0.0
        steps = next(steps for span, steps in _LOG_STEPS if decades >= span)
        axis.set_major_locator(LogLocator(subs=steps, numticks=7))
        axis.set_minor_locator(NullLocator())
    else:
        axis.set_major_locator(MaxNLocator(most, steps=[1, 2, 2.5, 5, 10]))
    axis.set_major_formatter(FuncFormatter(lambda value, _: tick(value)))


def _name_ends(axes: Axes, series: tuple[Series, ...]) -> None:
    """Labels right of the lines' ends, moved apart where they would overlap."""
    named = [one for one in series if one.label and len(one.x)]
    if not named:
        return
    axes.autoscale_view()  # else the transform below still has the limits of before
    to_axes = axes.transData + axes.transAxes.inverted()
    ends = sorted(((to_axes.transform((s.x[-1], s.y[-1]))[1], s) for s in named), key=lambda end: end[0])
    gap = 11.5 / (axes.get_window_extent().height * 72 / axes.figure.dpi * 0.9)  # one line, as a share of the height
    heights = np.clip([height for height, _ in ends], 0, 1)
    for _ in range(200):  # push close neighbours apart, keep all beside the axes
        short = np.maximum(gap - np.diff(heights), 0) / 2
        heights[:-1] -= short
        heights[1:] += short
        heights[0], heights[-1] = max(heights[0], 0.0), min(heights[-1], 1.0)
    for height, (_, one) in zip(heights, ends, strict=True):
        beside: dict[str, Any] = {"transform": axes.transAxes, "va": "center", "clip_on": False}
        axes.text(1.015, height, shorten(one.label), color=colours(one.colour)[0], **beside, **_NAME)


def shorten(text: str, most: int = 20) -> str:
    plain = printable(text)
    return plain if len(plain) <= most else plain[: most - 1] + "…"


def _recoloured(svg: str, used: list[tuple[str, str]]) -> str:
    """The drawing with colours that change with the page's: every light one becomes a variable."""
    svg = svg[svg.index("<svg") :].replace("'DejaVu Sans'", _FONTS)  # without the DOCTYPE and its address
    dark = dict([*THEME.values(), *used])
    names = {light: f"--c{number}" for number, light in enumerate(dark)}
    svg = re.sub(
        r"((?:fill|stroke): ?)(#[0-9a-f]{6})",
        lambda match: f"{match[1]}var({names[match[2]]})" if match[2] in names else match[0],
        svg,
    )
    day = ";".join(f"{name}:{light}" for light, name in names.items())
    night = ";".join(f"{name}:{dark[light]}" for light, name in names.items())
    head = svg.index(">") + 1
    rules = f"<style>:root{{{day}}}@media(prefers-color-scheme:dark){{:root{{{night}}}}}</style>"
    return svg[:head] + rules + svg[head:]
