"""Finished runs as points of a scaling law, each with its exact size and cost: folders here, or runs of a tracker."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from llamagen_dist.build import gpt_config
from llamagen_dist.config import GPTConfigFile, is_remote, load
from llamagen_dist.data.manifest import MANIFEST, read_manifest
from llamagen_dist.data.shards import manifest_of
from llamagen_dist.errors import UserError
from llamagen_dist.files import read_json, read_jsonl
from llamagen_dist.models.cost import total_parameters, training_flops_per_image
from llamagen_dist.models.sizes import GPTConfig
from llamagen_dist.scaling.frontier import non_embedding
from llamagen_dist.scaling.points import Dropped, Options, Points, one_of_a_kind

Count = Literal["blocks", "total"]
COUNTS: Mapping[Count, str] = {
    "blocks": "the blocks' matrices (attention and feed-forward), without embeddings, norms and head",
    "total": "all trainable parameters",
}


@dataclass(frozen=True)
class Rung:
    """One finished run: its model, all its parameters, those of its blocks, its learning rate."""

    name: str
    config: GPTConfig
    params: int
    blocks: int
    lr: float

    @property
    def flops_per_image(self) -> int:
        return training_flops_per_image(self.config)


@dataclass(frozen=True)
class Run:
    """What a run's folder or a tracker says of it.

    sizes: keywords of ``build.gpt_config``. validation: what tells its held-out images from others.
    """

    name: str
    source: str
    config: GPTConfigFile
    params: int | None
    sizes: Mapping[str, Any]
    validation: str
    rows: Sequence[tuple[str, Mapping[str, Any]]]


@dataclass(frozen=True, eq=False)
class Ladder:
    """rungs: from small to large. points.params counts as ``count`` says; one point per end of a (shorter) run.

    decayed: every run ended with a cooldown of its learning rate, and its end is its only point.
    averaged: the losses are those of the moving averages of the weights.
    """

    rungs: tuple[Rung, ...]
    points: Points
    count: Count
    decayed: bool
    averaged: bool
    dropped: tuple[Dropped, ...] = ()

    def rung(self, name: str) -> Rung:
        return next(rung for rung in self.rungs if rung.name == name)


def runs_in(folders: Sequence[Path]) -> tuple[list[Run], list[Dropped]]:
    """The finished GPT runs that these folders are or hold, and what was passed over: unfinished runs, of other kinds.

    Raises UserError: no run, a run of another kind that was itself named, a damaged file, token shards that are gone.
    """
    paths: list[Path] = []
    dropped: list[Dropped] = []
    for folder in folders:
        is_run = (folder / "metrics.jsonl").is_file() or (folder / "summary.json").is_file()
        candidates = [folder] if is_run else sorted(path.parent for path in folder.glob("*/metrics.jsonl"))
        finished = [path for path in candidates if (path / "summary.json").is_file()]
        if not is_run:  # one whose metrics are gone is a damaged run, not an unfinished one
            finished = sorted({*finished, *(path.parent for path in folder.glob("*/summary.json"))})
        dropped += [Dropped(str(path), _how_far(path)) for path in candidates if path not in finished]
        if not finished:
            passed = f" ({len(candidates)} are not finished)" if candidates else ""
            raise UserError(
                f"{folder}: no finished run in it{passed} (a finished run has a summary.json); train the ladder first"
            )
        for path in finished:
            if path.resolve() in {other.resolve() for other in paths}:
                dropped.append(Dropped(str(path), "given twice"))
            else:
                paths.append(path)
    runs = []
    for path in paths:
        config = load(path / "config.yaml", kind="gpt" if path in folders else None)
        if isinstance(config, GPTConfigFile):
            runs.append(_run(path, config))
        else:
            dropped.append(Dropped(str(path), f"a run of kind {config.kind}"))
    if not runs:
        raise UserError(f"{folders[0]}: its runs are of another kind ({dropped[-1].why}); a law is fitted to GPT runs")
    return runs, dropped


def _how_far(folder: Path) -> str:
    """Why an unfinished run is left out."""
    rows = read_jsonl(folder / "metrics.jsonl")
    seen = max((float(row.get("images_seen") or 0) for row in rows), default=0.0)
    return f"not finished ({seen:,.0f} images)"


def _run(folder: Path, config: GPTConfigFile) -> Run:
    summary = read_json(folder / "summary.json")
    manifest = manifest_of(config.data.train, config.data)
    path = folder / "metrics.jsonl"
    try:
        rows = [(f"{path}, after {row.get('images_seen')} images", row) for row in read_jsonl(path, strict=True)]
    except OSError as error:
        raise UserError(f"{path}: cannot be read as metrics ({error}); restore the file") from None
    name = str(summary.get("name", folder.name))
    sizes = manifest.gpt_sizes(config.data.train)
    return Run(name, str(folder), config, summary.get("params"), sizes, held_out_images(config), rows)


def held_out_images(config: GPTConfigFile) -> str:
    """What was measured on which images: losses that differ in it cannot be compared.

    The validation shards' content where they are here, so that a moved copy is the same; else their path."""
    where = config.data.validation
    known = not is_remote(where) and (Path(where) / MANIFEST).is_file()
    content = read_manifest(Path(where)).fingerprint()[:12] if known else str(where)
    averaged = ", the moving average" if config.validation.weights == "ema" else ""
    return f"{content}, {config.validation.images or 'all'} images{averaged}"


def of_runs(runs: Sequence[Run], count: Count, options: Options, dropped: Sequence[Dropped] = ()) -> Ladder:
    """The points of runs, with exact sizes and FLOPs.

    A validation at a constant rate is the end of a shorter run; one after a cooldown is not comparable with it. So
    the points lie before any cooldown, unless every run has one: then they are the runs' ends.
    Raises UserError: runs measured on other images or with other tokens, nothing to compare, a size that is not what
    the run counted.
    """
    one_of_a_kind(((run.validation, run.source) for run in runs), "validation set")
    one_of_a_kind(((f"{run.sizes['vocab_size']} codes", run.source) for run in runs), "vocabulary")
    one_of_a_kind(((f"{run.sizes['image_tokens']} tokens", run.source) for run in runs), "image length")
    decayed = all(run.config.optim.constant_until < math.inf for run in runs)
    averaged = runs[0].config.validation.weights == "ema"  # of one of them as of all: their validation sets are equal
    left_out = list(dropped)
    metric = options.metric or "val_loss"
    rungs: list[Rung] = []
    rows: list[tuple[str, str, dict[str, float]]] = []
    names = _names(runs)
    for run in runs:
        rung = _rung(run, names[run.source])
        rungs.append(rung)
        for source, images, measured in _measured(run, decayed, options, left_out):
            numbers = {
                "params": rung.params if count == "total" else rung.blocks,
                "tokens": images * rung.config.image_tokens,
                **measured,
                "flops": images * rung.flops_per_image,
                "lr": rung.lr,
                "width": rung.config.dim,
            }
            rows.append((source, rung.name, numbers))
    if not rows:
        missing = "held-out loss; train them with validation.at_images" if metric == "val_loss" else f"{metric}"
        raise UserError(f"{runs[0].source}: the runs have no {missing}")
    order = {rung.name: i for i, rung in enumerate(sorted(rungs, key=lambda rung: (rung.params, rung.name)))}
    rows.sort(key=lambda row: order[row[1]])  # stable: along a run as measured
    rungs.sort(key=lambda rung: order[rung.name])
    return Ladder(tuple(rungs), Points.of(rows, options.metric), count, decayed, averaged, tuple(left_out))


def _names(runs: Sequence[Run]) -> dict[str, str]:
    """Source -> name; runs of one name from several folders are called by their folders."""
    called = [run.name for run in runs]
    return {run.source: run.name if called.count(run.name) == 1 else run.source for run in runs}


def _rung(run: Run, name: str) -> Rung:
    model = gpt_config(run.config.model, **run.sizes)
    total = total_parameters(model)
    if run.params != total:
        raise UserError(
            f"{run.source}: summary.json counts {run.params} parameters, but its config and the token shards "
            f"{run.config.data.train} give {total}; the shards were made again since, so train the run again"
        )
    return Rung(name, model, total, non_embedding(model), run.config.optim.lr)


def _measured(
    run: Run, decayed: bool, options: Options, left_out: list[Dropped]
) -> Iterator[tuple[str, float, dict[str, float]]]:
    """Where it stands, images seen, and what was measured there, of the validations that are points: ``loss``, and
    where that is another metric ``val_loss``, NaN where the run has none after as many images."""
    last = math.inf if decayed else run.config.optim.constant_until
    metric = options.metric or "val_loss"
    read: dict[str, list[tuple[str, float, float]]] = {key: [] for key in (metric, "val_loss")}
    for key, there in read.items():
        for source, row in run.rows:
            try:
                if key in row:
                    there.append((source, float(row["images_seen"]), float(row[key])))
            except (KeyError, TypeError, ValueError) as error:
                raise UserError(f"{source}: cannot be read as metrics ({error}); restore the file") from None
    losses = {seen: loss for _, seen, loss in read["val_loss"]}  # the metric of the same weights may be a later line
    measured = []
    for source, seen, value in read[metric]:
        if seen <= 0 or seen > last:
            continue
        if options.drop_bad and not (math.isfinite(seen) and math.isfinite(value) and value > 0):
            left_out.append(Dropped(source, f"{metric} is {value:g}"))
        else:  # NaN passes, for Points to name it
            beside = {} if metric == "val_loss" else {"val_loss": losses.get(seen, math.nan)}
            measured.append((source, seen, {"loss": value, **beside}))
    if last < math.inf and not measured:
        raise UserError(
            f"{run.source}: its rate decays from image {last} on, and it has no {metric} before that to compare "
            "with the runs at a constant rate; validate at or before optim.cooldown_from, or take it out of the folder"
        )
    yield from measured[-1:] if decayed else measured
