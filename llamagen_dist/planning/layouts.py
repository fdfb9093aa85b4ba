"""Which layouts a number of GPUs allows, what each rank of them would hold, and which change makes a config fit."""

import functools
from collections.abc import Iterable
from dataclasses import dataclass, replace

from llamagen_dist.config import GPTConfigFile
from llamagen_dist.errors import UserError
from llamagen_dist.models.sizes import GPTConfig
from llamagen_dist.parallel.division import check_split, data_ranks, divide_batch, divisors, per_rank_batch
from llamagen_dist.planning.memory import Layout, per_rank

HEADROOM = 0.10
"""Share of a GPU's memory left free: for the CUDA context, NCCL, cuBLAS workspaces and fragmentation. A guess."""
POLICIES = {"none": 0, "every 2nd": 2, "every": 1}
"""Recomputation: name -> compute.recompute_every."""


@dataclass(frozen=True)
class Refused:
    """A layout that cannot be run, and why."""

    layout: str
    reason: str


@dataclass(frozen=True)
class Change:
    """A layout that fits and the keys to set for it."""

    layout: Layout
    settings: dict[str, object]


def configured(model: GPTConfig, config: GPTConfigFile, gpus: int) -> tuple[Layout | None, str]:
    """The layout the config asks for on ``gpus`` ranks; None, with the reason, where a run would refuse it."""
    parallel = config.parallel
    try:
        data = data_ranks(gpus, parallel.tensor)
        check_split(model, parallel.tensor)
        return at(config, parallel.zero, parallel.tensor, data, divide_batch(config.train, data).micro), ""
    except UserError as error:
        return None, str(error)


def at(config: GPTConfigFile, zero: int, tensor: int, data: int, micro: int) -> Layout:
    """The config's own precision, recomputation and EMA in another split."""
    return Layout(
        zero=zero,
        tensor=tensor,
        data=data,
        precision=config.compute.precision,
        micro=micro,
        recompute_every=config.compute.recompute_every,
        sequence=config.parallel.sequence and tensor > 1,  # there is nothing to share out otherwise
        ema=config.ema.averages,
        muon=config.optim.kind == "muon",
    )


def possible(model: GPTConfig, config: GPTConfigFile, gpus: int) -> tuple[list[Layout], list[Refused]]:
    """Every ZeRO stage x tensor-parallel size on ``gpus`` ranks, and those that cannot be, with the reason.

    The micro-batch is the config's or, where that does not divide a rank's share, the largest below it that does.
    """
    layouts: list[Layout] = []
    refused: list[Refused] = []
    for tensor in divisors(gpus):
        try:
            check_split(model, tensor)
            share = per_rank_batch(config.train.global_batch, gpus // tensor)
        except UserError as error:
            refused.append(Refused(f"TP {tensor}, any ZeRO", str(error)))
            continue
        micro = max(n for n in divisors(share) if n <= (config.train.micro_batch or share))
        for zero in range(4):
            if zero > 0 or config.compute.precision == "fp32":
                layouts.append(at(config, zero, tensor, gpus // tensor, micro))
    if config.compute.precision == "bf16":
        # without ZeRO the optimizer would update the bf16 weights themselves, and lose updates below their 8 bits
        refused.append(Refused("ZeRO-0, any TP", "bf16 needs the fp32 masters of ZeRO-1, 2 or 3"))
    return layouts, refused


@functools.cache  # a sweep asks for the same few models hundreds of times
def total(model: GPTConfig, layout: Layout) -> int:
    """Bytes of a rank at its fullest moment."""
    return sum(per_rank(model, layout).values())


def fits(model: GPTConfig, layout: Layout, memory: int) -> bool:
    """Whether a rank's bytes leave HEADROOM of ``memory`` free."""
    return total(model, layout) <= memory * (1 - HEADROOM)


def largest_micro(model: GPTConfig, layout: Layout, memory: int, sizes: Iterable[int]) -> int:
    """The largest of ``sizes`` that fits as the layout's micro-batch; 0 if not even the smallest does."""
    for micro in sorted(sizes, reverse=True):
        if fits(model, replace(layout, micro=micro), memory):
            return micro
    return 0


def smallest_change(
    model: GPTConfig, config: GPTConfigFile, start: Layout | None, gpus: int, per_node: int, memory: int
) -> Change | None:
    """Of all layouts that fit, the one that changes least of what the config asks for; None if none fits.

    start: the config's own layout; None where that cannot run.

    Every changed key counts one; a micro-batch below 4, tensor parallelism and another precision count two, tensor
    parallelism across nodes four. Ties: less splitting first, then the lower ZeRO stage, less recomputation, the larger
    micro-batch.
    """
    candidates: list[tuple[tuple[float, ...], Change]] = []
    every = config.compute.recompute_every
    policies = [every] if every == 1 else [every, 1] if every == 2 else [every, 2, 1]  # only more of it saves memory
    for precision in dict.fromkeys((config.compute.precision, "bf16")):
        as_precise = config.model_copy(update={"compute": config.compute.model_copy(update={"precision": precision})})
        for layout in possible(model, as_precise, gpus)[0]:
            share = config.train.global_batch // layout.data
            wanted = config.train.micro_batch or share
            for policy in policies:
                tried = replace(layout, recompute_every=policy)
                micro = largest_micro(model, tried, memory, [n for n in divisors(share) if n <= wanted])
                if micro:
                    change = _change(config, replace(tried, micro=micro), wanted)
                    candidates.append((_cost(config, start, change, per_node), change))
    return min(candidates, key=lambda one: one[0])[1] if candidates else None


def _change(config: GPTConfigFile, layout: Layout, micro: int) -> Change:
    """micro: the micro-batch that the config asks for."""
    keys = {
        "parallel.zero": (config.parallel.zero, layout.zero),
        "parallel.tensor": (config.parallel.tensor, layout.tensor),
        "parallel.sequence": (config.parallel.sequence, layout.sequence),
        "compute.recompute_every": (config.compute.recompute_every, layout.recompute_every),
        "compute.precision": (config.compute.precision, layout.precision),
        "train.micro_batch": (micro, layout.micro),
    }
    return Change(layout, {key: new for key, (old, new) in keys.items() if new != old})


def _cost(config: GPTConfigFile, start: Layout | None, change: Change, per_node: int) -> tuple[float, ...]:
    weights = {"parallel.sequence": 0, "parallel.tensor": 2, "compute.precision": 2}
    cost = sum(weights.get(key, 1) for key in change.settings)
    layout = change.layout
    if "train.micro_batch" in change.settings and layout.micro < 4:
        cost += 1  # matrix products of so few rows leave a GPU idle
    if layout.tensor > per_node:
        cost += 2  # every layer would wait for the network
    if start is None and "parallel.tensor" in change.settings:
        cost -= 1  # what was asked for cannot run anyway
    recomputed = 1 / layout.recompute_every if layout.recompute_every else 0
    return (cost, layout.tensor, abs(layout.zero - config.parallel.zero), recomputed, -layout.micro)
