"""Moving averages of the fp32 weights, each kept as one more entry of every parameter's optimizer state.

So they are sharded exactly as the masters and moments are, whatever the ZeRO stage, and a checkpoint gathers them by
the same calls. A parameter that no gradient moves (a codebook of moving averages) has them too, as its only entries.
Their buffers are the model's own: none of them is trained.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

KEY = "ema"
_PIECE = 1 << 24  # elements that are exchanged at a time: 64 MiB beside the two tensors, however large they are


@torch.no_grad()
def update(states: Mapping[Tensor, Mapping[str, Any]], decay: float) -> None:
    """ema = decay * ema + (1 - decay) * weight, for every parameter or flat fp32 partition in the optimizer's state."""
    if decay == 0:
        return
    averages = [state[KEY] for state in states.values()]
    torch._foreach_lerp_(averages, [p.detach() for p in states], 1 - decay)


def exponent(width: float) -> float:
    """gamma of the power-function average of a relative width (Karras et al., arXiv 2312.02696, section 3.1).

    width: standard deviation of the average's weights over training time, as a share of that time; 0 to 0.28.

    It solves width^2 = (gamma + 1) / ((gamma + 2)^2 (gamma + 3)), whose largest root is the one that falls with width.
    """
    inverse = width**-2
    return float(np.roots([1, 7, 16 - inverse, 12 - inverse]).real.max())


def key(width: float) -> str:
    """Of the optimizer's state and of the checkpoint's files: such as ``ema-0.05``."""
    return f"{KEY}-{width:g}"


@dataclass(frozen=True)
class Powers:
    """Power-function averages: the weights of step s of t count (s^(gamma+1) - (s-1)^(gamma+1)) / t^(gamma+1).

    Their memory is a share of the training so far, and the initial weights are forgotten in the first step. From
    several of them at several steps any other average can be put together afterwards (checkpoint/averages.py).

    widths: of each average, see ``exponent``.
    batch: images per optimizer step; the step follows from the position, and no count is kept.
    """

    widths: tuple[float, ...] = ()
    batch: int = 1

    @property
    def keys(self) -> tuple[str, ...]:
        return tuple(map(key, self.widths))

    @torch.no_grad()
    def update(self, states: Mapping[Tensor, Mapping[str, Any]], images_seen: int) -> None:
        """After the step whose batch began at sample ``images_seen``. Where a step was left out for a number that is
        not finite, its share goes to all the steps before it."""
        for width, name in zip(self.widths, self.keys, strict=True):
            kept = (images_seen / (images_seen + self.batch)) ** (exponent(width) + 1)
            torch._foreach_lerp_([state[name] for state in states.values()], [p.detach() for p in states], 1 - kept)


NONE = Powers()


def kept(decay: float, powers: Powers) -> tuple[str, ...]:
    """The keys of all averages of a run: the plain one unless its decay is 0, and the powers'."""
    return (*((KEY,) if decay > 0 else ()), *powers.keys)


@torch.no_grad()
def restart(states: Mapping[Tensor, Mapping[str, Any]]) -> None:
    """All averages begin anew at the weights as they are."""
    for p, state in states.items():
        for name, average in state.items():
            if name.startswith(KEY):
                average.copy_(p)


@torch.no_grad()
def exchange(states: Mapping[Tensor, Mapping[str, Any]]) -> None:
    """Weights and their averages change places, by copies, since views of both are elsewhere; twice changes nothing."""
    for p, state in states.items():
        for weights, averages in zip(_line(p).split(_PIECE), _line(state[KEY]).split(_PIECE), strict=True):
            kept = weights.clone()
            weights.copy_(averages)
            averages.copy_(kept)


def _line(tensor: Tensor) -> Tensor:
    """A flat view, in the order of memory: a weight and its average have the same, channels_last or not."""
    return tensor.as_strided((tensor.numel(),), (1,))
