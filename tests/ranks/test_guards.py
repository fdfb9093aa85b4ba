"""Steps that are not finite, slow ranks, too little memory, traces: a tiny run through fit() on forked ranks."""

import gc
import gzip
import json
import sys
import time
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch

from llamagen_dist.data import digest
from llamagen_dist.data.order import Order
from llamagen_dist.parallel.clock import Clock
from llamagen_dist.parallel.topology import Topology
from llamagen_dist.tracking.log_line import MEASURED
from llamagen_dist.training import garbage
from llamagen_dist.training.gpt_task import GPTTask
from llamagen_dist.training.guards import StepGuard
from tests.expected_digest import expected
from tests.ranks.fit_run import SAMPLES, lines, run
from tests.ranks.forked import end_ranks, run_ranks
from tests.ranks.layouts import BATCH, Layout, global_batch, local, make_task, mostly_long, steps

SKIP = "guard.skip_non_finite=1"


# --- not finite ---


def spoil(task: GPTTask, kind: str) -> None:
    """The last rank's next loss is NaN, with sound gradients; or a gradient of rank 0 is infinite."""
    if kind == "loss" and task.topology.rank == task.topology.world - 1:
        original = task.guard.track_loss

        def watch(loss, samples=None):
            task.guard.track_loss = original
            return original(loss + torch.tensor(float("nan")), samples)

        task.guard.track_loss = watch
    if kind == "gradient" and task.topology.rank == 0:

        def once(gradient):
            hook.remove()
            return gradient * float("inf")

        hook = task.model.norm.weight.register_hook(once)


def state(task: GPTTask) -> dict[str, torch.Tensor]:
    found = {f"{e.group}:{e.key}": e.read(0) for e in task.entries()}
    return {key: tensor.clone() for key, tensor in found.items() if tensor is not None} | {
        key: torch.tensor(value) for key, value in task.scalars().items()
    }


def four_steps(layout: Layout, settings: tuple[str, ...], kind: str, poison: bool = True) -> dict[str, torch.Tensor]:
    """Steps 0, 1, 3 and 4; between them a spoilt step 2, unless kind is empty."""
    task = make_task(layout, SKIP, "ema.decay=0.5", *settings)
    if not poison:
        task.guard.track_loss = lambda loss, samples=None: loss
    share = task.topology.per_rank_batch(BATCH)
    for number in (0, 1, 2, 3, 4):
        if number == 2:
            if not kind:
                continue
            spoil(task, kind)
        task.step(local(global_batch(number * BATCH), task.topology.dp_rank, share), number * BATCH)
    assert task.guard.skipped == (kind != "" and poison)
    return state(task)


def each(layout: Layout, settings: tuple[str, ...], kinds: tuple[str, ...], poison: bool = True) -> list[dict]:
    return [four_steps(layout, settings, kind, poison or not kind) for kind in kinds]


LAYOUTS = [
    (Layout(2, 1, 0), ()),
    (Layout(2, 2, 0), ()),
    (Layout(2, 1, 1), ("compute.precision=bf16",)),
    (Layout(2, 2, 2), ("train.micro_batch=3",)),
    (Layout(2, 1, 3), ()),
]


@pytest.mark.parametrize(("layout", "settings"), mostly_long(*LAYOUTS, quick=LAYOUTS[:4:3]))
def test_a_skipped_step_leaves_no_trace(layout, settings):
    """Weights, moments, averages and Adam's count are, to the bit, those of a run that never took the step."""
    without, *others = run_ranks(each, 2, layout, settings, ("", "loss", "gradient"))[0]
    for skipped in others:
        assert skipped.keys() == without.keys()
        for name, tensor in without.items():
            assert torch.equal(skipped[name], tensor), name


@pytest.mark.parametrize("layout", [Layout(2, 1, 0), Layout(2, 1, 3)], ids=str)
def test_without_the_guard_the_step_would_count(layout):
    """Sabotage twin: a loss that is not finite, but not made to have no finite gradient, changes the weights."""
    without, taken = run_ranks(each, 2, layout, (), ("", "loss"), False)[0]
    assert any(not torch.equal(taken[name], tensor) for name, tensor in without.items())


def spoilt_run(folder: Path, spoilt_steps: tuple[int, ...], kind: str, *settings: str) -> None:
    def before(task: GPTTask, number: int) -> None:
        if number in spoilt_steps:
            spoil(task, kind)

    run(Layout(2, 1, 1), folder, "log.every_steps=1", *settings, compute=before)


def test_the_images_of_a_loss_that_is_not_finite_are_named_on_every_rank(tmp_path):
    for code, trace in end_ranks(spoilt_run, 2, tmp_path, (3,), "loss"):
        assert code == 1
        assert "NonFiniteError" in trace
        assert "rank 1: the loss is nan on shard-000007.tar: sample" in trace
        assert "rank 0:" not in trace
        assert "No weight was changed" in trace
    assert [line["step"] for line in lines(tmp_path)] == [1, 2]


def test_skipped_steps_are_counted_and_limited(tmp_path):
    """The count goes on after a resume, so that restarts do not buy more skips."""
    ends = end_ranks(
        spoilt_run, 2, tmp_path, (3, 5, 8), "loss", "guard.skip_non_finite=2", "checkpoint.every_images=72"
    )
    assert all(code == 1 and "2 such steps were skipped before" in trace for code, trace in ends)
    found = {line["step"]: line for line in lines(tmp_path)}
    assert [found[n].get("skipped", 0) for n in range(1, 8)] == [0, 0, 1, 1, 2, 2, 2]
    assert "grad_norm" not in found[3], "metrics.jsonl holds JSON, which has no NaN"
    assert "grad_norm" in found[4]
    ends = end_ranks(spoilt_run, 2, tmp_path, (8,), "gradient", "guard.skip_non_finite=2")
    assert all(code == 1 and "2 such steps were skipped before" in trace for code, trace in ends)
    assert all("the gradient norm is inf" in trace and "rank 1: the loss is" in trace for _, trace in ends)
    run_ranks(spoilt_run, 2, tmp_path, (8,), "gradient", "guard.skip_non_finite=3")
    assert json.loads((tmp_path / "summary.json").read_text())["skipped"] == 3


def test_a_guard_alone_passes_what_is_finite():
    guard = StepGuard(Topology())
    loss = torch.tensor(1.5, requires_grad=True)
    watched = guard.track_loss(loss)
    assert float(watched) == 1.5
    assert guard.check_finite(torch.tensor(2.0))
    guard.stop = lambda: True
    assert guard.check_finite(torch.tensor(2.0))
    assert guard.stop_requested


# --- the rehearsal before the first step, and what a step costs the host ---


def rehearsed(layout: Layout, settings: tuple[str, ...], guarded: bool = True) -> tuple[dict, list[float], bool]:
    """(state after a rehearsal, losses of three steps after it, whether torch's random numbers are as before)."""
    task = make_task(layout, "ema.decay=0.5", "model.token_dropout_p=0.2", *settings)
    if not guarded:
        task.guard.rehearsal = nullcontext
    mine = local(global_batch(0), task.topology.dp_rank, task.topology.per_rank_batch(BATCH))
    before, random = state(task), torch.get_rng_state()
    task.rehearse(mine, 0)
    same = {key: torch.equal(before[key], value) for key, value in state(task).items()}
    untouched = torch.equal(random, torch.get_rng_state())
    return same, [loss for pair in steps(task, 0, 3) for loss in pair], untouched


def without_rehearsal(layout: Layout, settings: tuple[str, ...]) -> list[float]:
    task = make_task(layout, "ema.decay=0.5", "model.token_dropout_p=0.2", *settings)
    return [loss for pair in steps(task, 0, 3) for loss in pair]


@pytest.mark.parametrize(
    ("layout", "settings"),
    mostly_long(
        (Layout(), ("train.micro_batch=4",)),
        (Layout(2), ("train.micro_batch=3",)),
        (Layout(2, 1, 1), ("compute.precision=bf16", "train.micro_batch=3")),
        (Layout(2, 1, 2), ()),
        (Layout(2, 1, 3), ("compute.precision=bf16",)),
        (Layout(2, 2, 1), ()),
        quick=[(Layout(), ("train.micro_batch=4",)), (Layout(2, 1, 2), ()), (Layout(2, 2, 1), ())],
    ),
)
def test_a_rehearsal_leaves_no_trace(layout, settings):
    expected = run_ranks(without_rehearsal, layout.ranks, layout, settings)
    for (same, losses, untouched), plain in zip(
        run_ranks(rehearsed, layout.ranks, layout, settings), expected, strict=True
    ):
        assert all(same.values()), [key for key, equal in same.items() if not equal]
        assert untouched
        assert losses == plain, "to the last bit"


def test_without_the_guard_a_rehearsal_would_be_a_step():
    same, losses, _ = run_ranks(rehearsed, 1, Layout(), (), False)[0]
    assert not same["weights:norm.weight"]
    assert losses != run_ranks(without_rehearsal, 1, Layout(), ())[0]


WAITS = ("item", "tolist", "__bool__", "__float__", "__int__", "cpu", "numpy")


def waits(two: bool) -> int:
    """How often a step asks a tensor for its value, for which the host waits until a device has computed it."""
    task = make_task(Layout(), "train.micro_batch=4")
    if two:  # sabotage twin: a norm that is looked at by itself
        norm = task.engine.gradient_norm
        task.engine.gradient_norm = lambda: torch.as_tensor(float(norm()))
    steps(task, 0, 1)
    found = []
    originals = {name: getattr(torch.Tensor, name) for name in WAITS}
    for name, original in originals.items():

        def counted(self, *arguments, _name=name, _original=original, **named):
            if "/models/" not in sys._getframe(1).f_code.co_filename:  # there it is in branches for the CPU alone
                found.append(_name)
            return _original(self, *arguments, **named)

        setattr(torch.Tensor, name, counted)
    try:
        task.step(global_batch(BATCH), BATCH)
    finally:
        for name, original in originals.items():
            setattr(torch.Tensor, name, original)
    return len(found)


def test_the_host_waits_once_a_step():
    assert [run_ranks(waits, 1, two)[0] for two in (False, True)] == [1, 2]


def collections(folder: Path, scheduled: bool) -> list[int]:
    """Steps in which Python's garbage collector ran, of a run that makes plenty of garbage."""
    garbage.EVERY_STEPS = 4
    seen: list[int] = []
    running = [0]
    gc.callbacks.append(lambda phase, info: seen.append(running[0]) if phase == "start" and running[0] else None)

    def litter(task: GPTTask, number: int) -> None:
        if not scheduled:
            gc.enable()
        running[0] = number
        for _ in range(5000):
            cycle: list = []
            cycle.append(cycle)

    run(Layout(), folder, compute=litter)
    assert gc.isenabled()
    return sorted(set(seen) - {10})  # after the loop it is let loose again


def test_garbage_is_collected_in_the_same_steps_on_all_ranks(tmp_path):
    assert run_ranks(collections, 1, tmp_path / "scheduled", True)[0] == [4, 8]
    assert len(run_ranks(collections, 1, tmp_path / "left-alone", False)[0]) > 5, "twin: left alone it runs at any time"
    assert [line.get("loss") for line in lines(tmp_path / "scheduled")] == [
        line.get("loss") for line in lines(tmp_path / "left-alone")
    ]


# --- the log line ---

NAP = 0.2


def slow_run(folder: Path, layout: Layout, slow: int, where: str, blind: bool) -> None:
    """Rank ``slow`` needs longer for its own work. blind: waiting is not told from working."""

    def nap(task: GPTTask, number: int) -> None:
        if blind and number == 1:
            task.engine.clock = Clock()
        if task.topology.rank == slow:
            time.sleep(NAP)

    original = Clock.collectives
    if blind:
        Clock.collectives = lambda self: nullcontext()  # type: ignore[method-assign]
    try:
        run(layout, folder, "log.every_steps=10", **{where: nap})
    finally:
        Clock.collectives = original  # type: ignore[method-assign]


def lead(line: dict) -> float:
    """Seconds that the slowest rank works longer than the average one, by what the line says."""
    return line["slowest_rank_s"] - (line["data_s"] + line["compute_s"] + line["optimizer_s"])


@pytest.mark.parametrize(
    ("layout", "slow", "where"),
    [
        (Layout(3, 1, 0), 1, "compute"),
        pytest.param(Layout(3, 1, 0), 2, "read", marks=pytest.mark.long),
        (Layout(2, 1, 2), 0, "read"),
    ],
    ids=str,
)
def test_the_slowed_rank_is_the_one_that_is_named(tmp_path, layout, slow, where):
    run_ranks(slow_run, layout.ranks, tmp_path, layout, slow, where, False)
    found = [line for line in lines(tmp_path) if "loss" in line and line["step"] > 1]
    assert [line["slowest_rank"] for line in found] == [slow] * len(found) != []
    share = NAP * (layout.ranks - 1) / layout.ranks
    assert all(lead(line) > 0.5 * share for line in found)
    assert all(line["communication_s"] > 0.5 * share for line in found), "the others waited for it"


def test_measured_after_the_collective_all_ranks_look_alike(tmp_path):
    """Sabotage twin."""
    run_ranks(slow_run, 3, tmp_path, Layout(3, 1, 0), 1, "compute", True)
    found = [line for line in lines(tmp_path) if "loss" in line and line["step"] > 1]
    assert all(lead(line) < 0.5 * NAP * 2 / 3 for line in found)


def plain_run(folder: Path, layout: Layout, *settings: str) -> None:
    run(layout, folder, *settings)


def test_a_line_says_what_a_step_was_and_where_its_time_went(tmp_path):
    run_ranks(plain_run, 2, tmp_path, Layout(2, 1, 1), "log.every_steps=2", "validation.every_images=36")
    found = lines(tmp_path)
    trained = [line for line in found if "loss" in line]
    assert [line["step"] for line in trained] == [1, 2, 4, 6, 8, 10]
    for line in trained:
        assert line.keys() - {"spike"} == MEASURED - {"mfu"} | {
            "step", "images_seen", "loss", "grad_norm", "lr", "samples"}  # fmt: skip
        assert line["tokens_per_s"] == pytest.approx(16 * line["images_per_s"], rel=1e-2)
        step_s = BATCH / line["images_per_s"]
        parts = sum(line[f"{part}_s"] for part in ("data", "compute", "optimizer", "communication"))
        assert 0.5 * step_s < parts < 1.5 * step_s, "means over ranks whose windows do not begin at the same instant"
        assert 0.05 < line["peak_memory_gb"] < 4
        assert line["samples"] == digest.text(expected(Order(SAMPLES, 3), line["images_seen"]))
    assert [line["images_seen"] for line in found if "val_loss" in line] == [36, 72, 108, 120]
    assert all({"val_loss", "val_loss_null"} <= line.keys() for line in found if "val_loss" in line)
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["samples"] == trained[-1]["samples"]
    assert "multiply-add is 2 FLOPs" in summary["flop_convention"]
    assert summary["training_flops_per_image"] > 6 * 16 * summary["params"] / 2


# --- memory and traces ---


def starved(folder: Path) -> None:
    def ask(task: GPTTask, number: int) -> None:
        if number == 2:
            torch.empty(1 << 50, dtype=torch.uint8)  # a million GB: no machine has them, overcommitted or not

    run(Layout(), folder, compute=ask)


def test_out_of_memory_shows_what_was_expected_and_what_is_held(tmp_path):
    ((code, trace),) = end_ranks(starved, 1, tmp_path)
    assert code == 1
    for text in (
        "UserError: out of memory on rank 0 of 1:",
        "expected per rank (ZeRO-0, TP 1, DP 1, fp32",
        "held by this rank's engine, in GiB: weights",
        "peak resident memory of this rank:",
        "set compute.recompute_every=1, a smaller train.micro_batch",
    ):
        assert text in trace


def test_a_trace_has_the_steps_that_were_asked_for(tmp_path):
    run_ranks(plain_run, 3, tmp_path, Layout(3), "log.profile_steps=[3,4]")
    traces = sorted((tmp_path / "log").glob("trace-*"))
    assert [p.name for p in traces] == ["trace-rank-0.json.gz", "trace-rank-2.json.gz"]
    for file in traces:
        events = json.loads(gzip.decompress(file.read_bytes()))["traceEvents"]
        names = {event.get("name") for event in events}
        assert {name for name in names if str(name).startswith("step ")} == {"step 3", "step 4"}
        assert any("aten::mm" in str(name) or "aten::linear" in str(name) for name in names)
