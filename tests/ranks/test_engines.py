"""Layouts against one plain process: the same losses and gradient norms, bytes per rank as the layout says.

One fork per layout; DeepSpeed and Megatron-core are imported once, in the parent.
"""

from pathlib import Path
from typing import Any

import deepspeed  # noqa: F401 - before the fork, so that ranks start at once
import megatron.core.tensor_parallel  # noqa: F401
import pytest
import torch

from llamagen_dist.checkpoint import store
from llamagen_dist.config import GPTConfigFile, UserError
from llamagen_dist.data.batch import TokenBatch
from llamagen_dist.parallel.tensor_parallel import TABLE, cut, merge, split_of
from llamagen_dist.parallel.topology import start
from llamagen_dist.training.build import build_gpt, gpt_config
from llamagen_dist.training.gpt_task import GPTTask
from llamagen_dist.training.guards import NonFiniteError
from tests.ranks.forked import run_ranks

VOCABULARY, TOKENS, CLASSES, BATCH = 96, 16, 10, 12
SERIAL, STEPS = (1, 1, 0), 10
LAYOUTS = [(2, 1, 0), (2, 1, 1), (2, 1, 2), (3, 1, 1), (2, 2, 1), (4, 2, 1), (4, 2, 2), (4, 4, 1)]
TOLERANCE = 1e-5  # rounding of sums in another order; at lr 1e-3 Adam does not amplify it beyond that in ten steps


def config(layout: tuple[int, int, int], **train: Any) -> GPTConfigFile:
    _, tensor, zero = layout
    return GPTConfigFile.model_validate(
        {
            "kind": "gpt",
            "run_dir": "unused",
            "data": {"train": "unused", "validation": "unused"},
            "model": {"n_layer": 2, "n_head": 4, "dim": 32, "multiple_of": 16},
            "train": {"images": BATCH * STEPS, "global_batch": BATCH, "seed": 3, **train},
            "optim": {"lr": 1e-3, "clip": 0.5},
            "parallel": {"tensor": tensor, "zero": zero},
        }
    )


def global_batch(images_seen: int) -> TokenBatch:
    generator = torch.Generator().manual_seed(images_seen)
    tokens = torch.randint(VOCABULARY, (BATCH, TOKENS), generator=generator)
    return TokenBatch(tokens, tokens[:, 0] % (CLASSES + 1), torch.arange(images_seen, images_seen + BATCH))


def make_task(layout: tuple[int, int, int], **train: Any) -> GPTTask:
    settings = config(layout, **train)
    topology = start(settings.parallel.tensor)
    model = build_gpt(
        gpt_config(settings.model, vocab_size=VOCABULARY, image_tokens=TOKENS, num_classes=CLASSES), seed=3
    )
    torch.nn.init.normal_(
        model.output.weight, std=0.05, generator=torch.Generator().manual_seed(1)
    )  # gradients everywhere
    share = topology.share(BATCH)

    def held_out():
        yield local(global_batch(10**6), topology.dp_rank, share)

    return GPTTask(model, settings, topology, "tiny", held_out)


def local(batch: TokenBatch, dp_rank: int, share: int) -> TokenBatch:
    mine = slice(dp_rank * share, (dp_rank + 1) * share)
    return batch.rows(mine)


def steps(task: GPTTask, first: int, last: int, shift: int = 0) -> list[tuple[float, float]]:
    """(mean loss over the ranks, gradient norm) of steps first … last - 1; shift moves this rank's samples."""
    found = []
    share = task.topology.share(BATCH)
    for number in range(first, last):
        batch = global_batch(number * BATCH + shift)
        metrics = task.step(local(batch, task.topology.dp_rank, share), number * BATCH)
        found.append((float(task.topology.mean(metrics["loss"])), float(metrics["grad_norm"])))
    return found


def train(layout: tuple[int, int, int], **options: Any) -> dict[str, Any]:
    task = make_task(layout, **options)
    result: dict[str, Any] = {
        "losses": steps(task, 0, STEPS),
        "validation": task.validate(),
        "dp_rank": task.topology.dp_rank,
        "tp_rank": task.topology.tp_rank,
    }
    if hasattr(task.engine, "held_bytes"):
        result["bytes"] = task.engine.held_bytes()
    return result


@pytest.fixture(scope="module")
def serial() -> dict[str, Any]:
    return run_ranks(train, 1, SERIAL)[0]


def worst(left: list[tuple[float, float]], right: list[tuple[float, float]]) -> float:
    return max(abs(a - b) for x, y in zip(left, right, strict=True) for a, b in zip(x, y, strict=True))


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_every_layout_equals_one_plain_process(serial, layout):
    """Dropout is on (0.1 everywhere): its masks follow the samples, not the ranks."""
    results = run_ranks(train, layout[0], layout)
    assert max(norm for _, norm in serial["losses"]) > 0.5, "clipping must be active for the norms to matter"
    for result in results:
        assert worst(result["losses"], serial["losses"]) < TOLERANCE
        for key, value in serial["validation"].items():
            assert abs(result["validation"][key] - value) < TOLERANCE
    assert {(r["dp_rank"], r["tp_rank"]) for r in results} == {
        (d, t) for d in range(layout[0] // layout[1]) for t in range(layout[1])
    }


def test_accumulation_over_micro_batches_changes_nothing(serial):
    for layout in (SERIAL, (2, 1, 0), (2, 1, 1)):
        results = run_ranks(lambda layout: train(layout, micro_batch=2), layout[0], layout)
        assert worst(results[0]["losses"], serial["losses"]) < TOLERANCE, layout


def test_bytes_per_rank_are_what_the_layout_says():
    model = build_gpt(
        gpt_config(config(SERIAL).model, vocab_size=VOCABULARY, image_tokens=TOKENS, num_classes=CLASSES), 0
    )
    for layout in [(2, 1, 1), (2, 2, 1), (4, 2, 1)]:
        ranks, tensor, _ = layout
        expected = sum(p.nbytes // (tensor if split_of(n) else 1) for n, p in model.named_parameters())
        for result in run_ranks(train, ranks, layout):
            assert result["bytes"]["weights"] == expected
            padded = result["bytes"]["moments"] * (ranks // tensor)
            assert 2 * expected <= padded <= 2 * expected + 4096, "two moments, shared by the data-parallel ranks"


# --- sabotage: each of these breaks one thing on purpose, and the comparison above must notice ---


def train_with_the_wrong_share() -> list[tuple[float, float]]:
    task = make_task((2, 1, 1))
    return steps(task, 0, STEPS, shift=BATCH * task.topology.dp_rank)


def train_without_the_data_parallel_reduce() -> list[tuple[float, float]]:
    task = make_task((2, 1, 0))
    with task.engine.module.no_sync():
        return steps(task, 0, STEPS)


def train_without_the_row_reduce() -> list[tuple[float, float]]:
    task = make_task((2, 2, 1))
    row = task.model.layers[0].attention.wo
    row.forward = lambda x: torch.nn.functional.linear(x, row.weight)
    return steps(task, 0, STEPS)


def train_with_unmarked_splits() -> list[tuple[float, float]]:
    settings = config((2, 2, 1))
    task = make_task((2, 2, 1))
    for p in task.model.parameters():
        if hasattr(p, "tensor_model_parallel"):
            p.tensor_model_parallel = False
    assert settings.optim.clip > 0
    return steps(task, 0, STEPS)


@pytest.mark.parametrize(
    "broken",
    [
        train_with_the_wrong_share,
        train_without_the_data_parallel_reduce,
        train_without_the_row_reduce,
        train_with_unmarked_splits,
    ],
)
def test_a_broken_layout_is_noticed(serial, broken):
    assert worst(run_ranks(broken, 2)[0], serial["losses"]) > 100 * TOLERANCE


# --- checkpoints ---


def save_after(layout: tuple[int, int, int], folder: Path, count: int) -> list[tuple[float, float]]:
    """Train ``count`` steps, save, go on to the end; returns the losses after the save."""
    task = make_task(layout)
    steps(task, 0, count)
    store.save(
        folder,
        count,
        task.entries(),
        {"task": dict(task.scalars())},
        task.topology,
        config_text="kind: gpt\n",
    )
    return steps(task, count, STEPS)


def resume_from(layout: tuple[int, int, int], folder: Path, count: int, forget: str = "") -> list[tuple[float, float]]:
    task = make_task(layout)
    found = store.newest(folder)
    assert found is not None
    entries = [e for e in task.entries() if not forget or forget not in e.key]
    store.restore(found, entries)
    task.load_scalars(store.read_state(found)["task"] if forget != "step" else {"optimizer.step": 0.0})
    return steps(task, count, STEPS)


@pytest.mark.parametrize("source", [SERIAL, (2, 1, 1), (4, 2, 1)], ids=str)
def test_a_checkpoint_goes_on_at_any_layout(tmp_path, source):
    """Bit-equal at the same layout, rounding elsewhere; every file is one format."""
    uninterrupted = run_ranks(save_after, source[0], source, tmp_path, 5)[0]
    for target in [SERIAL, (2, 1, 1), (3, 1, 1), (2, 2, 1), (4, 2, 2)]:
        resumed = run_ranks(resume_from, target[0], target, tmp_path, 5)[0]
        assert worst(resumed, uninterrupted) < TOLERANCE, target
    assert run_ranks(resume_from, source[0], source, tmp_path, 5)[0] == uninterrupted


@pytest.mark.parametrize("forgotten", ["exp_avg/", "exp_avg_sq/", "step"])
def test_a_resume_that_forgets_something_is_noticed(tmp_path, forgotten):
    """Sabotage twin: fresh optimizer state, or Adam's count from zero."""
    uninterrupted = run_ranks(save_after, 2, (2, 1, 1), tmp_path, 5)[0]
    assert worst(run_ranks(resume_from, 2, (2, 1, 1), tmp_path, 5, forgotten)[0], uninterrupted) > 100 * TOLERANCE


# --- refusals and guards ---


def train_into_infinity(layout: tuple[int, int, int], what: str) -> tuple[str, bool]:
    task = make_task(layout)
    steps(task, 0, 2)
    before = [p.detach().clone() for p in task.model.parameters()]
    with torch.no_grad():
        if what == "loss" and task.topology.rank == task.topology.world - 1:
            task.model.norm.weight[0] = float("nan")
            before = [p.detach().clone() for p in task.model.parameters()]
    if what == "gradient" and task.topology.rank == 0:
        task.model.norm.weight.register_hook(lambda g: g * float("inf"))
    try:
        steps(task, 2, 3)
    except NonFiniteError as error:
        same = all(torch.equal(a, b) or a.isnan().any() for a, b in zip(before, task.model.parameters(), strict=True))
        return str(error), same
    return "no error", False


@pytest.mark.parametrize("layout", [(2, 1, 0), (2, 1, 1)], ids=str)
@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_a_non_finite_step_stops_all_ranks_before_the_update(layout, what):
    for message, unchanged in run_ranks(train_into_infinity, 2, layout, what):
        assert "not finite" in message
        assert unchanged


def test_splitting_and_merging_is_the_identity():
    model = build_gpt(
        gpt_config(config(SERIAL).model, vocab_size=VOCABULARY, image_tokens=TOKENS, num_classes=CLASSES), 0
    )
    names = dict(model.named_parameters())
    assert {pattern for pattern, split in TABLE if any(split_of(n) == split for n in names)} == {p for p, _ in TABLE}
    for name, p in names.items():
        for tensor in (1, 2, 4):
            assert torch.equal(merge(name, [cut(name, p, tensor, r) for r in range(tensor)]), p), name
    fused = torch.arange(12.0).view(12, 1)
    assert cut("layers.0.attention.wqkv.weight", fused, 2, 0).flatten().tolist() == [0, 1, 4, 5, 8, 9]


def refused(layout: tuple[int, int, int]) -> str:
    try:
        make_task(layout)
    except UserError as error:
        return str(error)
    return "accepted"


def test_impossible_layouts_are_refused_in_a_sentence():
    assert "does not divide this model's heads 4" in run_ranks(refused, 3, (3, 3, 1))[0]
    assert "2 data-parallel ranks" not in run_ranks(refused, 2, (2, 1, 1))[0]
    message = run_ranks(refused, 5, (5, 1, 1))[0]
    assert "12 images cannot be shared equally by 5" in message
    assert "use 4" in message
