"""Recipes against a tuned baseline: which share of its compute reaches its loss, with bands over seeds.

A recipe is what switches say (order, guidance, optimizer, norms); its settings are what was searched for it (learning
rate, betas, decay, schedule). Runs are compared within a task, images and size of the model, seed by seed.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from llamagen_dist.errors import UserError
from llamagen_dist.scaling.laws import Floats

Settings = tuple[tuple[str, Any], ...]
"""(dotted key, value) each, in one order for all runs."""
EQUAL = 0.05  # compute that differs by more than this share is not called equal
BASELINE = "baseline"
_RATES = ("optim.lr", "optim.muon_lr")


@dataclass(frozen=True, eq=False)
class Trial:
    """One finished run.

    switches, tuned: the keys that differ between any two runs, and this one's values. task: what it was trained on.
    flops, loss: float64 [n], training FLOPs and held-out loss (nats per token) along the run, in order, at least one.
    fid: (FLOPs, FID) of its checkpoints. images_per_flop: what turns FLOPs back into images.
    """

    name: str
    task: str
    switches: Settings
    tuned: Settings
    seed: int
    flops: Floats
    loss: Floats
    fid: tuple[tuple[float, float], ...] = ()
    images_per_flop: float = 1.0


def first_at(points: Iterable[tuple[float, float]], level: float) -> float | None:
    """The least x of (x, y) in any order whose y is ``level`` or lower; None: none is. A y that is NaN reaches nothing.

    Only what was measured counts, so that no line between two measurements promises what neither has.
    """
    return min((x for x, y in points if y <= level), default=None)


def best_so_far(trials: Sequence[Trial]) -> tuple[Floats, Floats]:
    """FLOPs, ascending, and the lowest loss that any of these runs (of one seed) had for at most so many."""
    flops, loss = (np.concatenate([getattr(t, key) for t in trials]) for key in ("flops", "loss"))
    order = np.lexsort((loss, flops))
    flops, first = np.unique(flops[order], return_index=True)
    return flops, np.minimum.accumulate(loss[order][first])


def compute_to(flops: Floats, loss: Floats, target: float) -> float | None:
    """FLOPs at which a falling curve reaches ``target``, linear in log FLOPs between its points; None: it does not.

    A curve whose first point is as low already gives that point's FLOPs, which are then an upper bound.
    """
    reached = np.flatnonzero(loss <= target)
    if not len(reached):
        return None
    i = int(reached[0])
    if i == 0:
        return float(flops[0])
    share = (loss[i - 1] - target) / (loss[i - 1] - loss[i])
    return float(flops[i - 1] * (flops[i] / flops[i - 1]) ** share)


def band(values: Sequence[float]) -> dict[str, Any]:
    """Mean and range over seeds; with three of them a range is all that can honestly be given."""
    return {"mean": float(np.mean(values)), "low": min(values), "high": max(values), "seeds": len(values)}


def compare(trials: Sequence[Trial], baseline: Settings, levels: Sequence[float] = ()) -> dict[str, Any]:
    """The table, as JSON-serialisable values.

    baseline: the switches' values that are it. levels: FIDs whose compute is asked for (EP_FID@k).
    Raises UserError: no baseline for a task, two runs that are the same.
    """
    notes: list[str] = []
    tasks = []
    for task in dict.fromkeys(t.task for t in trials):
        tasks.append(_task(task, [t for t in trials if t.task == task], baseline, levels, notes))
    return {
        "baseline": dict(baseline),
        "switches": [key for key, _ in trials[0].switches],
        "tuned": [key for key, _ in trials[0].tuned],
        "levels": list(levels),
        "tasks": tasks,
        "warnings": notes,
    }


def _task(
    task: str, trials: Sequence[Trial], baseline: Settings, levels: Sequence[float], notes: list[str]
) -> dict[str, Any]:
    recipes = {s: [t for t in trials if t.switches == s] for s in dict.fromkeys(t.switches for t in trials)}
    if baseline not in recipes:
        off = ", ".join(f"{key}={value}" for key, value in baseline) or "all switches off"
        raise UserError(f"{task}: no finished run of the baseline ({off}) to compare the others with; train it as well")
    names = {switches: called(switches, baseline) for switches in recipes}
    order = [baseline, *(switches for switches in recipes if switches != baseline)]
    search, chosen = [], {}
    for switches in order:
        rows, best = _search(f"{task}, {names[switches]}", recipes[switches], notes)
        search += [{"recipe": names[switches], **row} for row in rows]
        chosen[switches] = [t for t in recipes[switches] if t.tuned == best]
    seeds = sorted({t.seed for t in trials})
    against = _by_seed(chosen[baseline])
    rows = []
    for switches in order:
        searched = sum(row["recipe"] == names[switches] for row in search)
        by_seed = _by_seed(chosen[switches])
        row = {"recipe": names[switches], "switches": dict(switches), "searched": searched}
        rows.append(row | _row(by_seed, against, levels))
        if missing := [str(seed) for seed in seeds if seed not in by_seed]:
            notes.append(f"{task}, {names[switches]}: no finished run of seed {', '.join(missing)}")
    own = rows[0]
    for row in rows[1:]:
        if abs(row["flops"] / own["flops"] - 1) > EQUAL:
            notes.append(
                f"{task}, {row['recipe']}: trained with {row['flops'] / own['flops']:.2f} times the baseline's "
                "compute; compare shares of compute, not losses at the end"
            )
        if row["searched"] > own["searched"]:
            notes.append(
                f"{task}: {row['searched']} settings of {row['recipe']} were searched and {own['searched']} of the "
                "baseline, which may only lack tuning"
            )
    return {"task": task, "seeds": seeds, "rows": rows, "search": search}


def called(switches: Settings, baseline: Settings) -> str:
    """What differs from the baseline, in words: ``muon + qk_norm``."""
    words = []
    for key, value in switches:
        if (key, value) in baseline:
            continue
        last = key.rpartition(".")[2]
        number = f"{last} {value:g}" if isinstance(value, float) else f"{last} {value}"
        words.append(last if value is True else value if isinstance(value, str) else number)
    return " + ".join(words) or BASELINE


def _by_seed(trials: Sequence[Trial]) -> dict[int, list[Trial]]:
    return {seed: [t for t in trials if t.seed == seed] for seed in sorted({t.seed for t in trials})}


def _mean_end(by_seed: Mapping[int, Sequence[Trial]]) -> float:
    return float(np.mean([_final(runs).loss[-1] for runs in by_seed.values()])) if by_seed else np.inf


def _final(trials: Sequence[Trial]) -> Trial:
    """Of one seed's runs the longest."""
    return max(trials, key=lambda t: t.flops[-1])


def _search(what: str, trials: Sequence[Trial], notes: list[str]) -> tuple[list[dict[str, Any]], Settings]:
    """A row for each setting that was tried, and the best by mean loss at the end of those with the most seeds."""
    settings = {s: _by_seed([t for t in trials if t.tuned == s]) for s in dict.fromkeys(t.tuned for t in trials)}
    for by_seed in settings.values():
        for runs in by_seed.values():
            ends = [float(t.flops[-1]) for t in runs]
            if len(set(ends)) < len(ends):
                raise UserError(f"{what}: {runs[0].name} and {runs[1].name} are the same recipe, settings and seed")
    most = max(len(by_seed) for by_seed in settings.values())
    best = min((s for s, by in settings.items() if len(by) == most), key=lambda s: _mean_end(settings[s]))
    for s, by_seed in settings.items():
        shared = by_seed.keys() & settings[best].keys()
        own, its = (_mean_end({seed: by[seed] for seed in shared}) for by in (settings[best], by_seed))
        if shared and its < own:
            shown = ", ".join(f"{key} {value}" for key, value in s)
            notes.append(
                f"{what}: {shown} is better on the seeds that it has ({its:.4f} against {own:.4f} of the chosen one), "
                "but has fewer; train the others as well"
            )
    rows = [
        {
            "settings": dict(s),
            "seeds": sorted(by_seed),
            "loss": band([float(_final(runs).loss[-1]) for runs in by_seed.values()]),
            "chosen": s == best,
        }
        for s, by_seed in settings.items()
    ]
    for key in _RATES:
        rates = sorted({value for s in settings for k, value in s if k == key and value is not None})
        if len(rates) > 1 and (rate := dict(best)[key]) in (rates[0], rates[-1]):
            end = "highest" if rate == rates[-1] else "lowest"
            notes.append(f"{what}: its {end} {key} of those tried ({rate:g}) is best; a better one may lie beyond")
    return rows, best


def _row(
    runs: Mapping[int, list[Trial]], against: Mapping[int, list[Trial]], levels: Sequence[float]
) -> dict[str, Any]:
    finals = {seed: _final(own) for seed, own in runs.items()}
    ends = {seed: _final(own) for seed, own in against.items() if seed in runs}
    shares: dict[int, float | None] = {}
    for seed, end in ends.items():
        reached = compute_to(*best_so_far(runs[seed]), float(end.loss[-1]))
        shares[seed] = None if reached is None else reached / float(end.flops[-1])
    known = [share for share in shares.values() if share is not None]
    row: dict[str, Any] = {
        "settings": dict(next(iter(finals.values())).tuned),
        "seeds": sorted(runs),
        "flops": float(np.mean([t.flops[-1] for t in finals.values()])),
        "loss": band([float(t.loss[-1]) for t in finals.values()]),
        "to_loss": {"shares": {str(seed): share for seed, share in shares.items()}, "reached": len(known)},
        "curve": _curve({seed: best_so_far(own) for seed, own in runs.items()}),
    }
    if known:
        row["to_loss"] |= band(known)
    if ends:
        row["gain"] = band([float(ends[seed].loss[-1] - finals[seed].loss[-1]) for seed in ends])
    scored = {seed: t.fid for seed, t in finals.items() if t.fid}
    if scored:
        curves = {seed: (np.array(points).T[0], np.array(points).T[1]) for seed, points in scored.items()}
        row["fid"] = band([float(curve[1][-1]) for curve in curves.values()])
        row["fid_curve"] = _curve(curves)
        row["ep_fid"] = [_reached(level, scored, finals) for level in levels]
    return row


def _reached(
    level: float, scored: Mapping[int, tuple[tuple[float, float], ...]], finals: Mapping[int, Trial]
) -> dict[str, Any]:
    """EP_FID@k in FLOPs and images (RAEv2, arXiv 2605.18324, counts epochs)."""
    at = {seed: first_at(points, level) for seed, points in scored.items()}
    known = {seed: flops for seed, flops in at.items() if flops is not None}
    one: dict[str, Any] = {"level": level, "reached": len(known), "seeds": len(at)}
    if known:
        one["flops"] = band(list(known.values()))
        one["images"] = band([flops * finals[seed].images_per_flop for seed, flops in known.items()])
    return one


def _curve(curves: Mapping[int, tuple[Floats, Floats]]) -> dict[str, list[float]]:
    """Mean and range over seeds where all of them were measured."""
    shared = sorted(set.intersection(*(set(x.tolist()) for x, _ in curves.values())))
    values = np.array(
        [[dict(zip(x.tolist(), y.tolist(), strict=True))[at] for at in shared] for x, y in curves.values()]
    )
    ends = (("mean", values.mean(0)), ("low", values.min(0)), ("high", values.max(0)))
    return {"flops": shared, **{name: line.tolist() for name, line in ends}}
