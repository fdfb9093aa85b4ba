"""A moving average of any length, put together after training from two that were kept during it.

Karras et al., arXiv 2312.02696, section 3.2: the weights that an average gives to the steps of training are its
profile. The target profile is fitted by a sum of those that were saved, in least squares; the same sum of the
saved averages is then the target average. Here the profiles are exact step by step, and the sum's factors add
up to 1, so that what does not move while training is reproduced exactly.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from llamagen_dist.checkpoint.checkpoint import Checkpoint
from llamagen_dist.checkpoint.folder import complete
from llamagen_dist.config import GPTConfigFile
from llamagen_dist.errors import UserError
from llamagen_dist.parallel import ema

Floats = NDArray[np.float64]
LARGEST_RESIDUAL = 0.03
"""Of a fitted profile, relative to the target's norm; an average that is farther off is refused. Below it made and
true averages of random walks, drifts and noise lie within about 1e-3 of each other."""
_BLOCK = 8192  # steps whose profiles are in memory at a time


@dataclass(frozen=True)
class Profile:
    """The weights that an average of the steps 1 to ``step`` gives to each of them; they add up to 1.

    kind: ``width``, a power function of that relative width, or ``half_life``, an exponential one that halves in
        ``length`` steps (a decay of 2^(-1/length) a step), scaled up for a training that is short against it.
    """

    kind: Literal["width", "half_life"]
    length: float
    step: int

    def at(self, first: int, last: int) -> Floats:
        """Of the steps ``first`` + 1 to ``last``, float64 (last - first,); 0 behind ``step``."""
        ends = np.minimum(np.arange(first, last + 1), self.step).astype(float)
        if self.kind == "width":
            total = (ends / self.step) ** (ema.exponent(self.length) + 1)
        else:
            whole = -np.expm1(-np.log(2) * self.step / self.length)
            total = np.exp2((ends - self.step) / self.length) / whole
        return np.diff(total)


def fit(kept: Sequence[Profile], target: Profile) -> tuple[Floats, float]:
    """Factors for the averages that were kept, which add up to 1, and the residual relative to the target profile.

    kept: none of a step behind the target's.

    In blocks of steps, each reduced to a triangle by QR: memory does not grow with the training, and the condition is
    that of the profiles, not its square as with normal equations.
    """
    triangle: Floats = np.empty((0, len(kept) + 1))
    for first in range(0, target.step, _BLOCK):
        last = min(first + _BLOCK, target.step)
        rows = np.stack([profile.at(first, last) for profile in (*kept, target)], axis=1)
        triangle = np.asarray(np.linalg.qr(np.concatenate([triangle, rows]), mode="r"))
    columns, goal = triangle[:, :-1], triangle[:, -1]
    # the last one's factor is what the others leave of 1: their differences from it are fitted
    differences = columns[:, :-1] - columns[:, -1:]
    others = np.linalg.lstsq(differences, goal - columns[:, -1], rcond=1e-9)[0]
    factors = np.append(others, 1 - others.sum()).astype(np.float64)
    return factors, float(np.linalg.norm(columns @ factors - goal) / np.linalg.norm(goal))


@dataclass(frozen=True)
class Average:
    """weights: fp32, a whole model. residual: of the profile. sources: how many averages it is made of."""

    weights: dict[str, Tensor]
    step: int
    residual: float
    sources: int


def put_together(path: Path, width: float | None = None, half_life_images: float | None = None) -> Average:
    """The average of a run's training up to its newest checkpoint, or up to the step_… folder that is named.

    path: a run with ``ema.widths``, or one of its checkpoints; every earlier one that is still there is used.
    width, half_life_images: one of them.

    Raises UserError: no run, no such averages, a damaged checkpoint, a length that those kept cannot give.
    """
    last = Checkpoint.open(path)
    config = last.config
    if last.folder is None or not isinstance(config, GPTConfigFile) or not config.ema.widths:
        raise UserError(
            f"{path}: averages of other lengths are made from those that a GPT's run keeps with ema.widths, and there "
            "are none here"
        )
    batch, step = config.train.global_batch, int(last.state["step"])
    if width is None:
        assert half_life_images is not None
        target = Profile("half_life", half_life_images / batch, step)
        shown = f"a half-life of {half_life_images:g} images"
    else:
        target, shown = Profile("width", width, step), f"a width of {width:g}"
    kept: list[Profile] = []
    opened: list[Checkpoint] = []
    for folder in complete(last.folder.parent.parent):
        if folder > last.folder:
            continue
        for one in config.ema.widths:
            opened.append(Checkpoint.open(folder, which=ema.key(one)))
            kept.append(Profile("width", one, int(opened[-1].state["step"])))
    factors, residual = fit(kept, target)
    if residual > LARGEST_RESIDUAL:
        steps = sorted({profile.step for profile in kept})
        raise UserError(
            f"{path}: {shown} cannot be made from the averages of widths "
            f"{' and '.join(f'{one:g}' for one in config.ema.widths)} at {len(steps)} checkpoints (steps "
            f"{', '.join(map(str, steps[:8]))}{' …' if len(steps) > 8 else ''}): the profile is {100 * residual:.0f} % "
            "off; take a length nearer to theirs, or keep more checkpoints (checkpoint.keep_every_images)"
        )
    weights = {}
    for name in last.shapes:
        newest = last.read(name)
        total = torch.zeros(newest.shape, dtype=torch.float64)
        for factor, source in zip(factors, opened, strict=True):
            total.add_(source.read(name), alpha=float(factor))
        weights[name] = total.to(newest.dtype)
    return Average(weights, step, residual, len(opened))
