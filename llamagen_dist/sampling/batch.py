"""``batch: auto``: as many pictures at once as memory has room for, beside the weights that are there already."""

import platform

import torch

from llamagen_dist.errors import UserError
from llamagen_dist.parallel.topology import Topology
from llamagen_dist.process import memory_gb

MOST = {"cpu": 64, "cuda": 1024}
"""Pictures, by device: from here on a larger batch is no faster, and resumes and ranks have ever larger pieces."""
SHARE = 0.8  # of what is free; convolutions and the allocator need some of the rest, which no count has


def free_bytes(topology: Topology) -> int:
    """For this rank alone (collective): a GPU's, or an equal share of the host's."""
    here = topology.gather(platform.node()).count(platform.node())
    if topology.device.type != "cuda":
        return int(memory_gb() * 1e9) // here
    return int(torch.cuda.mem_get_info(topology.device)[0])


def largest_batch(parts: dict[str, int], images: int, topology: Topology) -> int:
    """How many pictures every rank has room for: all ``images``, or the device's most, or a multiple of 8 (or below 8).

    parts: of ``planning.memory.drawn_picture``. Collective; call it when the weights are on the device.
    Raises UserError on every rank where one has no room for a single picture.
    """
    free, one = min(topology.gather(free_bytes(topology))), sum(parts.values())
    batch = min(int(free * SHARE) // one, MOST[topology.device.type], images)
    counted = ", ".join(f"{name} {size / 1e6:.4g} MB" for name, size in parts.items())
    if batch < 1:
        raise UserError(
            f"batch: not even one picture fits: it takes {one / 1e6:.4g} MB ({counted}), and of {free / 1e6:.4g} MB "
            f"that are free on {topology.device} {SHARE:.0%} may be used; try precision=bf16, quantize=int8 or tensor=2"
        )
    batch = batch if batch < 8 or batch == images else batch // 8 * 8
    topology.log0(f"batch: {batch} pictures of {one / 1e6:.4g} MB each ({counted}); {free / 1e6:.6g} MB are free")
    return batch
