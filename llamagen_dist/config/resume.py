"""What may change between two starts of one run, and what may not."""

import math
from dataclasses import dataclass
from pathlib import Path

from llamagen_dist.config.loader import difference, load
from llamagen_dist.config.section import Section
from llamagen_dist.config.training import TrainingConfig
from llamagen_dist.errors import UserError

# How a run is executed and watched, never what is computed.
ELASTIC = (
    *("run_dir", "ladder", "parallel", "checkpoint", "guard", "log", "tracking", "evaluation"),
    *("train.micro_batch", "validation.batch", "compute.recompute_every", "compute.compile"),
    *("compute.channels_last", "validation.rfid", "validation.inception", "validation.lpips"),
    *("data.workers", "data.cache", "data.cache_gb", "data.stage", "data.allow_pipe"),
)
# Moving these leaves a run the same up to where the old schedule and the new one part.
SCHEDULE = ("optim.schedule", "optim.cosine_images", "optim.cooldown_from", "optim.cooldown_images", "optim.final_lr")
# These may lie elsewhere: a run is the same on the same shards, which their fingerprint tells (training/run.py).
DATA = ("data.train", "data.validation")


@dataclass(frozen=True)
class Change:
    """How the config a run is started with differs from its own.

    allowed, refused: ``key: old -> new`` lines.
    moved: keys of DATA with another path; whether the data are the same is still to be checked.
    grows: whether train.images was raised.
    alike_until: a checkpoint of at most so many images is also one of a run with the new config; infinite where the
        learning rates are the same everywhere.
    note: what else to say about it.
    """

    allowed: tuple[str, ...] = ()
    refused: tuple[str, ...] = ()
    moved: tuple[str, ...] = ()
    grows: bool = False
    alike_until: float = math.inf
    note: str = ""

    @property
    def reopens(self) -> bool:
        """Whether a finished run is not finished any more."""
        return self.grows or self.alike_until < math.inf

    def lines(self, directory: Path) -> list[str]:
        """What to print about it; none where nothing differs."""
        said = f"{directory}: changed since the last start, which is allowed: {'; '.join(self.allowed)}{self.note}"
        return [said] if self.allowed else []


def between(before: Section, now: Section) -> Change:
    """How ``now`` differs from ``before``."""
    if not isinstance(before, TrainingConfig) or not isinstance(now, TrainingConfig) or before.kind != now.kind:
        return Change(refused=tuple(difference(before, now, ignore=ELASTIC)))
    grows = now.train.images > before.train.images
    may_change = (*ELASTIC, *SCHEDULE, *DATA, *(("train.images",) if grows else ()))
    allowed = difference(before, now, ignore=("run_dir", "ladder"))
    keys = {line.partition(": ")[0] for line in allowed}
    note = ""
    if grows and now.train.images > now.optim.ends_at:
        note = f"; from image {now.optim.ends_at:,} on the learning rate stays at optim.final_lr {now.optim.final_lr}"
    return Change(
        tuple(allowed),
        tuple(difference(before, now, ignore=may_change)),
        tuple(key for key in DATA if key in keys),
        grows,
        min(before.optim.constant_until, now.optim.constant_until) if keys & {*SCHEDULE} else math.inf,
        note,
    )


def compare(directory: Path, config: Section) -> Change:
    """What differs from the config of the run in ``directory``. Raises UserError for what may not."""
    path = directory / "config.yaml"
    change = between(load(path), config) if path.exists() else Change()
    if change.refused:
        raise UserError(
            f"{directory}: holds a run with another config ({'; '.join(change.refused)}); "
            "choose another run_dir, or use the old values to continue it"
        )
    return change
