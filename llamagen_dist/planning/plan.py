"""``llamagen plan``: what a GPT run will need, as data. Starts nothing; needs no token shards and no torch.

``answer`` returns one dictionary of plain values, which ``--json`` prints; its keys stay. Shown by show.py.
"""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from llamagen_dist.build import gpt_config
from llamagen_dist.config import GPTConfigFile, is_remote, rungs
from llamagen_dist.data.manifest import MANIFEST, read_manifest
from llamagen_dist.errors import UserError
from llamagen_dist.models import cost
from llamagen_dist.models.sizes import GPTConfig
from llamagen_dist.parallel.division import divisors
from llamagen_dist.planning import layouts as lay
from llamagen_dist.planning import memory
from llamagen_dist.planning.memory import Layout
from llamagen_dist.tracking.devices import GIB, Device

MFU = 0.4
BANDWIDTH = 2e9
CONVENTION = (
    "matrix products only, a multiply-add counts as 2; causal attention counts the pairs it needs; the head runs "
    "at the image positions only; backward = 2 x forward; recomputation is not counted"
)


@dataclass(frozen=True)
class Machine:
    """What the run is planned for.

    mfu: share of the peak rate that is reached.
    mfu_given: whether the user gave it; else it is an assumption.
    bandwidth: bytes per second at which all ranks together write a checkpoint.
    """

    device: Device
    gpus: int
    per_node: int = 8
    mfu: float = MFU
    mfu_given: bool = False
    bandwidth: float = BANDWIDTH


@dataclass(frozen=True)
class Tokens:
    """What the data fix of a model, and where that was read. classes: None where the samples have no labels."""

    vocab_size: int = 16384
    per_image: int = 256
    classes: int | None = 1000
    source: str = "assumed"
    rows: int | None = None  # as GPTConfig.token_rows


def tokens_of(
    config: GPTConfigFile, vocab: int | None = None, per_image: int | None = None, classes: int | None = None
) -> Tokens:
    """From the token shards' manifest where there is one, LlamaGen's 256-px ImageNet numbers elsewhere.

    vocab, per_image, classes: given by hand, which goes before both. Raises UserError for a manifest that cannot be
    read, or of other shards.
    """
    shards = config.data.train
    if is_remote(shards):
        tokens = Tokens(source="assumed: nothing is fetched for a plan")
    elif (Path(shards) / MANIFEST).is_file():
        sizes = read_manifest(Path(shards)).gpt_sizes(shards)
        source = f"read from {Path(shards) / MANIFEST}"
        tokens = Tokens(
            sizes["vocab_size"], sizes["image_tokens"], sizes["num_classes"], source, sizes.get("token_rows")
        )
    else:
        tokens = Tokens(source=f"assumed: {Path(shards) / MANIFEST} is not there yet")
    by_hand = {"vocab_size": vocab, "per_image": per_image, "classes": classes}
    given = {key: number for key, number in by_hand.items() if number is not None}
    if given:
        words = ", ".join(key.replace("_", " ") for key in given)
        rest = "" if len(given) == 3 else f"; the rest {tokens.source}"
        return replace(tokens, **given, source=f"{words} as given{rest}")
    return tokens


def model_for(config: GPTConfigFile, tokens: Tokens) -> GPTConfig:
    """The model that a config (one rung of a ladder) makes of such tokens. Raises UserError."""
    return gpt_config(
        config.model,
        vocab_size=tokens.vocab_size,
        image_tokens=tokens.per_image,
        num_classes=tokens.classes,
        token_rows=tokens.rows,
    )


def model_of(config: GPTConfigFile, tokens: Tokens) -> tuple[GPTConfig, GPTConfigFile, str | None]:
    """The model, the config it comes from, and, where that is a ladder, the name of its largest rung, which is it."""
    models = [(model_for(rung, tokens), rung, name) for name, rung in rungs(config)]
    model, rung, name = max(models, key=lambda one: cost.total_parameters(one[0]))
    return model, rung, name if len(models) > 1 else None


def gpu_seconds(model: GPTConfig, config: GPTConfigFile, machine: Machine) -> float:
    """Of the whole run, on one GPU, at the machine's MFU."""
    peak = machine.device.peaks[config.compute.precision]
    return cost.training_flops_per_image(model) * config.train.images / (machine.mfu * peak)


def answer(config: GPTConfigFile, tokens: Tokens, machine: Machine) -> dict[str, Any]:
    """Everything ``llamagen plan`` knows. Raises UserError where the GPUs allow no layout at all.

    Keys: model, rung, tokens, parameters (groups and total), flops, run, machine, time, checkpoint, headroom,
    configured (the config's own layout: a row of layouts, or its refusal), layouts, refused, recommendation, warnings.
    """
    model, config, rung = model_of(config, tokens)
    layouts, refused = lay.possible(model, config, machine.gpus)
    if not layouts:
        raise UserError(_no_layout(model, config, machine.gpus, refused))
    start, why = lay.configured(model, config, machine.gpus)
    steps = config.train.images // config.train.global_batch
    flops = cost.training_flops_per_image(model)
    seconds = gpu_seconds(model, config, machine)
    groups = cost.parameters(model)
    disk = memory.checkpoint_bytes(model, config.ema.averages, config.optim.kind == "muon")
    return {
        "model": {"size": config.model.size, **asdict(model), "ffn_dim": model.ffn_dim, "prefix": model.prefix},
        "rung": rung,
        "tokens": asdict(tokens),
        "parameters": {"groups": groups, "total": sum(groups.values())},
        "flops": {
            "convention": CONVENTION,
            "forward_per_image": cost.forward_flops(model),
            "training_per_image": flops,
            "training_per_image_dense_attention": cost.training_flops_per_image(model, dense=True),
            "training_per_token": flops / model.image_tokens,
        },
        "run": {
            "images": config.train.images,
            "global_batch": config.train.global_batch,
            "steps": steps,
            "tokens": config.train.images * model.image_tokens,
            "training_flops": flops * config.train.images,
        },
        "machine": {
            "gpu": machine.device.name,
            "memory_bytes": machine.device.memory,
            "gpus": machine.gpus,
            "gpus_per_node": machine.per_node,
            "precision": config.compute.precision,
            "peak_flops": machine.device.peaks[config.compute.precision],
            "mfu": machine.mfu,
            "mfu_is": "given" if machine.mfu_given else "assumed",
        },
        "time": {
            "gpu_hours": seconds / 3600,
            "hours": seconds / machine.gpus / 3600,
            "seconds_per_step": seconds / machine.gpus / steps,
        },
        "checkpoint": {
            "bytes": disk,
            "bandwidth_bytes_per_s": machine.bandwidth,
            "seconds": disk / machine.bandwidth,
            "host_copy_bytes_per_rank": _host_copy(disk, machine.gpus, config),
            "kept": config.checkpoint.keep_last,
        },
        "headroom": lay.HEADROOM,
        "configured": {"refused": why} if start is None else row(model, start, config, machine),
        "layouts": [row(model, layout, config, machine) for layout in layouts],
        "refused": [asdict(one) for one in refused],
        "recommendation": _recommendation(model, config, machine, start, why),
        "warnings": list(_warnings(model, config, machine, start)),
    }


def _host_copy(disk: int, ranks: int, config: GPTConfigFile) -> int:
    """Host bytes of one rank while a checkpoint is written (checkpoint/saver.py): a file's worth in the foreground;
    beside training its share of the state, and a file's worth of tensors put together where the ranks hold pieces."""
    share, file = -(-disk // ranks), min(disk, GIB)
    if not config.checkpoint.background:
        return file
    return share + (min(share, file) if config.parallel.zero or config.parallel.tensor > 1 else 0)


def row(model: GPTConfig, layout: Layout, config: GPTConfigFile, machine: Machine) -> dict[str, Any]:
    """One layout: its split, bytes per rank by part (they add up to total_bytes), whether that fits, and the largest
    micro-batch that does, by recomputation policy."""
    parts = memory.per_rank(model, layout)
    shares = divisors(config.train.global_batch // layout.data)
    room = machine.device.memory
    return {
        **asdict(layout),
        "bytes": parts,
        "total_bytes": sum(parts.values()),
        "fits": lay.fits(model, layout, room),
        "crosses_nodes": layout.tensor > machine.per_node,
        "largest_micro": {
            name: lay.largest_micro(model, replace(layout, recompute_every=every), room, shares)
            for name, every in lay.POLICIES.items()
        },
    }


def _no_layout(model: GPTConfig, config: GPTConfigFile, gpus: int, refused: Sequence[lay.Refused]) -> str:
    counts = [n for n in range(1, max(2 * gpus, 16) + 1) if lay.possible(model, config, n)[0]]
    nearest = sorted(sorted(counts, key=lambda n: abs(n - gpus))[:3])
    reasons = "; ".join(f"{one.layout}: {one.reason}" for one in refused[:2])
    return f"{gpus} GPUs allow no layout of this config ({reasons}); counts that do: {', '.join(map(str, nearest))}"


def _recommendation(
    model: GPTConfig, config: GPTConfigFile, machine: Machine, start: Layout | None, why: str
) -> dict[str, Any]:
    """text: one sentence. settings: the keys to set; empty where the config fits, None where nothing would do."""
    there = f"{machine.gpus} x {machine.device.name}"
    change = lay.smallest_change(model, config, start, machine.gpus, machine.per_node, machine.device.memory)
    if change is None:
        return {"text": f"no layout fits on {there}; {_more_gpus(model, config, machine)}", "settings": None}
    need = f"{lay.total(model, change.layout) / GIB:.1f} GiB per GPU"
    if not change.settings:
        return {"text": f"the config fits on {there} as it is: {need}", "settings": {}}
    now = why if start is None else f"as it is: {lay.total(model, start) / GIB:.1f} GiB per GPU, too much"
    text = f"smallest change that fits on {there}: {_words(change)} ({need}; {now})"
    return {"text": text, "settings": change.settings}


def _words(change: lay.Change) -> str:
    """As on a command line."""
    values = {key: str(new).lower() if isinstance(new, bool) else new for key, new in change.settings.items()}
    return " ".join(f"{key}={value}" for key, value in values.items())


def _more_gpus(model: GPTConfig, config: GPTConfigFile, machine: Machine) -> str:
    """How many GPUs of the same kind would do, up to 1024."""
    gpus = machine.gpus
    while gpus < 1024:
        gpus *= 2
        change = lay.smallest_change(model, config, None, gpus, machine.per_node, machine.device.memory)
        if change is not None:
            return f"{gpus} of them would do{' with ' + _words(change) if change.settings else ''}"
    return "not on 1024 of them either: choose a GPU with more memory or a smaller model"


def _warnings(model: GPTConfig, config: GPTConfigFile, machine: Machine, start: Layout | None) -> Iterator[str]:
    """What is likely a mistake, or slow, about the config's own layout ``start``."""
    memory_bytes, peaks, batch = machine.device.memory, machine.device.peaks, config.train.global_batch
    if config.compute.precision == "fp32":
        faster = f" and has {peaks['bf16'] / peaks['fp32']:.0f} x the peak rate" * (peaks["bf16"] > peaks["fp32"])
        yield f"compute.precision is fp32: bf16 (with parallel.zero 1 or more) halves the activations{faster}"
    if start is None:
        return
    if start.tensor > machine.per_node:
        yield (
            f"parallel.tensor {start.tensor} reaches across nodes of {machine.per_node} GPUs: every layer waits for "
            "the network; keep it within a node"
        )
    if start.micro == 1 and batch > start.data:
        yield "micro-batch 1: small matrix products; a larger train.micro_batch is faster where it fits"
    if start.tensor > 1 and batch % machine.gpus == 0:
        alone = replace(start, tensor=1, sequence=False, data=machine.gpus, zero=max(start.zero, 1))
        if lay.fits(model, replace(alone, micro=min(4, batch // alone.data)), memory_bytes):
            yield (
                f"parallel.tensor {start.tensor}: the model fits without it (ZeRO-{alone.zero}, TP 1), which "
                "communicates less"
            )
    lower = next((zero for zero in (1, 2) if lay.fits(model, replace(start, zero=zero), memory_bytes)), None)
    if start.zero == 3 and lower is not None:
        yield f"parallel.zero 3: ZeRO-{lower} fits too, and does not gather the weights in every forward and backward"
    if start.recompute_every and lay.fits(model, replace(start, recompute_every=0), memory_bytes):
        yield "compute.recompute_every: it fits without, and recomputing costs time"
    elif start.recompute_every:
        # one more forward pass of the share that is recomputed, where a step is three
        yield (
            f"compute.recompute_every {start.recompute_every}: about {100 / start.recompute_every / 3:.0f} % more "
            "computing than the hours below the stated MFU count"
        )
    images = min(config.validation.batch, config.validation.images or config.validation.batch)
    state = memory.state(model, start)
    need = memory.validation_bytes(model, start, images) + sum(state.values()) - state["gradients"]
    if need > memory_bytes * (1 - lay.HEADROOM):
        yield f"validation.batch {config.validation.batch} would need {need / GIB:.0f} GiB per GPU: set a smaller one"


def memory_lines(model: GPTConfig, config: GPTConfigFile, ranks: int, micro: int) -> list[str]:
    """What one of ``ranks`` ranks was expected to hold at this micro-batch, as text: for an out-of-memory message."""
    parallel = config.parallel
    layout = lay.at(config, parallel.zero, parallel.tensor, max(1, ranks // parallel.tensor), micro)
    parts = memory.per_rank(model, layout)
    split = f"ZeRO-{layout.zero}, TP {layout.tensor}, DP {layout.data}, {layout.precision}"
    lines = [f"expected per rank ({split}, micro-batch {micro}, recompute_every {layout.recompute_every}), in GiB:"]
    lines += [f"  {name:<12} {size / GIB:8.2f}" for name, size in parts.items() if size]
    lines.append(f"  {'sum':<12} {sum(parts.values()) / GIB:8.2f}  (allocator and kernel workspaces not included)")
    return lines
