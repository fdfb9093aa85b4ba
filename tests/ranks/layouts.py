"""A tiny GPT task at any layout, on forked ranks: what the tests of layouts, resumes and precision share.

One fork per layout; DeepSpeed and Megatron-core are imported once, in the parent.
"""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import deepspeed  # noqa: F401 - before the fork, so that ranks start at once
import megatron.core.tensor_parallel  # noqa: F401
import pytest
import torch

from llamagen_dist.build import build_gpt_on_meta, fresh_weights, gpt_config
from llamagen_dist.config import GPTConfigFile
from llamagen_dist.data.batch import TokenBatch
from llamagen_dist.parallel.topology import start
from llamagen_dist.training.gpt_task import GPTTask
from tests import checkpoints as store
from tests.plain_gpt import whole_gpt
from tests.ranks.forked import run_ranks

VOCABULARY, TOKENS, CLASSES, BATCH, STEPS = 96, 16, 10, 12, 10
TOLERANCE = 1e-5  # rounding of sums in another order; at lr 1e-3 Adam does not amplify it beyond that in ten steps


class Layout(NamedTuple):
    ranks: int = 1
    tensor: int = 1
    zero: int = 0
    sequence: bool = False

    def __str__(self) -> str:
        return f"{self.ranks} ranks, TP {self.tensor}{' + SP' if self.sequence else ''}, ZeRO-{self.zero}"


SERIAL = Layout()
MIXED = [Layout(2, 1, 0), Layout(2, 2, 2, True), Layout(2, 1, 3), Layout(4, 2, 1), Layout(4, 2, 0, True), Layout(3)]
"""Every engine, ZeRO stage and kind of split once: for what must equal one process whatever the layout."""


def mostly_long(*cases: Any, quick: Sequence[Any]) -> list[Any]:
    """Parameters of a test of many layouts: the ``quick`` ones stay in ``make test``, the others are long.

    A case is a layout, a word, or a tuple of arguments.
    """
    arguments = [case if isinstance(case, tuple) and not isinstance(case, Layout) else (case,) for case in cases]
    marks = [() if case in quick else pytest.mark.long for case in cases]
    return [pytest.param(*a, marks=m, id="-".join(map(str, a))) for a, m in zip(arguments, marks, strict=True)]


def config(layout: Layout, *settings: str, **train: Any) -> GPTConfigFile:
    """settings: further ``key=value`` words; train: keys of its train section."""
    from llamagen_dist.config import parse
    from llamagen_dist.config.yaml_text import merge

    base = {
        "kind": "gpt",
        "run_dir": "unused",
        "data": {"train": "unused", "validation": "unused"},
        "model": {"n_layer": 2, "n_head": 4, "dim": 32, "multiple_of": 16, "caption_dim": 24},
        "train": {"images": BATCH * STEPS, "global_batch": BATCH, "seed": 3, **train},
        "optim": {"lr": 1e-3, "clip": 0.5},
        "parallel": {"tensor": layout.tensor, "zero": layout.zero, "sequence": layout.sequence},
    }
    return GPTConfigFile.model_validate(merge(base, parse(settings)))


def global_batch(images_seen: int, text: bool = False) -> TokenBatch:
    generator = torch.Generator().manual_seed(images_seen)
    tokens = torch.randint(VOCABULARY, (BATCH, TOKENS), generator=generator)
    positions = torch.arange(images_seen, images_seen + BATCH)
    if not text:
        return TokenBatch(tokens, tokens[:, 0] % (CLASSES + 1), positions)
    lengths = torch.randint(1, 6, (BATCH,), generator=generator)
    present = torch.arange(5)[None] >= 5 - lengths[:, None]  # left-padded, as the text encoder's features are
    features = torch.randn(BATCH, 5, 24, generator=generator) * present[..., None]
    return TokenBatch(tokens, (features, present), positions)


def make_task(layout: Layout, *settings: str, whole: bool = False, images_seen: int = 0, **train: Any) -> GPTTask:
    """whole: the model is built with all its weights on every rank, instead of piece by piece as the program does.
    images_seen: of the checkpoint that is to be put into it."""
    chosen = config(layout, *settings, **train)
    topology = start(chosen.parallel.tensor)
    sizes = gpt_config(chosen.model, vocab_size=VOCABULARY, image_tokens=TOKENS, num_classes=CLASSES)
    model = whole_gpt(sizes, seed=3) if whole else build_gpt_on_meta(sizes, seed=3)
    fresh, head = fresh_weights(sizes, 3), torch.empty(VOCABULARY, sizes.dim)
    torch.nn.init.normal_(head, std=0.05, generator=torch.Generator().manual_seed(1))  # gradients everywhere
    if whole:
        model.output.weight.data.copy_(head)
    share = topology.per_rank_batch(BATCH)
    text = chosen.model.condition == "text"

    def source(name: str, shape: tuple[int, ...]) -> torch.Tensor:
        return head if name == "output.weight" else fresh(name, shape)

    def held_out():
        yield local(global_batch(10**6, text), topology.dp_rank, share)

    return GPTTask(model, chosen, topology, "tiny", held_out, None if whole else source, images_seen)


def local(batch: TokenBatch, dp_rank: int, share: int) -> TokenBatch:
    return batch.rows(slice(dp_rank * share, (dp_rank + 1) * share))


def steps(
    task: GPTTask, first: int, last: int, shift: int = 0, squares: list[tuple[float, ...]] | None = None
) -> list[tuple[float, float]]:
    """(mean loss over the ranks, gradient norm) of steps first … last - 1; shift moves this rank's samples.

    squares: gets the means of z_loss, where there is one.
    """
    found = []
    share = task.topology.per_rank_batch(BATCH)
    for number in range(first, last):
        batch = global_batch(number * BATCH + shift, task.config.model.condition == "text")
        metrics = task.step(local(batch, task.topology.dp_rank, share), number * BATCH)
        found.append((float(task.topology.mean(metrics["loss"])), float(metrics["grad_norm"])))
        if squares is not None and "z_loss" in metrics:
            squares.append((float(task.topology.mean(metrics["z_loss"])),))
    return found


def train(layout: Layout, *settings: str, **options: Any) -> dict[str, Any]:
    task = make_task(layout, *settings, **options)
    squares: list[tuple[float, ...]] = []
    result: dict[str, Any] = {
        "losses": steps(task, 0, STEPS, squares=squares),
        "z": squares,
        "validation": task.validate(),
        "dp_rank": task.topology.dp_rank,
        "tp_rank": task.topology.tp_rank,
        "bytes": task.engine.held_bytes(),
        "replicas": {
            name: p.flatten().tolist() for name, p in task.model.named_parameters() if name.endswith("norm.weight")
        },
    }
    return result


def worst(left: list[tuple[float, ...]], right: list[tuple[float, ...]]) -> float:
    return max(abs(a - b) for x, y in zip(left, right, strict=True) for a, b in zip(x, y, strict=True))


def averages(task: GPTTask) -> dict[str, torch.Tensor]:
    """The full moving averages, on every rank that can be the writer of all of them (rank 0)."""
    found = {e.key: e.read(0) for e in task.entries() if e.group == "ema"}
    return {name: tensor.clone() for name, tensor in found.items() if tensor is not None}


def save_after(layout: Layout, folder: Path, count: int, *settings: str) -> tuple[list[tuple[float, float]], Any]:
    """Train ``count`` steps, save, go on to the end; returns the losses after the save and the final averages."""
    task = make_task(layout, *settings)
    steps(task, 0, count)
    state = {"task": dict(task.scalars())}
    store.save(folder, count, task.entries(), state, task.topology, config_text="kind: gpt\n")
    return steps(task, count, STEPS), averages(task)


def resume_from(
    layout: Layout, folder: Path, count: int, *settings: str, forget: str = ""
) -> tuple[list[tuple[float, float]], Any]:
    """Go on from the checkpoint; entries whose GROUP:KEY matches the expression ``forget`` are left fresh."""
    task = make_task(layout, *settings, images_seen=count * BATCH)
    found = store.newest(folder)
    assert found is not None
    entries = [e for e in task.entries() if not forget or not re.match(forget, f"{e.group}:{e.key}")]
    store.restore(found, entries)
    task.load_scalars(store.read_state(found)["task"] if forget != "step" else {"optimizer.step": 0.0})
    return steps(task, count, STEPS), averages(task)


def apart_from(serial: dict[str, Any], layout: Layout, *settings: str) -> float:
    """How far losses, gradient norms and validation of any rank lie from one process's ``train``, with accumulation,
    recomputation and dropout."""
    results = run_ranks(train, layout.ranks, layout, *settings, "train.micro_batch=2", "compute.recompute_every=1")
    apart = [abs(r["validation"][key] - value) for r in results for key, value in serial["validation"].items()]
    apart += [worst(r["losses"], serial["losses"]) for r in results]
    return float(torch.tensor(apart, dtype=torch.float64).max())  # NaN if any is: Python's max would pass over one


def bf16_apart_from(serial: dict[str, Any], layout: Layout, *settings: str) -> float:
    """How far a bf16 run's losses lie from an fp32 one's."""
    rounded = run_ranks(train, layout.ranks, layout, *settings, "compute.precision=bf16")[0]
    return max(abs(a - b) for (a, _), (b, _) in zip(rounded["losses"], serial["losses"], strict=True))
