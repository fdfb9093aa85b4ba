"""What llamagen scaling recipes found: a table for each task, curves with bands over seeds, and what to use when."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from llamagen_dist.report import quantities as q
from llamagen_dist.report.blocks import Block, Colour, Figure, Panel, Series, literal
from llamagen_dist.report.figures import share
from llamagen_dist.scaling.recipes import EQUAL

_MOST_CURVES = 8
_TITLES = {"loss": "held-out loss (nats per token)", "fid": "FID (lower is better)"}


def part(content: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Block | None]]:
    """What the section's template reads, and its figures: ``curves-N`` of task N."""
    if not content:
        return {}, {}
    tasks = [
        {
            "name": task["task"],
            "rows": [_cells(row, content["levels"]) for row in task["rows"]],
            "search": [
                [one["recipe"], settings(one["settings"]), one["loss"], one["chosen"]] for one in task["search"]
            ],
            "verdicts": verdicts(task),
        }
        for task in content["tasks"]
    ]
    facts = {
        "tasks": tasks,
        "levels": content["levels"],
        "scored": any("fid" in row for task in content["tasks"] for row in task["rows"]),
        "overall": overall(content["tasks"]),
        "span": span,
    }
    return facts, {f"curves-{number}": figure(task) for number, task in enumerate(content["tasks"])}


def settings(values: Mapping[str, Any]) -> str:
    """Of a recipe, without the name of their section."""
    return ", ".join(f"{key.removeprefix('optim.')} {_word(value)}" for key, value in values.items())


def _word(value: Any) -> str:
    if isinstance(value, list | tuple):
        return "/".join(map(_word, value))
    return f"{value:g}" if isinstance(value, float) else str(value)


def span(band: Mapping[str, Any], form: str = "{:.4f}") -> str:
    """A mean with its range over seeds."""
    if band["seeds"] == 1:
        return form.format(band["mean"])
    return f"{form.format(band['mean'])} ({form.format(band['low'])} to {form.format(band['high'])})"


def _cells(row: Mapping[str, Any], levels: Sequence[float]) -> dict[str, str]:
    cells = {
        "recipe": str(row["recipe"]),
        "settings": settings(row["settings"]),
        "searched": str(row["searched"]),
        "seeds": ", ".join(map(str, row["seeds"])),
        "flops": q.power(row["flops"]),
        "loss": span(row["loss"]),
        "gain": span(row["gain"], "{:+.4f}").replace("-", "−") if "gain" in row else "",
        "to_loss": to_loss(row),
        "fid": span(row["fid"], "{:.2f}") if "fid" in row else "",
    }
    reached = {one["level"]: one for one in row.get("ep_fid", ())}
    for level in levels:
        one = reached.get(level)
        text = "" if one is None else "not reached"
        if one and one["reached"]:
            text = f"{span({k: round(v) for k, v in one['images'].items()}, '{:,}')} images"
            text += f", {one['reached']} of {one['seeds']} seeds" if one["reached"] < one["seeds"] else ""
        cells[f"ep_fid {level:g}"] = text
    return cells


def to_loss(row: Mapping[str, Any]) -> str:
    """Compute-to-loss in words: the share of the baseline's FLOPs, and how many seeds reach its loss."""
    known, count = row["to_loss"], len(row["to_loss"]["shares"])
    if not count:
        return "no seed in common"
    if not known["reached"]:
        return "not reached"
    text = span(known, "{:.2f}")
    return text if known["reached"] == count else f"{text}, {known['reached']} of {count} seeds; else not reached"


def better(row: Mapping[str, Any]) -> bool:
    """Whether the loss at the end is below the baseline's in every one of several seeds."""
    return row.get("gain", {}).get("seeds", 0) > 1 and row["gain"]["low"] > 0


def verdicts(task: Mapping[str, Any]) -> list[str]:
    """What to use for which purpose at this task; Markdown."""
    own, *others = task["rows"]
    if not others:
        return ["Only the baseline was trained."]
    lines = []
    clear = [row for row in others if better(row)]
    if clear:
        best = min(clear, key=lambda row: row["loss"]["mean"])
        near = [row for row in clear if row is not best and row["loss"]["low"] <= best["loss"]["high"]]
        lines.append(
            f"For the lowest loss **{literal(best['recipe'])}**: {span(best['loss'])}, below the baseline's by "
            f"{span(best['gain'])}, in each of {best['gain']['seeds']} seeds{_with(best, own)}.{_as_good(near)}"
        )
        first = min((row for row in clear if row["to_loss"]["reached"]), key=_least, default=None)
        if first is None or first["to_loss"]["mean"] >= 1:
            lines.append("For the baseline's loss none of them needs less compute than it.")
        else:
            lines.append(
                f"For the baseline's loss at the least compute **{literal(first['recipe'])}**: {to_loss(first)} of its."
            )
    else:
        lines.append("For the loss keep the **baseline**: no recipe is better in every seed.")
    scored = [row for row in others if "fid" in row]
    if "fid" in own and scored:
        best = min(scored, key=lambda row: row["fid"]["mean"])
        if best["fid"]["seeds"] > 1 and best["fid"]["high"] < own["fid"]["low"]:
            near = [row for row in scored if row is not best and row["fid"]["low"] <= best["fid"]["high"]]
            less = q.percent(best["fid"]["mean"] / own["fid"]["mean"] - 1)
            lines.append(
                f"For pictures **{literal(best['recipe'])}**: FID {span(best['fid'], '{:.2f}')} against "
                f"{span(own['fid'], '{:.2f}')} ({less}).{_as_good(near)}"
            )
        else:
            lines.append("For pictures keep the **baseline**: no recipe's range of FIDs lies below its range.")
    return lines


def _least(row: Mapping[str, Any]) -> tuple[int, float]:
    return -int(row["to_loss"]["reached"]), float(row["to_loss"]["mean"])


def _with(row: Mapping[str, Any], own: Mapping[str, Any]) -> str:
    """How much compute that took, where it is not the baseline's."""
    times = row["flops"] / own["flops"]
    return f", with {times:.2f} times its compute" if abs(times - 1) > EQUAL else ""


def _as_good(rows: Sequence[Mapping[str, Any]]) -> str:
    names = ", ".join(literal(row["recipe"]) for row in rows)
    return f" Not distinguishable from it, by the seeds' ranges: {names}." if rows else ""


def overall(tasks: Sequence[Mapping[str, Any]]) -> list[tuple[str, int, int, str]]:
    """(recipe, tasks in which it is better in every seed, tasks it was trained for, compute-to-loss over all seeds)."""
    lines = []
    for name in dict.fromkeys(row["recipe"] for task in tasks for row in task["rows"][1:]):
        rows = [row for task in tasks for row in task["rows"][1:] if row["recipe"] == name]
        shares = [one for row in rows for one in row["to_loss"]["shares"].values()]
        known = [one for one in shares if one is not None]
        text = "not reached" if not known else f"{min(known):.2f} to {max(known):.2f}"
        if known and len(known) < len(shares):
            text += f", {len(shares) - len(known)} of {len(shares)} not reached"
        lines.append((name, sum(map(better, rows)), len(rows), text))
    return sorted(lines, key=lambda line: -line[1])


def figure(task: Mapping[str, Any]) -> Figure:
    """Loss, and FID where it was measured, against FLOPs: mean over seeds with its range; the baseline in orange."""
    own, *others = task["rows"]
    shown = [own, *sorted(others, key=lambda row: row["loss"]["mean"])[: _MOST_CURVES - 1]]
    panels = [_panel(shown, key, name) for key, name in (("loss", "curve"), ("fid", "fid_curve"))]
    names = ", ".join(row["recipe"] for row in shown)
    more = f" The best {len(shown) - 1} of {len(others)} recipes." if len(shown) <= len(others) else ""
    caption = f"Mean over seeds of the best so far; bars: their range. Orange: the baseline.{more}"
    alt = f"Held-out loss against training FLOPs of {names}"
    return Figure(tuple(p for p in panels if p.series), alt, "training FLOPs", log_x=True, caption=caption)


def _panel(rows: Sequence[Mapping[str, Any]], key: str, name: str) -> Panel:
    series = []
    for number, row in reversed([*enumerate(rows)]):
        if name not in row or not row[name]["flops"]:
            continue
        colour: Colour = "orange" if number == 0 else 1 - share(number - 1, max(2, len(rows) - 1))
        x, mean, low, high = (np.array(row[name][part], float) for part in ("flops", "mean", "low", "high"))
        label = row["recipe"]
        series.append(Series(label, x, mean, "dotted line", colour, label))
        if row[key]["seeds"] > 1:
            series.append(Series(f"{label}, range over seeds", x, low, "band", colour, to=high))
    return Panel(_TITLES[key], tuple(series))
