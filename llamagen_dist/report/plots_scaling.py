"""The plots of a fitted scaling law: the law over size, the prediction beside the measurement, the frontier."""

from collections.abc import Mapping, Sequence
from typing import Any

from llamagen_dist.report import canvas as c
from llamagen_dist.report.blocks import Figure
from llamagen_dist.report.quantities import count

_DOT: dict[str, Any] = {"linestyle": "none", "marker": "o", "markersize": 6.5, "markeredgewidth": 1.3}


def law(
    points: Sequence[Mapping[str, Any]],
    curves: Sequence[Mapping[str, Any]],
    caption: str = "",
    format: c.Format = "svg",
) -> Figure:
    """Fitted loss over N, one line per token budget. Full dots were fitted, rings were held out.

    points: params_fit, tokens, loss, held_out each. curves: tokens, params_fit [..], loss [..] each.
    """
    colours: dict[str, str] = {}
    with c.canvas([1], 3.5) as (drawing, (axes,)):
        axes.set_xscale("log")
        ends, xs = [], [p["params_fit"] for p in points]
        for number, curve in enumerate(curves):
            light, dark = c.ramp(number, len(curves))
            colours[light] = dark
            axes.plot(curve["params_fit"], curve["loss"], color=light, linewidth=1.3)
            here = [p for p in points if p["tokens"] == curve["tokens"]]
            for held, face in ((False, light), (True, "none")):
                shown = [p for p in here if p["held_out"] == held]
                edge = light if held else c.PAPER
                axes.plot(
                    [p["params_fit"] for p in shown],
                    [p["loss"] for p in shown],
                    **{**_DOT, "markerfacecolor": face, "markeredgecolor": edge, "color": light, "zorder": 5},
                )
            ends.append((curve["params_fit"][-1], curve["loss"][-1], f"{count(curve['tokens'])} tokens", light))
            xs += list(curve["params_fit"])
        if xs:
            axes.set_xlim(min(xs), max(xs))
            c.log_axis(axes.xaxis, min(xs), max(xs))
        axes.margins(y=0.1)
        c.linear_axis(axes.yaxis)
        axes.set_xlabel("parameters in the law (N)")
        c.title(axes, "held-out loss (nats per token)")
        c.label_ends(axes, ends)
        alt = f"The fitted law against parameters, {len(curves)} token budgets, with {len(points)} measured points"
        data = {"points": [dict(p) for p in points], "curves": [dict(curve) for curve in curves]}
        return c.finish(drawing, alt, caption, data, format, colours)


def foretold(predictions: Sequence[Mapping[str, Any]], caption: str = "", format: c.Format = "svg") -> Figure:
    """How far the law, its band and the naive forecast lie from the measurement, one place per token budget."""
    with c.canvas([1], 3.5) as (drawing, (axes,)):
        axes.axhline(0, color=c.ORANGE, linewidth=1.8)
        seen = [0.0]
        for i, one in enumerate(predictions):

            def off(value: float, one: Mapping[str, Any] = one) -> float:
                return 100 * (value / one["measured"] - 1)

            if "ci95" in one:
                band = [off(x) for x in one["ci95"]]
                seen += band
                axes.plot([i, i], band, color=c.BLUE, linewidth=16, alpha=0.2, solid_capstyle="butt")
            axes.plot([i - 0.13, i + 0.13], [off(one["predicted"])] * 2, color=c.BLUE, linewidth=2.6)
            if "naive" in one:
                axes.plot(
                    [i], [off(one["naive"])], **{**_DOT, "marker": "D", "color": c.GREEN, "markeredgecolor": c.PAPER}
                )
            seen += [off(one[key]) for key in ("predicted", "naive") if key in one]
        axes.set_xlim(-0.6, len(predictions) - 0.4)
        axes.set_xticks(range(len(predictions)), [f"{count(one['tokens'])} tokens" for one in predictions])
        low, high = min(seen), max(seen)
        room = 0.08 * (high - low) or 1.0
        axes.set_ylim(low - room, high + room + 0.28 * (high - low))  # the legend stands there
        c.linear_axis(axes.yaxis)
        c.title(axes, "forecast against measured loss (% too high)")
        entries = [("law, with 95% band" if "ci95" in predictions[0] else "law", c.BLUE), ("measured", c.ORANGE)]
        if any("naive" in one for one in predictions):
            entries.append(("as the next smaller run", c.GREEN))
        c.legend(axes, entries)
        alt = "Predicted against measured loss of the held-out run, one place per token budget"
        return c.finish(drawing, alt, caption, {"predictions": [dict(one) for one in predictions]}, format)


def frontier(best: Sequence[Mapping[str, Any]], known: int, caption: str = "", format: c.Format = "svg") -> Figure:
    """Lowest loss the law foresees for each amount of compute, and the size that gives it, above one another.

    known: so many of the first entries lie within what was trained; the lines go on dashed.
    """
    with c.canvas([1, 1], 4.6) as (drawing, (above, below)):
        for part, style in ((best[:known], "-"), (best[max(0, known - 1) :], (0, (3, 2)))):
            flops = [b["flops"] for b in part]
            above.plot(flops, [b["loss"] for b in part], color=c.BLUE, linestyle=style)
            below.plot(flops, [b["params"] for b in part], color=c.ORANGE, linestyle=style)
        for axes in (above, below):
            axes.set_xscale("log")
        below.set_yscale("log")
        c.log_axis(below.yaxis, min(b["params"] for b in best), max(b["params"] for b in best))
        c.log_axis(below.xaxis, best[0]["flops"], best[-1]["flops"])
        c.linear_axis(above.yaxis, 4)
        c.title(above, "lowest loss by the law (nats per token)")
        c.title(below, "parameters of the model that reaches it")
        below.set_xlabel("training FLOPs")
        alt = "Lowest predicted loss and best model size against training FLOPs"
        return c.finish(drawing, alt, caption, {"frontier": [dict(b) for b in best], "known": known}, format)
