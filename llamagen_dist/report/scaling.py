"""The scaling law's section: what it foretold for a run it had not seen, and what came."""

from collections.abc import Mapping
from typing import Any

from llamagen_dist.report import plots_scaling
from llamagen_dist.report import quantities as q
from llamagen_dist.report.blocks import Block, Columns, Details, Markdown, Section, Table, literal
from llamagen_dist.report.collect import Summary


def section(s: Summary) -> Section | None:
    law = s.scaling
    if not law.get("params"):
        return None
    blocks: list[Block] = []
    predictions = law.get("predictions") or ([law["prediction"]] if law.get("prediction") else [])
    if predictions:
        blocks += [_table(predictions), Markdown("\n\n".join(_verdict(law, predictions)))]
    figures: list[Block] = []
    if law.get("curves"):
        held = sorted({p["name"] for p in law["points"] if p["held_out"]})
        rings = f" Rings: {', '.join(held)}, which the law did not see." if held else ""
        figures.append(plots_scaling.law(law["points"], law["curves"], f"Lines: the law. Dots: measured.{rings}"))
    if predictions:
        figures.append(plots_scaling.foretold(predictions, _band(predictions[-1])))
    if figures:
        blocks.append(Columns(tuple(figures)))
    best = (law.get("frontier") or {}).get("best") or []
    if len(best) > 1:
        blocks.append(Columns((plots_scaling.frontier(best, _known(law)), Markdown(_frontier(best)))))
    blocks.append(Details("The fit in numbers", tuple(_fit(law))))
    return Section(
        "The scaling law",
        tuple(blocks),
        f"A formula for the held-out loss, `{_formula(law)}`, with N parameters trained on D tokens. "
        "Whether it is worth anything shows where it has to predict a model that it was not fitted to.",
    )


def _formula(law: Mapping[str, Any]) -> str:
    text = str(law.get("formula", "L(N, D)")).replace("`", "")
    return text.replace(" / ", "/").replace("alpha", "α").replace("beta", "β")


def _table(predictions: list[Mapping[str, Any]]) -> Table:
    rows = []
    for one in predictions:
        band = "{} to {}".format(*(q.loss(x) for x in one["ci95"])) if "ci95" in one else None
        naive = one.get("naive")
        rows.append(
            (
                f"{one['name']}, {q.count(one['tokens'])} tokens",
                q.loss(one["predicted"]),
                band,
                q.loss(one["measured"]),
                _percent(one["predicted"], one["measured"]),
                None if naive is None else _percent(naive, one["measured"]),
            )
        )
    columns = ("held-out run", "law", "95% band", "measured", "error of the law", "error of “as the smaller one”")
    return Table(columns, tuple(rows), (1, 2, 3, 4, 5), "Held-out loss in nats per token.")


def _percent(said: float, measured: float) -> str:
    return f"{100 * (said / measured - 1):+.1f}%".replace("-", "−")


def _verdict(law: Mapping[str, Any], predictions: list[Mapping[str, Any]]) -> list[str]:
    """What the comparison shows, said as plainly when the law fails."""
    one = predictions[-1]
    name = literal(str(one["name"]))
    text = (
        f"The law was fitted to the smaller runs only and then asked for {name} ({q.count(one['params'])} parameters) "
        f"after {q.count(one['tokens'])} tokens. It says **{q.loss(one['predicted'])}**; measured was "
        f"**{q.loss(one['measured'])}**"
    )
    if "ci95" in one:
        text += (
            ", which lies inside its 95% band."
            if one["ci95"][0] <= one["measured"] <= one["ci95"][1]
            else ", **outside its 95% band**: the law does not hold for this run."
        )
    else:
        why = law.get("absent", {}).get("ci95")
        text += f". There is no band: {literal(str(why))}." if why else "."
    found = [text]
    if "naive" in one:
        law_off, naive_off = (abs(one[key] - one["measured"]) for key in ("predicted", "naive"))
        smaller = literal(str(one.get("naive_from", "the next smaller run")))
        better = (
            "the law was closer than that."
            if law_off < naive_off
            else "**that guess was closer than the law**, so here the law adds nothing."
        )
        found.append(
            f"The plainest forecast is the loss of {smaller} after the same tokens, **{q.loss(one['naive'])}**; "
            + better
        )
    found += [f"Note: {literal(text)}." for text in law.get("diagnostics", {}).get("warnings", [])]
    many = law.get("diagnostics", {})
    if "runs" in many:
        found.append(
            f"All this rests on {law['n']} points of {many['runs']} very small runs. It shows how such a study "
            "is done; it says nothing about models a thousand times larger."
        )
    return found


def _band(one: Mapping[str, Any]) -> str:
    text = str(one.get("band", ""))
    return f"{text[:1].upper()}{text[1:]}." if text else ""


def _known(law: Mapping[str, Any]) -> int:
    """How many of the frontier's first entries ask for no more parameters and no more tokens than any run had."""
    limits = {key: max(p[key] for p in law["points"]) for key in ("params", "tokens")}
    inside = [all(b[key] <= limits[key] for key in limits) for b in law["frontier"]["best"]]
    return inside.index(False) if False in inside else len(inside)


def _frontier(best: list[Mapping[str, Any]]) -> str:
    last = best[-1]
    shape = f" ({literal(str(last['shape']))})" if "shape" in last else ""
    return (
        "For each amount of compute the law has a best split between a larger model and more tokens. Solid: sizes and "
        "numbers of tokens that were really trained, if not together. Dashed: beyond them, so a guess. At the end of "
        f"the line, {q.power(last['flops'])} training FLOPs, the law would choose {q.count(last['params'])} "
        f"parameters{shape} and {q.count(last['tokens'])} tokens. It assumes fresh images: repeating the same ones is "
        "worth less."
    )


def _fit(law: Mapping[str, Any]) -> list[Block]:
    intervals = law.get("ci95", {})
    rows = tuple(
        (
            name,
            f"{value:.5g}",
            "{:.4g} to {:.4g}".format(*intervals[name]) if name in intervals else None,
        )
        for name, value in law["params"].items()
    )
    diagnostics = [(k.replace("_", " "), str(v)) for k, v in law.get("diagnostics", {}).items() if k != "warnings"]
    method = law.get("record", {}).get("bootstrap", {}).get("method")
    delta = law.get("delta")
    minimised = f"{law.get('loss')} of log residuals" + (f", delta {delta:g}" if delta else "")
    if "objective" in law:
        minimised += f": {law['objective']:.6g} over {law['n']} points"
    facts = [("objective", minimised), *([("interval", str(method))] if method else []), *diagnostics]
    facts += [(f"what {k} means", str(v)) for k, v in law.get("definitions", {}).items()]
    return [
        Table(("parameter", "value", "95% interval"), rows, (1, 2)),
        Table(("", ""), tuple(facts)),
    ]
