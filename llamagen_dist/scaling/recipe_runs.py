"""Finished runs as trials of recipes: which of their settings are switches, which were tuned, and what each cost."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from llamagen_dist.build import gpt_config
from llamagen_dist.config import GPTConfigFile
from llamagen_dist.errors import UserError
from llamagen_dist.models.cost import training_flops_per_image
from llamagen_dist.models.sizes import GPTConfig
from llamagen_dist.scaling.ladder import Run, runs_in
from llamagen_dist.scaling.points import Dropped, flattened
from llamagen_dist.scaling.recipes import Settings, Trial, compare
from llamagen_dist.tracking import evaluations

_SEED = "train.seed"
# Where a run stands, how it is executed and watched, and how long it is.
_NEITHER = (
    *("kind", "run_dir", "ladder", "data", "parallel", "validation", "checkpoint", "log", "tracking", "guard"),
    *("evaluation", "init_from", "init_classes", "train.micro_batch", "compute.recompute_every", "compute.compile"),
)
_LENGTHS = ("optim.cooldown_from", "train.anneal_from", "train.anneal_until")
_SHAPE = ("model.size", "model.n_layer", "model.n_head", "model.dim")


def recipes(folders: Sequence[Path]) -> tuple[dict[str, Any], list[Dropped]]:
    """``compare`` of the finished GPT runs that these folders are or hold, and what was left out.

    Raises UserError as ``runs_in`` and ``compare`` do, and for a run without a held-out loss.
    """
    runs, dropped = runs_in(folders)
    settings = [flattened(run.config.model_dump(mode="json")) for run in runs]
    keys = [key for key in dict.fromkeys(k for one in settings for k in one) if _differs(key, settings)]
    switches = [key for key in keys if not _is_tuned(key)]
    tuned = [key for key in keys if _is_tuned(key)]
    sets = _image_sets(runs)
    trials = [
        _trial(run, image_set, _of(one, switches), _of(one, tuned))
        for run, one, image_set in zip(runs, settings, sets, strict=True)
    ]
    off = flattened(_plain(runs[0].config).model_dump(mode="json"))
    levels = {k for run in runs if run.config.evaluation is not None for k in run.config.evaluation.ep_fid}
    return compare(trials, _of(off, switches), sorted(levels, reverse=True)), dropped


def _differs(key: str, settings: Sequence[Mapping[str, Any]]) -> bool:
    """Whether a key belongs to a recipe and has several values."""
    aside = any(f"{key}.".startswith(f"{one}.") for one in (*_NEITHER, *_LENGTHS, *_SHAPE, _SEED))
    return not aside and not key.endswith("images") and len({repr(one.get(key)) for one in settings}) > 1


def _is_tuned(key: str) -> bool:
    return key.startswith("optim.") and key != "optim.kind"


def _of(settings: Mapping[str, Any], keys: Sequence[str]) -> Settings:
    return tuple((key, _hashable(settings.get(key))) for key in keys)


def _hashable(value: Any) -> Any:
    return tuple(map(_hashable, value)) if isinstance(value, list) else value


def _plain(config: GPTConfigFile) -> GPTConfigFile:
    """A config with nothing set but what has to be: its switches are off."""
    kept = {"kind": "gpt", "run_dir": config.run_dir, "data": config.data.model_dump()}
    shape = {name: getattr(config.model, name) for name in (key.removeprefix("model.") for key in _SHAPE)}
    train = {"images": config.train.global_batch, "global_batch": config.train.global_batch}
    return GPTConfigFile.model_validate({**kept, "model": shape, "train": train})


def _image_sets(runs: Sequence[Run]) -> list[str]:
    """Of each run, called by what differs between their training shards' paths."""
    paths = [Path(str(run.config.data.train)).parts for run in runs]
    shared = set.intersection(*(set(path) for path in paths)) if len(set(paths)) > 1 else set()
    return ["/".join(part for part in path if part not in shared) if shared else "" for path in paths]


def flops_per_image(config: GPTConfigFile, model: GPTConfig) -> float:
    """Of training, with what Muon's five Newton-Schulz steps add: each multiplies a matrix, (m, n) with m <= n, by its
    transpose, the product by itself, and that by the matrix. It is paid per step, so large batches share it."""
    flops = float(training_flops_per_image(model))
    if config.optim.kind == "muon":
        d, f, kv = model.dim, model.ffn_dim, model.kv_heads * model.head_dim
        shapes = [(d, d), (kv, d), (kv, d), (d, d), (d, f), (d, f), (d, f)]  # q, k, v and output; the feed-forward's
        sides = [(min(shape), max(shape)) for shape in shapes]
        flops += model.n_layer * 5 * sum(4 * m * m * n + 2 * m**3 for m, n in sides) / config.train.global_batch
    return flops


def _trial(run: Run, image_set: str, switches: Settings, tuned: Settings) -> Trial:
    model = gpt_config(run.config.model, **run.sizes)
    flops = flops_per_image(run.config, model)
    measured: dict[float, float] = {}
    for source, row in run.rows:
        try:
            if "val_loss" in row and row["images_seen"] > 0:
                measured[float(row["images_seen"])] = float(row["val_loss"])
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(f"{source}: cannot be read as metrics ({error}); restore the file") from None
    if not measured:
        raise UserError(f"{run.source}: has no held-out loss; train it with validation.at_images")
    images, loss = np.array(sorted(measured.items())).T
    if not np.isfinite(loss).all():
        at = images[np.flatnonzero(~np.isfinite(loss))[0]]
        raise UserError(f"{run.source}: its held-out loss after {at:,.0f} images is not a number; take the run out")
    fid = [
        (line["images_seen"] * flops, float(line["fid"]))
        for line in evaluations.lines(Path(run.source))
        if "fid" in line
    ]
    size = f"{model.n_layer} layers of width {model.dim}"
    task = f"{image_set}, {size}" if image_set else size
    return Trial(
        run.name, task, switches, tuned, run.config.train.seed, images * flops, loss, tuple(sorted(fid)), 1 / flops
    )
