"""What stops a run on purpose: signals, which only raise a flag, and losses that are not finite."""

import signal
from types import FrameType
from typing import Any

import torch
from torch import Tensor

from llamagen_dist.parallel.topology import Topology

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2)


class NonFiniteError(Exception):
    """A loss or gradient became NaN or infinite; raised on every rank before any weight has changed."""


class StopFlag:
    """Signals raise the flag of this rank; ``agreed`` is true once it is up on any rank (call it on all of them).

    A rank that saved alone would hang in the collective save, since signals reach ranks at different steps.
    """

    def __init__(self, topology: Topology) -> None:
        self._topology = topology
        self._up = False
        self._previous: dict[int, Any] = {}

    def _raise_flag(self, number: int, frame: FrameType | None) -> None:
        self._up = True

    def __enter__(self) -> "StopFlag":
        for number in STOP_SIGNALS:
            self._previous[number] = signal.signal(number, self._raise_flag)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def agreed(self, also: bool = False) -> bool:
        """also: another reason of this rank to stop."""
        return self._topology.any(self._up or also)


def check_loss(loss: Tensor, topology: Topology, images_seen: int, count: int) -> None:
    """Raise NonFiniteError on all ranks alike if the loss is not finite on any. ``count``: the global batch."""
    if topology.any(not bool(torch.isfinite(loss).all())):
        raise NonFiniteError(
            f"the loss is not finite for the global batch of samples {images_seen} … "
            f"{images_seen + count - 1} (rank {topology.rank} saw {loss.detach().flatten().tolist()}); "
            "no weight was changed. The last checkpoint is good: lower optim.lr or look at that batch"
        )


def check_gradient(norm: Tensor, topology: Topology, where: str) -> None:
    """The same for a gradient norm that is already equal on all ranks, so that all raise without asking."""
    if not bool(torch.isfinite(norm)) or float(norm) < 0:
        raise NonFiniteError(
            f"the gradient norm of the {where} is not finite ({float(norm)}); no weight was changed. "
            "The last checkpoint is good: lower optim.lr, or set optim.clip"
        )
