"""A moving average of the fp32 weights, kept as one more entry of each parameter's optimizer state.

So it is sharded exactly as the masters and moments are, whatever the ZeRO stage, and a checkpoint gathers it by the
same calls. Its buffers are the model's own: none of them is trained.
"""

from collections.abc import Mapping
from typing import Any

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


@torch.no_grad()
def exchange(states: Mapping[Tensor, Mapping[str, Any]]) -> None:
    """Weights and their averages change places, by copies, since views of both are elsewhere; twice changes nothing."""
    for p, state in states.items():
        for weights, averages in zip(p.view(-1).split(_PIECE), state[KEY].view(-1).split(_PIECE), strict=True):
            kept = weights.clone()
            weights.copy_(averages)
            averages.copy_(kept)
