"""What one line of metrics.jsonl says, and how the ranks' shares of it come together."""

import math
import time
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from llamagen_dist.data import digest
from llamagen_dist.parallel.clock import PARTS, Clock
from llamagen_dist.parallel.topology import Topology
from llamagen_dist.process import peak_rss_gb
from llamagen_dist.tracking.devices import peak_flops

OWN = ("data", "compute", "optimizer")  # a rank's own work: all but the wait for others
MEASURED = frozenset({
    *("images_per_s", "tokens_per_s", "mfu", "peak_memory_gb", "slowest_rank", "slowest_rank_s"),
    *(f"{name}_s" for name in PARTS),
})  # fmt: skip
"""Keys that say how fast a machine was; all others are the same again after a resume."""
FLOP_CONVENTION = (
    "a multiply-add is 2 FLOPs; matrix products only; causal attention counts half; backward is twice forward; "
    "recomputed activations are not counted; peak is the device's dense rate at the run's precision"
)


def peak_memory_gb(device: torch.device) -> float:
    """The most memory this rank has used so far, in 10^9 bytes: torch's on a CUDA device, else the resident set."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    return peak_rss_gb()


class LogWindow:
    """The steps since the last line, on this rank. ``line`` is collective.

    topology: the ranks.
    clock: of this rank; its seconds are taken at every line.
    global_batch: images in a step, over all ranks.
    precision: of the matrix products, for the device's peak rate.
    tokens_per_image, flops_per_image (training): None where unknown; their keys are then absent.
    seen: the digest of what the run showed before.
    """

    def __init__(
        self,
        topology: Topology,
        clock: Clock,
        global_batch: int,
        *,
        precision: str = "fp32",
        tokens_per_image: int | None = None,
        flops_per_image: int | None = None,
        seen: int = 0,
    ) -> None:
        self._topology, self._clock, self._batch = topology, clock, global_batch
        self._tokens, self._flops = tokens_per_image, flops_per_image
        self._peak: float | None = None
        if topology.device.type == "cuda":
            self._peak = peak_flops(torch.cuda.get_device_name(topology.device), precision)
        self._before = torch.tensor(seen)
        self._mine = torch.zeros((), dtype=torch.int64)
        self._pending: list[Tensor] = []
        self.restart()

    def restart(self) -> None:
        """Forget the times: a validation or a save came between."""
        self._clock.take()
        self._began, self._steps = time.perf_counter(), 0

    def count(self, samples: Tensor | None) -> None:
        """One more step, on these of the data set's samples."""
        self._steps += 1
        if samples is not None:
            self._pending.append(samples)

    def seen(self) -> str:
        """Digest of every sample that the run has shown so far, over all ranks (collective)."""
        if self._pending:
            self._mine += digest.digest(torch.cat(self._pending))
            self._pending = []
        return digest.text(self._before + self._topology.sum(self._mine))

    def line(self, metrics: Mapping[str, Tensor]) -> dict[str, Any]:
        """One line of metrics.jsonl, equal on all ranks (collective); the window starts again.

        metrics: this rank's, of the last step; averaged over the data-parallel ranks, left out where not finite.

        Besides them:
        images_per_s, tokens_per_s: over the window's wall time.
        data_s, compute_s, optimizer_s, communication_s: per step, the mean over all ranks.
        slowest_rank, slowest_rank_s: who needed most time per step for its own work, without waiting in collectives,
            and how much.
        peak_memory_gb: the largest rank's.
        mfu: see FLOP_CONVENTION.
        samples: the digest of all samples shown since the run began (data/digest.py).
        """
        steps = max(self._steps, 1)
        speed = steps * self._batch / max(time.perf_counter() - self._began, 1e-9)
        seconds = {name: value / steps for name, value in self._clock.take().items()}
        names = sorted(metrics)
        mine = [*seconds.values(), peak_memory_gb(self._topology.device)]
        device = self._topology.device  # all there, so that the host waits once for all of them
        mine += torch.stack([metrics[n].detach().to(device, torch.float64) for n in names]).tolist()
        everyone = self._gathered(mine)
        # tensor-parallel neighbours report the same metrics: one of each group counts
        averaged = everyone[:: self._topology.tensor, len(PARTS) + 1 :].mean(0).tolist()
        parts = everyone[:, : len(PARTS)]
        own = parts[:, [PARTS.index(name) for name in OWN]].sum(1)
        slowest = int(own.argmax())
        values: dict[str, Any] = {n: v for n, v in zip(names, averaged, strict=True) if math.isfinite(v)}
        values["images_per_s"] = round(speed, 2)
        if self._tokens is not None:
            values["tokens_per_s"] = round(speed * self._tokens, 1)
        values |= {f"{n}_s": round(v, 6) for n, v in zip(PARTS, parts.mean(0).tolist(), strict=True)}
        if self._flops is not None and self._peak is not None:
            values["mfu"] = round(speed * self._flops / (self._topology.world * self._peak), 4)
        values["peak_memory_gb"] = round(float(everyone[:, len(PARTS)].max()), 3)
        values |= {"slowest_rank": slowest, "slowest_rank_s": round(float(own[slowest]), 6), "samples": self.seen()}
        self.restart()
        return values

    def _gathered(self, mine: list[float]) -> Tensor:
        """float64 (ranks, n). On the host's own group, so that no device is waited for."""
        row = torch.tensor(mine, dtype=torch.float64)
        if self._topology.world == 1:
            return row[None]
        rows = [torch.empty_like(row) for _ in range(self._topology.world)]
        dist.all_gather(rows, row)
        return torch.stack(rows)
