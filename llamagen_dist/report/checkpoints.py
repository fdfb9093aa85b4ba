"""Scores of a run's checkpoints: FID over images, and EP_FID@k, the training that a FID of k costs."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from llamagen_dist.evaluation.record import VALUES, differences, read_result
from llamagen_dist.report import quantities as q
from llamagen_dist.report.blocks import Block, Figure, Panel, Series
from llamagen_dist.report.collect import Found, Run
from llamagen_dist.scaling.recipes import first_at
from llamagen_dist.tracking import evaluations

MOST_CURVES = 16
_COLUMNS = tuple(key for keys in VALUES.values() for key in keys if key != "fid")


def epochs_to(run: Run, level: float) -> str:
    """EP_FID@k of a run in words (RAEv2, arXiv 2605.18324); empty where no FID of it was measured."""
    points = _points(run)
    if not points:
        return ""
    images, epoch = first_at(points, level), run.epoch
    if images is None:
        return f"not reached ({min(fid for _, fid in points):.2f} at best)"
    return f"{images:,} images" if epoch is None else f"{images / epoch:.3g} epochs ({images:,} images)"


def levels(runs: Sequence[Run]) -> list[float]:
    """The k that the configs of runs with scores name, the largest first."""
    sections = [run.config.evaluation for run in runs if _points(run) and run.kind == "gpt" and run.config is not None]
    named = {level for section in sections if section is not None for level in section.ep_fid}
    return sorted(named or ({10.0, 5.0, 2.0} if sections else set()), reverse=True)


def part(s: Found) -> tuple[dict[str, Any], dict[str, Block | None]]:
    """What the section reads: runs with scores or failures, EP_FID, what makes scores incomparable."""
    broken = [(run.name, step, *why) for run in s.runs for step, why in _failures(run)]
    runs = [run for run in s.runs if run.scored]
    if not runs and not broken:
        return {}, {}
    thresholds = levels(runs)
    facts = {
        "runs_scored": runs,
        "columns": [key for key in _COLUMNS if any(key in line for run in runs for line in run.scored)],
        "levels": thresholds,
        "reached": [(run, [epochs_to(run, level) for level in thresholds]) for run in runs if _points(run)],
        "broken": broken,
        "unlike": [note for run in runs for note in unlike(run)],
    }
    return facts, {"fid": _curves([run for run in runs if _points(run)])}


def _points(run: Run) -> list[tuple[int, float]]:
    return [(line["images_seen"], line["fid"]) for line in run.scored if "fid" in line]


def _failures(run: Run) -> list[tuple[int, tuple[str, str]]]:
    known = [(evaluations.step_of(one), evaluations.failed(one)) for one in evaluations.begun(run.folder)]
    return [(step, (why[0], str(why[1]))) for step, why in known if why is not None]


def unlike(run: Run) -> list[str]:
    """Why scores of a run's checkpoints are not comparable with those of its first; one sentence a checkpoint."""
    results = [(line, read_result(run.folder / line["result"])) for line in run.scored]
    notes = []
    for line, result in results[1:]:
        first, own = (_drawn(one) | {"weights": one[0]["weights"]} for one in (results[0], (line, result)))
        other = [f"{key}: {first.get(key)} -> {own[key]}" for key in own if own[key] != first.get(key)]
        if lines := [*differences(results[0][1], result), *other]:
            notes.append(
                f"{run.name}, step {line['step']} is not comparable with step {results[0][0]['step']} "
                f"({'; '.join(lines)})"
            )
    return notes


def _drawn(one: tuple[Mapping[str, Any], Mapping[str, Any]]) -> dict[str, Any]:
    """How the pictures were drawn, but for the checkpoint."""
    made = one[1]["record"]["sets"][evaluations.SET]["images"].get("made_by") or {}
    return {key: value for key, value in made.items() if key != "checkpoint_sha256"}


def _curves(runs: Sequence[Run]) -> Figure | None:
    shown = sorted(runs, key=lambda run: min(fid for _, fid in _points(run)))[:MOST_CURVES]
    if not any(len(_points(run)) > 1 for run in shown):
        return None
    series = []
    for number, run in reversed(list(enumerate(shown))):
        x, y = np.array(sorted(_points(run)), float).T
        colour = 1.0 - number / len(shown)
        series.append(Series(run.name, x, y, "dotted line", colour, run.name if len(shown) > 1 else ""))
    alt = f"FID of checkpoints against images seen: {', '.join(run.name for run in shown)}"
    counts = {line["n"] for run in shown for line in run.scored}
    of = f"{q.count(counts.pop())} pictures each" if len(counts) == 1 else "of different numbers of pictures"
    return Figure((Panel("FID (lower is better)", tuple(series)),), alt, "images seen", caption=f"{of}.")
