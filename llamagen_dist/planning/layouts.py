"""Which layouts a number of GPUs allows, what each rank of them would hold, and what is the largest that fits."""

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
    """The config's own precision, recomputation and EMA in another split; sequence parallelism where it is split."""
    return Layout(
        zero=zero,
        tensor=tensor,
        data=data,
        precision=config.compute.precision,
        micro=micro,
        recompute_every=config.compute.recompute_every,
        sequence=config.parallel.sequence and tensor > 1,
        ema=config.ema.decay > 0,
    )


def possible(model: GPTConfig, config: GPTConfigFile, gpus: int) -> tuple[list[Layout], list[Refused]]:
    """Every ZeRO stage x tensor-parallel size on ``gpus`` ranks, with the config's micro-batch or the largest below it
    that divides a rank's share; and those that cannot be, with the reason."""
    found: list[Layout] = []
    refused: list[Refused] = []
    for tensor in divisors(gpus):
        try:
            check_split(model, tensor)
            share = per_rank_batch(config.train.global_batch, gpus // tensor)
        except UserError as error:
            refused.append(Refused(f"TP {tensor}, any ZeRO", str(error)))
            continue
        wanted = config.train.micro_batch or share
        micro = max(n for n in divisors(share) if n <= wanted)
        for zero in range(4):
            if zero > 0 or config.compute.precision == "fp32":
                found.append(at(config, zero, tensor, gpus // tensor, micro))
    if config.compute.precision == "bf16":
        refused.append(Refused("ZeRO-0, any TP", "bf16 needs the fp32 masters of ZeRO-1, 2 or 3"))
    return found, refused


def total(model: GPTConfig, layout: Layout) -> int:
    return sum(per_rank(model, layout).values())


def fits(model: GPTConfig, layout: Layout, memory: int) -> bool:
    """Whether a rank's bytes leave HEADROOM of ``memory`` free."""
    return total(model, layout) <= memory * (1 - HEADROOM)


def largest_micro(model: GPTConfig, layout: Layout, memory: int, shares: Iterable[int]) -> int:
    """The largest of ``shares`` that fits as the layout's micro-batch; 0 if not even the smallest does."""
    for micro in sorted(shares, reverse=True):
        if fits(model, replace(layout, micro=micro), memory):
            return micro
    return 0


# --- the smallest change that fits ---


@dataclass(frozen=True)
class Change:
    """A layout that fits and the keys to set for it."""

    layout: Layout
    settings: dict[str, object]


def smallest_change(
    model: GPTConfig, config: GPTConfigFile, start: Layout | None, gpus: int, per_node: int, memory: int
) -> Change | None:
    """Of all layouts that fit, the one that changes least of what the config asks for; None if none fits.

    Every changed key counts one; a micro-batch below 4, tensor parallelism and another precision count two, tensor
    parallelism across nodes four. Ties: less splitting first, then the lower ZeRO stage, less recomputation, the larger
    micro-batch.
    """
    best: tuple[tuple[float, ...], Change] | None = None
    here = config.compute.recompute_every
    policies = [here] if here == 1 else [here, 1] if here == 2 else [here, 2, 1]
    for precision in dict.fromkeys((config.compute.precision, "bf16")):
        as_precise = config.model_copy(update={"compute": config.compute.model_copy(update={"precision": precision})})
        for layout in possible(model, as_precise, gpus)[0]:
            share = config.train.global_batch // layout.data
            wanted = config.train.micro_batch or share
            for policy in policies:
                tried = replace(layout, recompute_every=policy)
                micro = largest_micro(model, tried, memory, [n for n in divisors(share) if n <= wanted])
                if not micro:
                    continue
                change = _change(config, replace(tried, micro=micro), wanted)
                cost = _cost(config, start, change, per_node)
                if best is None or cost < best[0]:
                    best = (cost, change)
    return best[1] if best else None


def _change(config: GPTConfigFile, layout: Layout, wanted: int) -> Change:
    asked = {
        "parallel.zero": (config.parallel.zero, layout.zero),
        "parallel.tensor": (config.parallel.tensor, layout.tensor),
        "parallel.sequence": (config.parallel.sequence, layout.sequence),
        "compute.recompute_every": (config.compute.recompute_every, layout.recompute_every),
        "compute.precision": (config.compute.precision, layout.precision),
        "train.micro_batch": (wanted, layout.micro),
    }
    return Change(layout, {key: new for key, (old, new) in asked.items() if new != old})


def _cost(config: GPTConfigFile, start: Layout | None, change: Change, per_node: int) -> tuple[float, ...]:
    weights = {"parallel.sequence": 0, "parallel.tensor": 2, "compute.precision": 2}
    cost = sum(weights.get(key, 1) for key in change.settings)
    layout = change.layout
    if "train.micro_batch" in change.settings and layout.micro < 4:
        cost += 1
    if layout.tensor > per_node:
        cost += 2
    if start is None and "parallel.tensor" in change.settings:
        cost -= 1  # what was asked for cannot run anyway
    again = 1 / layout.recompute_every if layout.recompute_every else 0
    away = abs(layout.zero - config.parallel.zero)
    return (cost, layout.tensor, away, again, -layout.micro)
