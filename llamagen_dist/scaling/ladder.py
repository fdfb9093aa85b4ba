"""A folder of finished runs as points of a scaling law, each with its exact size and cost."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from llamagen_dist.build import gpt_config
from llamagen_dist.config import GPTConfigFile, load
from llamagen_dist.data.shards import manifest_of
from llamagen_dist.errors import UserError
from llamagen_dist.files import read_json, read_jsonl
from llamagen_dist.models.cost import total_parameters, training_flops_per_image
from llamagen_dist.models.gpt import GPTConfig
from llamagen_dist.scaling.frontier import non_embedding
from llamagen_dist.scaling.points import Points

Count = Literal["blocks", "total"]
COUNTS: Mapping[Count, str] = {
    "blocks": "the blocks' matrices (attention and feed-forward), without embeddings, norms and head",
    "total": "all trainable parameters",
}


@dataclass(frozen=True)
class Rung:
    """One finished run: its model, all its parameters, those of its blocks."""

    name: str
    config: GPTConfig
    params: int
    blocks: int

    @property
    def flops_per_image(self) -> int:
        return training_flops_per_image(self.config)


@dataclass(frozen=True, eq=False)
class Ladder:
    """rungs: from small to large. points.params counts as ``count`` says; one point per end of a (shorter) run.

    decayed: every run ended with a cooldown of its learning rate, and its end is its only point.
    """

    rungs: tuple[Rung, ...]
    points: Points
    count: Count
    decayed: bool

    def rung(self, name: str) -> Rung:
        return next(rung for rung in self.rungs if rung.name == name)


def read_ladder(folder: Path, count: Count = "blocks") -> Ladder:
    """Every finished run under ``folder``.

    A validation at a constant rate is the end of a shorter run; one after a cooldown is not comparable with it. So
    the points lie before any cooldown, unless every run has one: then they are the runs' ends.
    Raises UserError: no runs, a damaged file, token shards that are gone, runs with nothing to compare.
    """
    paths = sorted(path.parent for path in folder.glob("*/summary.json"))
    if not paths:
        raise UserError(f"{folder}: no finished run in it (a finished run has a summary.json); train the ladder first")
    configs = [(path, _config(path)) for path in paths]
    decayed = all(config.optim.constant_until < math.inf for _, config in configs)
    measured_rungs = sorted(
        (_rung(*pair, decayed) for pair in configs), key=lambda pair: (pair[0].params, pair[0].name)
    )
    rows = [
        (float(rung.params if count == "total" else rung.blocks), tokens, loss, rung.name, source)
        for rung, measured in measured_rungs
        for tokens, loss, source in measured
    ]
    if not rows:
        raise UserError(f"{folder}: its runs have no held-out loss; train them with validation.at_images")
    params, tokens, loss, names, sources = zip(*rows, strict=True)
    points = Points(np.array(params), np.array(tokens), np.array(loss), names, sources)
    return Ladder(tuple(rung for rung, _ in measured_rungs), points, count, decayed)


def _config(folder: Path) -> GPTConfigFile:
    config = load(folder / "config.yaml", kind="gpt")
    assert isinstance(config, GPTConfigFile)
    return config


def _rung(folder: Path, config: GPTConfigFile, decayed: bool) -> tuple[Rung, list[tuple[float, float, str]]]:
    summary = read_json(folder / "summary.json")
    manifest = manifest_of(config.data.train, config.data)
    model = gpt_config(config.model, **manifest.gpt_sizes(config.data.train))
    total = total_parameters(model)
    if summary.get("params") != total:
        raise UserError(
            f"{folder}: summary.json counts {summary.get('params')} parameters, but its config and the token shards "
            f"{config.data.train} give {total}; the shards were made again since, so train the run again"
        )
    rung = Rung(str(summary.get("name", folder.name)), model, total, non_embedding(model))
    last = math.inf if decayed else config.optim.constant_until
    measured = _measured(folder, last, model.image_tokens)
    if last < math.inf and not measured:
        raise UserError(
            f"{folder}: its rate decays from image {last} on, and it has no held-out loss before that to compare with "
            "the runs at a constant rate; validate at or before optim.cooldown_from, or take it out of the folder"
        )
    return rung, measured[-1:] if decayed else measured


def _measured(folder: Path, last: float, tokens_per_image: int) -> list[tuple[float, float, str]]:
    """(tokens seen, held-out loss, where it stands) of the validations up to image ``last``."""
    path = folder / "metrics.jsonl"
    measured = []
    try:
        for values in read_jsonl(path, strict=True):
            if "val_loss" not in values:
                continue
            seen, loss = float(values["images_seen"]), float(values["val_loss"])
            if not (seen <= 0 or seen > last):  # NaN passes, for Points to name it
                measured.append((seen * tokens_per_image, loss, f"{path}, after {seen:,.0f} images"))
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path}: cannot be read as metrics ({error}); restore the file") from None
    return measured
