"""A sweep's points from best to worst, what differs between them, and their curves."""

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from llamagen_dist.report import checkpoints
from llamagen_dist.report import quantities as q
from llamagen_dist.report.blocks import Block
from llamagen_dist.report.collect import Found, Run
from llamagen_dist.report.figures import held_out

_OWN = ("run_dir", "out", "ladder", "kind")  # keys that differ by what a point is, not by what it tries


def facts(s: Found) -> dict[str, Any]:
    """What the template says of a sweep.

    runs: best first, those without a score or an end last; ranked: the finished ones with a score.
    differs: dotted key -> each of ``runs``' values as text, for keys that do not have one value in all.
    ep_fid: (k, EP_FID@k of each of ``runs`` in words) where checkpoints were scored.
    grid: scores by the two keys that differ, where those are all and name every ranked point.
    """
    runs, ranked = order(s)
    unit = "FID" if any(run.evaluation for run in runs) else "held-out loss"
    states = [run.state.partition(":")[0] for run in runs]
    counts = {state: states.count(state) for state in ("finished", "failed", "unfinished")}
    notes = [f"the config of {run.name} is of another version ({run.note})" for run in runs if run.note]
    notes += sorted({f"no curve over FLOPs: {why}" for run in runs if isinstance(why := run.flops_per_image, str)})
    differs = differing(runs)
    return {
        "runs": runs,
        "ranked": ranked,
        "unit": unit,
        "score": lambda run: "–" if run.score is None else f"{run.score:.2f}" if run.evaluation else q.loss(run.score),
        "counts": counts | {"never": len(s.missing), "all": len(runs) + len(s.missing)},
        "differs": differs,
        "notes": notes,
        "grid": _grid(ranked),
        "ep_fid": [(level, [checkpoints.epochs_to(run, level) for run in runs]) for level in checkpoints.levels(runs)],
    }


def order(s: Found) -> tuple[list[Run], list[Run]]:
    """(all points, the ranked ones among them), best first."""

    def rank(run: Run) -> tuple[float, str]:
        return (math.inf if run.score is None else run.score, run.name)

    ranked = sorted((run for run in s.runs if run.state == "finished" and run.score is not None), key=rank)
    return [*ranked, *sorted((run for run in s.runs if run not in ranked), key=rank)], ranked


def differing(runs: Sequence[Run]) -> dict[str, list[str]]:
    """Dotted keys of the configs that do not have one value in all runs -> each run's value as text."""
    flattened = [flat(run.config.model_dump(mode="json") if run.config else run.settings) for run in runs]
    keys = [key for key in dict.fromkeys(k for one in flattened for k in one) if key.partition(".")[0] not in _OWN]
    columns = {key: [_word(one[key]) if key in one else "" for one in flattened] for key in keys}
    return {key: values for key, values in columns.items() if len(set(values)) > 1}


def flat(value: Any, join: str = ".", prefix: str = "") -> dict[str, Any]:
    """A config or a record as one level, names joined."""
    if isinstance(value, Mapping) and value:
        return {k: v for name, inner in value.items() for k, v in flat(inner, join, f"{prefix}{name}{join}").items()}
    return {prefix[: -len(join)]: value}


def _word(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else value if isinstance(value, str) else json.dumps(value)


def _grid(runs: Sequence[Run]) -> dict[str, Any] | None:
    differs = differing(runs)
    if len(differs) != 2:
        return None
    (down, left), (across, top) = differs.items()
    cells = dict(zip(zip(left, top, strict=True), runs, strict=True))
    rows, columns = (sorted(set(values), key=_number) for values in (left, top))
    if len(cells) < len(runs) or min(len(rows), len(columns)) < 2:
        return None
    table = [(row, [cells.get((row, column)) for column in columns]) for row in rows]
    return {"down": down, "across": across, "columns": columns, "rows": table}


def _number(text: str) -> tuple[float, str]:
    try:
        return float(text), text
    except ValueError:
        return math.inf, text


def curves(s: Found) -> dict[str, Block | None]:
    """Loss over images seen and over FLOPs, the best drawn strongest."""
    every = [run for run in order(s)[0] if run.training or run.validation]
    shown = every[: checkpoints.MOST_CURVES]
    more = f"The best {len(shown)}; {len(every) - len(shown)} more are left out." if len(every) > len(shown) else ""
    costs = {run.name: float(cost) for run in shown if isinstance(cost := run.flops_per_image, int)}
    known = [run for run in shown if run.name in costs]
    ones = dict.fromkeys((run.name for run in shown), 1.0)
    return {
        "images": held_out(shown, ones, "images seen", more) if shown else None,
        "flops": held_out(known, costs, "training FLOPs", more) if known else None,
    }
