"""How good the samples are: scores beside those of real images, of the tokenizer alone, and of no learning at all."""

import shlex
from collections.abc import Mapping
from typing import Any

from llamagen_dist.report import plots
from llamagen_dist.report.blocks import Block, Columns, Details, Markdown, Section, Table, literal
from llamagen_dist.report.collect import Summary

SETS = {
    "held_out": "real, held out",
    "reconstruction": "real, through tokenizer",
    "model": "samples of the GPT",
    "unigram": "codes by frequency",
    "untrained": "untrained GPT",
}
_COLUMNS = (  # (key, title, how it is written, factor)
    ("fid", "FID", "{:.1f}", 1),
    ("sfid", "sFID", "{:.1f}", 1),
    ("kid_mean", "KID × 1000", "{:.1f}", 1000),
    ("precision", "precision", "{:.2f}", 1),
    ("recall", "recall", "{:.2f}", 1),
    ("class_agreement", "class found", "{:.0%}", 1),
)
_CAPTIONS = {
    "kid_mean": "KID: mean over subsets, ± their standard deviation.",
    "precision": "Precision: share of the images that look like some real one; recall: share of the real ones that "
    "look like some image of the set.",
    "class_agreement": "Class found: how often a small classifier, trained on the real training images, finds the "
    "class that the image was meant to show.",
}
_HOW_LONG = 200


def section(s: Summary) -> Section | None:
    """None only where there is no ladder either, so that there is nothing to score."""
    sets = s.evaluation.get("sets", {})
    if not sets:
        return _missing(s) if s.ladder else None
    blocks: list[Block] = [_table(s.evaluation)]
    fids = [(name, sets[name]["fid"]) for name in SETS if "fid" in sets.get(name, {})]
    if fids:
        drawn = plots.bars(
            [SETS[name] for name, _ in fids],
            [value for _, value in fids],
            [f"{value:.1f}" for _, value in fids],
            "FID (lower is better)",
        )
        blocks.append(Columns((drawn, Markdown("\n\n".join(_compared(s.evaluation))))))
    if rest := _limits(s.evaluation):
        blocks.append(Markdown("\n\n".join(rest)))
    rows = tuple((key, value) for key, value in _flat(s.evaluation.get("record", {})))
    if rows:
        blocks.append(Details("What exactly was computed, and on what", (Table(("recorded", ""), rows),)))
    return Section(
        "Scores",
        tuple(blocks),
        "FID measures how far a set of images is, as a whole, from real ones: 0 would be the same distribution. The "
        "number means little alone, so what it can be at best and at worst is measured too.",
    )


def _table(evaluation: Mapping[str, Any]) -> Table:
    sets = evaluation["sets"]
    names = [name for name in SETS if name in sets] + [name for name in sets if name not in SETS]
    columns = [column for column in _COLUMNS if any(column[0] in sets[name] for name in names)]
    rows = []
    for name in names:
        cells = [
            form.format(factor * sets[name][key]) if key in sets[name] else None for key, _, form, factor in columns
        ]
        for i, (key, _, _, factor) in enumerate(columns):
            if key == "kid_mean" and "kid_std" in sets[name] and cells[i]:
                cells[i] = f"{cells[i]} ± {factor * sets[name]['kid_std']:.1f}"
        rows.append((SETS.get(name, name), *cells))
    captions = [_CAPTIONS[key] for key, *_ in columns if key in _CAPTIONS]
    if isinstance(evaluation.get("n"), int):
        captions.insert(0, f"{evaluation['n']:,} images on either side.")
    if "reconstruction" in sets:
        captions.insert(0, "Compared with training images; “through tokenizer” with the very same held-out images.")
    titles = tuple(title for _, title, _, _ in columns)
    numeric = tuple(range(1, len(titles) + 1))
    return Table(("images", *titles), tuple(rows), numeric, " ".join(captions))


def _compared(evaluation: Mapping[str, Any]) -> list[str]:
    """What the FIDs say, as far as they say it."""
    sets = evaluation["sets"]
    fid = {name: values["fid"] for name, values in sets.items() if "fid" in values}
    text = []
    if "model" in fid and "held_out" in fid:
        text.append(
            f"The samples reach FID **{fid['model']:.1f}**. Real images that were kept apart reach "
            f"**{fid['held_out']:.1f}** in the same measurement: not 0, because {_number(evaluation)} images are few. "
            "That is the best that can be expected here."
        )
    below = [name for name in ("unigram", "untrained") if "model" in fid and name in fid]
    if below:
        beaten = [name for name in below if fid["model"] < fid[name]]
        names = {"unigram": "codes drawn by their frequency alone", "untrained": "the same GPT before training"}
        said = " and ".join(f"{names[name]} (**{fid[name]:.1f}**)" for name in below)
        text.append(
            f"Without a model of how codes go together: {said}. "
            + (
                "The trained model is better than both."
                if len(beaten) == 2
                else "The trained model is better."
                if len(beaten) == len(below)
                else "**The trained model is not better than that**: it has not learnt enough, or was sampled badly."
            )
        )
    if "reconstruction" in fid:
        text.append(
            f"The tokenizer alone costs **{fid['reconstruction']:.1f}**: real images turned into tokens and "
            "back, compared with themselves. What is lost there, no GPT on these tokens can bring back."
        )
    return text


def _limits(evaluation: Mapping[str, Any]) -> list[str]:
    """Class agreement, how far to trust the numbers, and what is absent and why."""
    sets, text = evaluation["sets"], []
    agreed, real = sets.get("model", {}).get("class_agreement"), evaluation.get("class_agreement_real")
    if agreed is not None:
        best = f" On real held-out images it finds **{real:.0%}**." if real is not None else ""
        text.append(f"A classifier of real images finds the intended class in **{agreed:.0%}** of the samples.{best}")
    if any("fid" in values for values in sets.values()):
        text.append(
            f"**How far to trust this:** FID from {_number(evaluation)} images a side is biased upwards and depends "
            "on that number. Compare the rows with each other, never with figures from 10,000 or 50,000 images."
        )
    absent = evaluation.get("absent", {})
    if absent:
        lines = [f"- {literal(name.replace('_', ' '))}: {literal(str(why))}" for name, why in absent.items()]
        text.append("Not measured:\n\n" + "\n".join(lines))
    return text


def _number(evaluation: Mapping[str, Any]) -> str:
    n = evaluation.get("n")
    return f"{n:,}" if isinstance(n, int) else "so few"


def _flat(record: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    pairs = []
    for key, value in record.items():
        if isinstance(value, Mapping):
            pairs += _flat(value, f"{prefix}{key} ")
        elif value is not None:
            pairs.append((f"{prefix}{key}".replace("_", " "), str(value)[:_HOW_LONG]))
    return pairs


def _missing(s: Summary) -> Section:
    out = shlex.quote(str(s.folder.absolute()))
    largest = shlex.quote(str((s.folder / "ladder" / s.ladder[-1].name).absolute()))
    sets = " \\\n  ".join(
        f"sets.{name}.images={out}/{images} sets.{name}.reference={out}/{reference}"
        for name, images, reference in (
            ("model", "samples/model.npz", "images/train"),
            ("held_out", "images/validation", "images/train"),
            ("reconstruction", "reconstructions/reconstruction.npz", "images/validation"),
            ("untrained", "samples/untrained.npz", "images/train"),
            ("unigram", "samples/unigram.npz", "images/train"),
        )
    )
    text = "\n".join(
        (
            f"python -m eval.sample configs/eval/quickstart-sample.yaml checkpoint={largest} \\",
            f"  tokenizer={out}/tokenizer out={out}/samples",
            f"python -m eval.reconstruct configs/eval/quickstart-reconstruct.yaml tokenizer={out}/tokenizer \\",
            f"  images={out}/images/validation out={out}/reconstructions",
            f"python -m eval.evaluate configs/eval/quickstart-evaluate.yaml out={out}/evaluation.json \\",
            f"  classifier.train={out}/images/train classifier.validation={out}/images/validation \\",
            f"  {sets}",
            f"llamagen report {out}",
        )
    ).replace("```", "")
    return Section(
        "Scores",
        (Markdown(f"From the folder that holds `eval/`:\n\n```sh\n{text}\n```"),),
        "Not measured yet. These commands make samples, score them, and write this page again.",
    )
