"""What eval.search measured: a figure like LlamaGen's table 8, the table itself, and what the best point is worth."""

from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np

from llamagen_dist.config.search import FREE
from llamagen_dist.report.blocks import Figure, Panel, Section, Series, literal
from llamagen_dist.report.figures import share
from llamagen_dist.report.text import section as from_template

_NAMES = {
    "fid": ("FID", "{:.2f}"),
    "sfid": ("sFID", "{:.2f}"),
    "fid_infinity": ("FID∞", "{:.2f}"),
    "kid_mean": ("KID", "{:.5f}"),
    "inception_score": ("IS", "{:.2f}"),
    "precision": ("precision", "{:.3f}"),
    "recall": ("recall", "{:.3f}"),
    "density": ("density", "{:.3f}"),
    "coverage": ("coverage", "{:.3f}"),
}
_SETTINGS = {"guidance": "guidance", "cfg_scale": "scale", "temperature": "T", "top_k": "top-k", "top_p": "top-p"}
_MOST_NAMED = 3
_PAIRS = {"precision": "recall", "density": "coverage"}  # drawn into one panel


def section(content: Mapping[str, Any]) -> Section:
    """content: of search.json."""
    made = from_template(
        "search", {"curves": figure(content)}, SimpleNamespace(search=content), SimpleNamespace(**facts(content))
    )
    assert made is not None
    return made


def facts(content: Mapping[str, Any]) -> dict[str, Any]:
    """What the template says: heads and rows of the table, the number of settings among the heads, the verdict."""
    points = sorted(content["points"], key=lambda p: [p[key] for key in ("guidance", *_varying(content), "cfg_scale")])
    shown = [key for key in _SETTINGS if key in ("guidance", "cfg_scale") or key in _varying(content)]
    metrics = list(points[0]["scores"])
    best = {metric: content["best"][metric]["name"] for metric in metrics}
    rows = []
    for point in points:
        settings = [literal(point[key] if isinstance(point[key], str) else f"{point[key]:g}") for key in shown]
        words = [_words(metric, point["scores"][metric]) for metric in metrics]
        marked = [f"**{w}**" if best[m] == point["name"] else w for m, w in zip(metrics, words, strict=True)]
        rows.append([*settings, *marked])
    return {
        "metric": _NAMES[content["metric"]][0],
        "heads": [_SETTINGS[key] for key in shown] + [_NAMES[metric][0] for metric in metrics],
        "settings": len(shown),
        "rows": rows,
        "finer": sum(point["stage"] == "finer" for point in points),
        "verdict": verdict(content),
    }


def verdict(content: Mapping[str, Any]) -> str:
    """The best point in a sentence, and which others may be as good."""
    metric = content["metric"]
    best = content["best"][metric]
    settings = ", ".join(f"{name} {best[key]}" for key, name in _SETTINGS.items())
    if best["guidance"] == FREE:
        settings += f"; as beta {1 / best['cfg_scale']:.4g}"
    text = f"Best {_NAMES[metric][0]} {_words(metric, best)}: {settings}."
    if best["indistinct"] is None:
        return f"{text} Whether others are as good was not measured: give several seeds."
    if not best["indistinct"]:
        return f"{text} Every other point differs from it by more than chance (95 %, on shared noise)."
    near, more = best["indistinct"][:_MOST_NAMED], len(best["indistinct"]) - _MOST_NAMED
    others = ", ".join(near) + (f" and {more} more" if more > 0 else "")
    return f"{text} Not distinguishable from it (95 %, on shared noise): {others}."


def figure(content: Mapping[str, Any]) -> Figure:
    """Panels of the metrics over the scale of guidance, a curve for each schedule, temperature, top-k and top-p."""
    metrics = [m for m in content["points"][0]["scores"] if m not in _PAIRS.values() or m not in _partners(content)]
    panels = [_panel(content, metric) for metric in metrics if metric != "sfid" or content["metric"] == "sfid"]
    names = ", ".join(panel.title for panel in panels)
    caption = "Diamond: the best point." + (f" Bars: one standard deviation {content['sd']}." if content["sd"] else "")
    return Figure(tuple(panels), f"{names} against the scale of guidance", "scale of guidance", caption=caption)


def _partners(content: Mapping[str, Any]) -> set[str]:
    return {second for first, second in _PAIRS.items() if first in content["points"][0]["scores"]}


def _panel(content: Mapping[str, Any], metric: str) -> Panel:
    second = _PAIRS.get(metric)
    title = _NAMES[metric][0] if second is None else f"{_NAMES[metric][0]} (line), {_NAMES[second][0]} (dashed)"
    series = [
        one for number in range(len(content["curves"])) for one in _series(content, number, metric, "dotted line")
    ]
    if second is not None:
        series += [
            one for number in range(len(content["curves"])) for one in _series(content, number, second, "dashed")
        ]
    if metric == content["metric"]:
        best = content["best"][metric]
        series.append(Series("best", np.array([best["cfg_scale"]]), np.array([best["mean"]]), "diamonds", "orange"))
    return Panel(title, tuple(series))


def _series(content: Mapping[str, Any], number: int, metric: str, style: Any) -> Sequence[Series]:
    curve, colour = content["curves"][number], share(number, len(content["curves"]))
    by_name = {point["name"]: point for point in content["points"]}
    points = sorted((by_name[name] for name in curve["points"]), key=lambda point: point["cfg_scale"])
    scores = [point["scores"][metric] for point in points]
    x, y = np.array([p["cfg_scale"] for p in points], float), np.array([s["mean"] for s in scores], float)
    keys = [key for key in _varying(content, with_guidance=True) if key in curve]
    label = ", ".join(str(curve[key]) if key == "guidance" else f"{_SETTINGS[key]} {curve[key]:g}" for key in keys)
    name = f"{_NAMES[metric][0]}{', ' if label else ''}{label}"
    lines = [Series(name, x, y, style, colour, label if style == "dotted line" else "")]
    if all(s["sd"] is not None for s in scores):
        sd = np.array([s["sd"] for s in scores], float)
        lines.append(Series(f"{name}, deviation", x, y - sd, "band", colour, to=y + sd))
    return lines


def _varying(content: Mapping[str, Any], with_guidance: bool = False) -> list[str]:
    """The axes besides the scale that have several values."""
    keys = [key for key in _SETTINGS if key != "cfg_scale" and (with_guidance or key != "guidance")]
    return [key for key in keys if len({curve[key] for curve in content["curves"]}) > 1]


def _words(metric: str, score: Mapping[str, Any]) -> str:
    form = _NAMES[metric][1]
    return form.format(score["mean"]) + ("" if score["sd"] is None else f" ± {form.format(score['sd'])}")
