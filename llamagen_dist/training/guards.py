"""What stops a run on purpose: signals, which only raise a flag, and losses or gradients that are not finite."""

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import torch
from torch import Tensor

from llamagen_dist.parallel.topology import Topology
from llamagen_dist.process import STOP_SIGNALS

NAMED = 8  # images that a message about a micro-batch names


class NonFiniteError(Exception):
    """A loss or gradient became NaN or infinite; raised on every rank before any weight has changed."""


class StopFlag:
    """Signals raise the flag of this rank; ``on_any_rank`` is true once it is up on any rank (call it on all of them).

    A rank that saved alone would hang in the collective save, since signals reach ranks at different steps.
    """

    def __init__(self, topology: Topology) -> None:
        self._topology = topology
        self.up = False
        """Whether this rank has had a signal."""
        self._previous: dict[int, Any] = {}

    def _raise_flag(self, number: int, frame: FrameType | None) -> None:
        self.up = True

    def __enter__(self) -> "StopFlag":
        for number in STOP_SIGNALS:
            self._previous[number] = signal.signal(number, self._raise_flag)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def on_any_rank(self, also: bool = False) -> bool:
        """also: another reason of this rank to stop."""
        return self._topology.any_rank(self.up or also)


class StepGuard:
    """Decides, on all ranks alike, whether a step may change the weights; a task and its engine ask it.

    skip: so many steps with a non-finite loss or gradient are left out before one raises.
    """

    def __init__(self, topology: Topology, skip: int = 0) -> None:
        self._topology, self._skip = topology, skip
        self._tracked: list[tuple[Tensor, Tensor | None]] = []
        self._rehearsing = False
        self.stop: Callable[[], bool] = lambda: False
        """Whether this rank is to stop; ``check_finite`` asks, and shares the answer with all ranks."""
        self.where: Callable[[int], str] = "sample {}".format
        """Names a sample for people."""
        self.skipped = 0
        """Steps left out since the start of the run."""
        self.stop_requested = False
        """Whether any rank was to stop, as of the last step."""

    def track_loss(self, loss: Tensor, samples: Tensor | None = None) -> Tensor:
        """``loss`` for the backward pass, remembered until ``check_finite``; no wait for the device.

        samples: the images it was computed on, int64 (n,). A loss that is not finite is made to have no finite
        gradient either, so that the gradient norm, which all ranks share, tells everyone of it.
        """
        finite = torch.isfinite(loss.detach())  # stays on the device: a Python ``if`` would wait for it
        self._tracked.append((loss.detach(), samples))
        return loss * torch.where(finite & (not self._rehearsing), 1.0, torch.nan)

    @contextmanager
    def rehearsal(self) -> Iterator[None]:
        """A step inside is computed to its end, but neither changes anything nor counts.

        Its gradients are made NaN, so it takes the way of a step that is left out: that way every engine, DeepSpeed's
        too, leaves weights, moments and averages alone, and has used the memory of a whole step.
        """
        self._rehearsing = True
        try:
            yield
        finally:
            self._rehearsing = False

    def check_finite(self, *norms: Tensor) -> bool:
        """Whether the optimizer may run (collective: one small all-reduce, after which the host waits once).

        norms: gradient norms over the whole model, each equal on all ranks. False: leave weights and optimizer state
        alone and forget the gradients. Raises NonFiniteError on all ranks once ``skip`` steps have been left out.
        """
        tracked, self._tracked = self._tracked, []
        values = [loss.double().reshape(()) for loss, _ in tracked] + [n.double().reshape(()) for n in norms]
        # losses and norms together, so that the host waits for the device once a step, at ``tolist``
        finite = torch.isfinite(torch.stack([v.to(self._topology.device) for v in values])).all()
        flags = torch.stack([torch.tensor(self.stop(), device=finite.device), ~finite]).int()
        stop, bad = map(bool, self._topology.max(flags).tolist())
        if self._rehearsing:  # only now: all ranks have taken part in the collective
            return False
        self.stop_requested = stop
        if not bad:
            return True
        # the gradient can be infinite although every loss is finite: then any micro-batch may be the cause
        causes = self._named(tracked, only_bad=True)
        if not causes:
            size = ", ".join(str(float(n)) for n in norms)
            causes = [f"the gradient norm is {size} and every loss finite", *self._named(tracked, only_bad=False)]
        if self.skipped >= self._skip:
            before = f" ({self.skipped} such steps were skipped before)" if self.skipped else ""
            raise NonFiniteError(
                f"loss or gradient not finite: {'; '.join(causes)}. No weight was changed{before}. The last checkpoint "
                "is good: look at those images, lower optim.lr, or set guard.skip_non_finite"
            )
        self.skipped += 1
        self._topology.log0(f"step skipped ({self.skipped} of {self._skip}), not finite: {'; '.join(causes)}")
        return False

    def _named(self, tracked: list[tuple[Tensor, Tensor | None]], only_bad: bool) -> list[str]:
        """The micro-batches of all ranks with their images (collective). only_bad: those with a loss not finite."""
        mine = []
        for loss, samples in tracked:
            if not only_bad or not bool(torch.isfinite(loss).all()):
                numbers = [] if samples is None else samples.tolist()
                shown = ", ".join(self.where(number) for number in numbers[:NAMED])
                more = f" and {len(numbers) - NAMED} more" if len(numbers) > NAMED else ""
                mine.append(f"rank {self._topology.rank}: the loss is {loss.item()} on {shown or 'its batch'}{more}")
        return [line for lines in self._topology.gather(mine) for line in lines]
