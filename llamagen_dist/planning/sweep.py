"""``llamagen sweep --dry-run``: what each point needs and what all of them cost. Needs no torch for GPTs."""

import heapq
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from rich.table import Table

from llamagen_dist.build import vq_parameters
from llamagen_dist.config import GPTConfigFile, SampleConfig, Section, TokenizerConfigFile, rungs
from llamagen_dist.console import Screen, count
from llamagen_dist.errors import UserError
from llamagen_dist.models import cost
from llamagen_dist.parallel.division import check_ranks
from llamagen_dist.planning import layouts as lay
from llamagen_dist.planning import memory
from llamagen_dist.planning.plan import Machine, gpu_seconds, model_for, tokens_of
from llamagen_dist.tracking.devices import GIB


@dataclass(frozen=True)
class Need:
    """Of one point, over all rungs where it is a ladder; None where it is not known.

    parameters, rank_bytes: of the largest rung; bytes at the fullest moment of a rank.
    gpu_hours: at the machine's MFU.
    disk_bytes: of checkpoints in the end.
    refused: why it cannot run on this many ranks at all.
    """

    name: str
    parameters: int | None = None
    images: int | None = None
    gpu_hours: float | None = None
    rank_bytes: int | None = None
    fits: bool | None = None
    disk_bytes: int | None = None
    refused: str | None = None


def need(name: str, config: Section | None, machine: Machine) -> Need:
    """What a point with this config needs. Raises UserError for token shards whose manifest cannot be read."""
    refused = None
    try:
        if config is not None:
            check_ranks(config, machine.gpus)
    except UserError as error:
        refused = str(error)
    if isinstance(config, TokenizerConfigFile):
        return Need(name, vq_parameters(config.model), config.train.images, refused=refused)
    if not isinstance(config, GPTConfigFile):
        return Need(name, images=config.images if isinstance(config, SampleConfig) else None)
    tokens = tokens_of(config)
    models = [(model_for(rung, tokens), rung) for _, rung in rungs(config)]
    layouts = []
    for model, rung in models:
        layout, why = lay.configured(model, rung, machine.gpus)
        layouts.append((model, layout))
        refused = refused or why or None
    runnable = [(model, layout) for model, layout in layouts if layout is not None]
    return Need(
        name,
        max(cost.total_parameters(model) for model, _ in models),
        sum(rung.train.images for _, rung in models),
        sum(gpu_seconds(model, rung, machine) for model, rung in models) / 3600,
        max((lay.total(model, layout) for model, layout in runnable), default=None),
        all(lay.fits(*pair, machine.device.memory) for pair in runnable) if len(runnable) == len(models) else None,
        sum(
            memory.checkpoint_bytes(model, rung.ema.averages, rung.optim.kind == "muon") * kept(rung)
            for model, rung in models
        ),
        refused,
    )


def kept(config: GPTConfigFile) -> int:
    """Checkpoints on disk in the end, at most: the last ones and those kept along the way."""
    every = config.checkpoint.keep_every_images
    return config.checkpoint.keep_last + (config.train.images // every if every else 0)


def elapsed(hours: Sequence[float], at_once: int) -> float:
    """Hours until the last point ends when so many run side by side, in order, each as soon as one before it ends."""
    running: list[float] = [0.0] * at_once
    for one in hours:
        heapq.heappush(running, heapq.heappop(running) + one)
    return max(running)


def show(
    title: str, needs: Sequence[Need], states: Sequence[str], machine: Machine, at_once: int, screen: Screen
) -> None:
    """The table and its totals. states: a word per point. at_once: how many run at the same time."""
    table = Table(title=title)
    table.add_column("point", overflow="fold")
    for heading in ("parameters", "images", "GPU-hours", "GiB/rank"):
        table.add_column(heading, justify="right")
    table.add_column("fits")
    table.add_column("state", overflow="fold")
    for one, state in zip(needs, states, strict=True):
        fits = {None: "", True: "yes", False: "NO"}[one.fits]
        table.add_row(
            one.name,
            "" if one.parameters is None else count(one.parameters),
            "" if one.images is None else f"{one.images:,}",
            "" if one.gpu_hours is None else _hours(one.gpu_hours),
            "" if one.rank_bytes is None else f"{one.rank_bytes / GIB:.1f}",
            "refused" if one.refused else fits,
            state,
        )
    screen.console.print(table, soft_wrap=False)
    for line in totals(needs, states, machine, at_once):
        screen.say(line)


def totals(needs: Sequence[Need], states: Sequence[str], machine: Machine, at_once: int) -> Iterator[str]:
    """What the table comes to, as sentences."""
    left = [one for one, state in zip(needs, states, strict=True) if state != "finished"]
    yield f"{len(needs)} points, {len(needs) - len(left)} of them finished"
    if hours := [one.gpu_hours for one in left if one.gpu_hours is not None]:
        at_once = min(at_once, len(hours))
        took = elapsed([one / machine.gpus for one in hours], at_once)
        each = f"{at_once} point{'s' * (at_once > 1)} of {machine.gpus} rank{'s' * (machine.gpus > 1)}"
        origin = "given" if machine.mfu_given else "assumed, not measured"
        yield (
            f"left: {_hours(sum(hours))} GPU-hours at {100 * machine.mfu:.0f} % MFU ({origin}) on "
            f"{machine.device.name}; {_hours(took)} hours with {each} at a time, without waiting in the queue"
        )
    if disk := sum(one.disk_bytes for one in needs if one.disk_bytes is not None):
        yield f"checkpoints: up to {disk / 1e9:,.1f} GB on disk in the end"
    if refused := [one for one in needs if one.refused]:
        yield f"{len(refused)} cannot run on {machine.gpus} ranks; {refused[0].name}: {refused[0].refused}"
    if tight := [one for one in needs if one.fits is False]:
        yield (
            f"{len(tight)} do not fit on {machine.device.name} as they are ({100 * lay.HEADROOM:.0f} % left free); "
            f"llamagen plan says what would make {tight[0].name} fit"
        )


def _hours(hours: float) -> str:
    return f"{hours:,.0f}" if hours >= 100 else f"{hours:.3g}"
