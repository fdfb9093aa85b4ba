"""What may change between two starts of one run, and what may not."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llamagen_dist.config.loader import difference, load
from llamagen_dist.config.section import Section
from llamagen_dist.errors import UserError

# How a run is executed and watched, never what is computed.
ELASTIC = (
    "run_dir",
    "parallel",
    "train.micro_batch",
    "compute.recompute_every",
    "compute.compile",
    "checkpoint",
    "guard",
    "log",
    "validation.batch",
    "data.workers",
    "data.cache",
    "data.cache_gb",
    "data.stage",
    "data.allow_pipe",
    "ladder",
)


# Moving these leaves a run the same up to where the old schedule and the new one part.
SCHEDULE = ("optim.schedule", "optim.cosine_images", "optim.cooldown_from", "optim.cooldown_images", "optim.final_lr")
# These may lie elsewhere: a run is the same on the same shards, which their fingerprint tells (training/run.py).
DATA = ("data.train", "data.validation")


@dataclass(frozen=True)
class Change:
    """How the config a run is started with differs from its own; all of it is allowed.

    lines: what to print about it; none where nothing differs.
    moved: keys of DATA with another path; whether the data are the same is still to be checked.
    grows: whether train.images was raised.
    alike_until: a checkpoint of at most so many images is also one of a run with the new config; infinite where the
        learning rates are the same everywhere.
    """

    lines: tuple[str, ...] = ()
    moved: tuple[str, ...] = ()
    grows: bool = False
    alike_until: float = math.inf


def compare(directory: Path, config: Section) -> Change:
    """What differs from the config of the run in ``directory``. Raises UserError for what may not."""
    path = directory / "config.yaml"
    if not path.exists():
        return Change()
    before: Any = load(path)
    now: Any = config
    both = before.kind == now.kind and hasattr(now, "train") and hasattr(now, "optim")
    grows = both and now.train.images > before.train.images
    may_change = (*ELASTIC, *((*SCHEDULE, *DATA) if both else ()), *(("train.images",) if grows else ()))
    if changed := difference(before, config, ignore=may_change):
        raise UserError(
            f"{directory}: holds a run with another config ({'; '.join(changed)}); "
            "choose another run_dir, or use the old values to continue it"
        )
    allowed = difference(before, config, ignore=("run_dir", "ladder"))
    if not allowed:
        return Change()
    keys = [line.split(": ")[0] for line in allowed]
    line = f"{directory}: changed since the last start, which is allowed: {'; '.join(allowed)}"
    if grows and now.train.images > now.optim.ends_at:
        line += f"; from image {now.optim.ends_at:,} on the learning rate stays at optim.final_lr {now.optim.final_lr}"
    alike_until = math.inf
    if any(key in SCHEDULE for key in keys):
        alike_until = min(before.optim.constant_until, now.optim.constant_until)
    return Change((line,), tuple(key for key in keys if key in DATA), grows, alike_until)


def same_config(directory: Path, config: Section) -> list[str]:
    """``compare``'s lines, for those who only start the run."""
    return list(compare(directory, config).lines)
