"""From a folder to its report: for every section of templates/report.md.j2 the numbers and figures that it shows."""

import math
import shlex
from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any

from llamagen_dist.evaluation.record import differences
from llamagen_dist.report import (
    checkpoints,
    codebook,
    figures,
    pictures,
    rate_distortion,
    recipes,
    search,
    sweep,
    tokenizers,
)
from llamagen_dist.report import quantities as q
from llamagen_dist.report.blocks import Bars, Block, Markdown, Numbers, Report
from llamagen_dist.report.collect import Found
from llamagen_dist.report.results import parity, results
from llamagen_dist.report.text import section, words

_TITLES = {
    "pipeline": "Images to tokens to a ladder of Llamas",
    "sweep": "Sweep {}",
    "run": "Run {}",
    "evaluation": "Evaluation {}",
    "search": "Search {}",
    "tokenizers": "Tokenizers {}",
    "pictures": "Pictures {}",
    "scaling": "Scaling law {}",
}
_PRIVATE = ("host", "diff", "started")  # a machine's name is nobody's business, a diff too long
_LONGEST = 200
_SMALL = 1e7  # parameters; below it a ladder says nothing about the models that people use
Part = tuple[dict[str, Any], dict[str, Block | None]]
"""What a section's macro reads, and the blocks that it asks for by name."""


def build(s: Found) -> Report:
    """Blocks from what is there; a part that was not run is named, not invented."""
    known = results(s)
    common = {
        "known": known,
        "twin": parity(s),
        "best": min((run for run in s.ladder if run.score is not None), key=lambda run: run.score or 0, default=None),
        "blind": math.log(s.vocab_size) if s.vocab_size else 0.0,
        "seconds": sum(known.get("time_s", {}).values()),
        "out": shlex.quote(str(s.folder.absolute())),
        **(sweep.facts(s) if s.kind == "sweep" else {}),
    }
    first: list[Block] = []
    kind = s.kind if s.kind in ("pipeline", "sweep", "run") else "evaluation"
    if text := words(f"{kind}_first", s, SimpleNamespace(**common)):
        first.append(Markdown(text.replace("\n", " ") if "\n\n" not in text else text))
    rows = [line.split(" :: ") for line in words(f"{kind}_numbers", s, SimpleNamespace(**common)).splitlines() if line]
    if rows:
        first.append(Numbers(tuple((label, value, note.strip()) for label, value, note in rows)))
    made = []
    for macro, part in _SECTIONS.items():
        more, blocks = part(s) if part else ({}, {})
        made.append(section(macro, blocks, s, SimpleNamespace(**common, **more)))
    title = s.title or _TITLES[s.kind].format(s.folder.absolute().name)
    return Report(title, (*first, *(one for one in made if one is not None)), _subtitle(s))


def _subtitle(s: Found) -> str:
    record: Mapping[str, Any] = next((run.record for run in s.runs if run.record), {})
    parts = [
        f"llamagen-dist {record['llamagen_dist']}" if "llamagen_dist" in record else "",
        f"{record['cpus']} CPU cores" if "cpus" in record else "",
        str(record.get("started", ""))[:10],
    ]
    return " · ".join(part for part in parts if part)


def _sweep(s: Found) -> Part:
    return {}, sweep.curves(s) if s.kind == "sweep" else {}


def _training(s: Found) -> Part:
    """One GPT: a run, or a pipeline's only one."""
    run = s.ladder[0] if len(s.ladder) == 1 and s.kind != "sweep" and s.ladder[0].training else None
    if run is None:
        return {"run": None}, {}
    validations = [run.validation[i] for i in spread(len(run.validation), 12)]
    return {"run": run, "validations": validations}, {"curves": figures.gpt(run)}


def _tokenizer(s: Found) -> Part:
    grid = pictures.reconstructions(s.reconstructions, s.held_out) if s.reconstructions else None
    if grid is None and s.tokenizer:
        grid = pictures.validated(s.tokenizer)
    curves = figures.tokenizer(s.tokenizer) if s.tokenizer and s.tokenizer.training else None
    facts, blocks = codebook.part(s.tokenizer)
    blocks["rates"] = rate_distortion.figure(s.tokenizer) if s.tokenizer else None
    return {"pictures": grid, **facts}, {"reconstructions": grid, "curves": curves, **blocks}


def _ladder(s: Found) -> Part:
    sizes = {run.params for run in s.ladder if run.params}
    if len(s.ladder) < 2 or (s.kind == "sweep" and len(sizes) < 2):
        return {}, {}
    counted = "tokens" if all(run.tokens_per_image for run in s.ladder) else "images"
    per_image = {run.name: (run.tokens_per_image or 1) if counted == "tokens" else 1 for run in s.ladder}
    losses = [{p["images_seen"] * per_image[r.name]: p["val_loss"] for p in r.validation} for r in s.ladder]
    every = sorted({budget for known in losses for budget in known if budget > 0})
    rows = list(zip(s.ladder, losses, strict=True))
    facts: dict[str, Any] = {"counted": counted, "rows": rows, "budgets": [every[i] for i in spread(len(every), 5)]}
    largest = s.ladder[-1]
    constant = largest.config.optim.constant_until if largest.config else 0
    if constant and constant < math.inf and all(run.seen <= constant for run in s.ladder[:-1]):
        facts["alone"] = constant * per_image[largest.name]
    lines = {b: [(r.params, known[b]) for r, known in rows if r.params and b in known] for b in facts["budgets"]}
    lines = {b: line for b, line in lines.items() if len({size for size, _ in line}) > 1}
    short = bool(lines) and max(lines) <= constant * per_image[largest.name]
    return {"alone": None, **facts}, {
        "curves": figures.learning(s.ladder, per_image, counted),
        "size": figures.against_size(lines, counted, short) if lines else None,
    }


def _samples(s: Found) -> Part:
    if s.samples is None:
        return {}, {}
    return {"condition": pictures.condition(s.samples)}, {"samples": pictures.samples(s.samples)}


def _scores(s: Found) -> Part:
    measured = {name: one for name, one in s.evaluations.items() if one.get("sets")}
    if not measured:
        return {"largest": shlex.quote(str(s.ladder[-1].folder.absolute())) if s.ladder else ""}, {}
    names, one = figures.SETS, next(iter(measured.values()))
    records = {name: _recorded(result.get("record", {})) for name, result in measured.items()}
    if len(measured) > 1:
        rows = [
            (f"{file}: {names.get(n, n)}", values)
            for file, result in measured.items()
            for n, values in result["sets"].items()
        ]
        rows.sort(key=lambda row: row[1].get("fid", math.inf))
        return {"rows": rows, "records": records, "one": None, "alike": _not_alike(measured)}, {}
    order = [*(name for name in names if name in one["sets"]), *(name for name in one["sets"] if name not in names)]
    rows = [(names.get(name, name), one["sets"][name]) for name in order]
    fid = {name: values["fid"] for name, values in one["sets"].items() if "fid" in values}
    bars = Bars("FID (lower is better)", tuple((names.get(n, n), fid[n], f"{fid[n]:.1f}") for n in order if n in fid))
    return {"rows": rows, "records": records, "one": one, "fid": fid, "alike": []}, {"fid": bars if fid else None}


def _search(s: Found) -> Part:
    return (search.facts(s.search), {"curves": search.figure(s.search)}) if s.search else ({}, {})


def _tokenizers(s: Found) -> Part:
    return (tokenizers.facts(s.tokenizers), tokenizers.parts(s.tokenizers)) if s.tokenizers else ({}, {})


def _not_alike(measured: Mapping[str, Mapping[str, Any]]) -> list[tuple[str, str]]:
    """(which file, what differs from the first) of results whose scores are not comparable."""
    (_, first), *others = measured.items()
    lines = []
    for name, other in others:
        try:
            lines += [(name, line) for line in differences(first, other)]
        except (KeyError, TypeError, AttributeError):
            lines.append((name, "one of the two does not record how it was measured"))
    return lines


def _scaling(s: Found) -> Part:
    law, asked = s.scaling, s.forecast
    fitted = law.get("params") or law.get("parameters")
    if not fitted:
        return {}, {}
    predictions = asked.get("predictions") or ([asked["prediction"]] if asked else [])
    points, diagnostics = law.get("points") or [], law.get("diagnostics") or {}
    best = law.get("frontier") or []  # of today's fits below a key; of those of before a list
    best = best.get("best") or [] if isinstance(best, Mapping) else best
    best = best if len(best) > 1 and {"flops", "loss", "params"} <= set(best[0]) else []
    tiny = predictions and points and max(p.get("params", math.inf) for p in points) < _SMALL
    stated = [(k.replace("_", " "), v) for k, v in diagnostics.items() if k != "warnings"]
    method = (law.get("record", {}).get("bootstrap") or law.get("bootstrap") or {}).get("method")
    stated += [("objective reached", f"{law['objective']:.6g}")] if "objective" in law else []
    stated += [("interval", method)] if method else []
    stated += [("points left out", law["dropped"])] if law.get("dropped") else []
    stated += [(f"what {k} means", v) for k, v in law.get("definitions", {}).items()]
    facts = {
        "fitted": fitted,
        "intervals": law.get("ci95") or law.get("parameters_ci95") or {},
        "predictions": predictions,
        "asked": asked,
        "tiny": law.get("n") or diagnostics.get("points") if tiny else None,
        "last": best[-1] if best else None,
        "facts": stated,
    }
    return facts, {
        "law": figures.law(points, law["curves"]) if points and law.get("curves") else None,
        "predicted": figures.predicted(predictions) if predictions else None,
        "frontier": figures.frontier(best, points) if best else None,
    }


def _isoflop(s: Found) -> Part:
    points = s.scaling.get("points") or []
    return {}, {"valleys": figures.isoflop(s.isoflop["budgets"], points) if s.isoflop else None}


def _recipes(s: Found) -> Part:
    return recipes.part(s.recipes)


def _same_losses(s: Found) -> Part:
    twin = parity(s)
    if twin is None:
        return {}, {}
    layouts = (twin.one.layout or "the ladder's ranks", twin.other.layout or "the split run's ranks")
    return {"layouts": layouts}, {"curves": figures.same_losses(twin, layouts)}


def _cost(s: Found) -> Part:
    time = tuple((t.name, float(t.seconds), q.duration(t.seconds)) for t in s.stages if t.seconds is not None)
    memory = tuple((t.name, t.peak_rss_gb, q.gigabytes(t.peak_rss_gb)) for t in s.stages if t.peak_rss_gb is not None)
    most = Bars("peak resident memory of one rank", memory, "green") if memory else None
    return {}, {"time": Bars("wall-clock time", time), "memory": most}


def _environment(s: Found) -> Part:
    """What the runs' record.json says; where runs differ (a resumed folder), every value is shown."""
    values: dict[str, list[str]] = {}
    for run in s.runs:
        for key, value in _recorded(run.record):
            if value not in values.setdefault(key, []):
                values[key].append(value)
    return {"environment": values}, {}


def _recorded(record: Mapping[str, Any]) -> list[tuple[str, str]]:
    """(key, value) of everything in a record that is not private, keys in words."""
    return [
        (key.replace("_", " "), str(value)[:_LONGEST])
        for key, value in sweep.flat(record, " ").items()
        if value is not None and value != {} and key.split(" ")[-1] not in _PRIVATE
    ]


def _next_steps(s: Found) -> Part:
    """Settings for a model well above the largest: a released size, or twice an own one's width and depth."""
    run = next((run for run in reversed(s.ladder) if run.config is not None), None)
    if run is None:
        return {"config": ""}, {}
    model = run.config.model
    if model.n_layer and model.n_head and model.dim:
        bigger = f"model.n_layer={2 * model.n_layer} model.n_head={2 * model.n_head} model.dim={2 * model.dim}"
    else:
        bigger = "model.size=GPT-L" if model.size == "GPT-B" else "model.size=GPT-XL"
    return {"config": shlex.quote(str((run.folder / "config.yaml").absolute())), "bigger": bigger}, {}


def spread(length: int, most: int) -> Sequence[int]:
    """At most so many indices, the last among them, the others about evenly spread in order."""
    return sorted({round(i * (length - 1) / (most - 1)) for i in range(most)}) if length > most else range(length)


_SECTIONS = {
    "stages": None,
    "sweep": _sweep,
    "training": _training,
    "checkpoints": checkpoints.part,
    "tokenizer": _tokenizer,
    "reconstructions": _tokenizer,
    "ladder": _ladder,
    "samples": _samples,
    "scores": _scores,
    "search": _search,
    "tokenizers": _tokenizers,
    "scaling": _scaling,
    "isoflop": _isoflop,
    "advice": None,
    "recipes": _recipes,
    "same_losses": _same_losses,
    "cost": _cost,
    "environment": _environment,
    "next_steps": _next_steps,
}
