"""Between the ranks: how far apart their clocks are, and the bandwidth of an all-reduce."""

import time
from typing import Any

import torch
import torch.distributed as dist

from llamagen_dist.parallel.topology import Topology

ROUNDS = 10
BYTES = {"cpu": 16 << 20, "cuda": 256 << 20}


def clock(topology: Topology) -> dict[str, float]:
    """Collective.

    offset_s: this rank's clock minus rank 0's.
    error_s: how wrong that may be: half of the quickest of ten exchanges.
    """
    best = (float("inf"), 0.0)
    for _ in range(ROUNDS):
        before = time.time()
        dist.barrier()  # rank 0 reads its clock after this rank has read its own, and before it does so again
        answer = topology.gather(time.time())[0]
        after = time.time()
        best = min(best, ((after - before) / 2, (before + after) / 2 - answer))
    error, offset = best
    return {"offset_s": round(offset, 6), "error_s": round(error, 6)}


def all_reduce(topology: Topology) -> dict[str, Any]:
    """Of all ranks together (collective); medians of ten.

    bus_gb_s: 2 (n - 1) / n x bytes / seconds, in 10^9 bytes: what the slowest link of a ring carries, and so
    comparable between numbers of ranks.
    latency_us: of eight bytes.
    """
    kind, n = topology.device.type, topology.world
    size = BYTES[kind]
    large = torch.ones(size // 4, dtype=torch.float32, device=topology.device)
    seconds = _median(topology, large)
    if large.isnan().any() or not bool((large == large[0]).all()):
        raise RuntimeError("an all-reduce of equal numbers gave unequal ones")
    small = _median(topology, torch.ones(2, dtype=torch.float32, device=topology.device))
    return {
        "backend": "nccl" if kind == "cuda" else "gloo",
        "bytes": size,
        "bus_gb_s": round(2 * (n - 1) / n * size / seconds / 1e9, 3),
        "latency_us": round(small * 1e6, 1),
    }


def _median(topology: Topology, values: torch.Tensor) -> float:
    """Seconds; the mean is taken each time, so that the numbers stay as they are."""
    times = []
    for number in range(ROUNDS + 2):
        dist.barrier()
        if topology.device.type == "cuda":
            torch.cuda.synchronize()
        began = time.perf_counter()
        dist.all_reduce(values)
        values /= topology.world
        if topology.device.type == "cuda":
            torch.cuda.synchronize()
        if number >= 2:  # the first ones make the connections
            times.append(time.perf_counter() - began)
    return sorted(times)[len(times) // 2]
