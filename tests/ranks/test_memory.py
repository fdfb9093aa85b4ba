"""planning/memory.py against the bytes that the engines really allocate, on gloo ranks."""

from dataclasses import replace

import pytest

from llamagen_dist.planning import memory
from tests.ranks.forked import run_ranks
from tests.ranks.held_bytes import kept_by, memory_layout, model_of, saved_bytes, train_and_count
from tests.ranks.layouts import Layout, config, mostly_long

LARGE = ("model.dim=160", "model.n_layer=8", "model.multiple_of=32")  # large enough for the small things not to count
CASES = [(Layout(2, tensor, zero), "fp32") for tensor in (1, 2) for zero in range(4)]
CASES += [(Layout(2, 1, 1), "bf16")]  # ZeRO-2 is below
CASES += [(Layout(4, 2, 3), "bf16")]


def expected(layout: Layout, *settings: str) -> tuple[int, int]:
    """Bytes at the fullest moment, activations aside: (without, with) what is only there while it is communicated."""
    chosen = config(layout, *settings)
    model, split = model_of(chosen), memory_layout(chosen, layout)
    full = sum(memory.state(model, split).values())
    buckets = memory.buckets(model, split)
    return full + buckets["lasting"], full + sum(buckets.values())


def within(found: int, layout: Layout, *settings: str) -> bool:
    low, high = expected(layout, *settings)
    return 0.95 * low <= found <= 1.05 * high


@pytest.mark.parametrize(("layout", "precision"), mostly_long(*CASES, quick=CASES[:3]))
def test_state_is_what_is_allocated(layout, precision):
    settings = (*LARGE, f"compute.precision={precision}", "ema.decay=0.99")
    chosen = config(layout, *settings)
    parts = memory.state(model_of(chosen), memory_layout(chosen, layout))
    stays = sum(size for name, size in parts.items() if name != "gradients")
    for found in run_ranks(train_and_count, layout.ranks, layout, *settings):
        assert within(found["fullest"], layout, *settings), (found, expected(layout, *settings))
        assert found["held"] == pytest.approx(stays, rel=0.01), "weights, masters, moments and average"
        assert found["rest"] >= stays


def test_a_wrong_formula_is_noticed():
    """Sabotage twin: the figures of another split are not those of this one."""
    settings = (*LARGE, "compute.precision=bf16", "ema.decay=0.99")
    found = run_ranks(train_and_count, 2, Layout(2, 1, 2), *settings)[0]["fullest"]
    assert within(found, Layout(2, 1, 2), *settings)
    for wrong in (Layout(1, 1, 2), Layout(4, 1, 2)):
        assert not within(found, wrong, *settings), wrong


@pytest.mark.parametrize("sequence", [False, True], ids=["whole sequence", "split sequence"])
@pytest.mark.parametrize("tensor", [2, pytest.param(4, marks=pytest.mark.long)])
def test_activations_of_a_split_model_are_what_autograd_keeps(tensor, sequence):
    layout = Layout(tensor, tensor, 0, sequence)
    settings = ("model.dim=64", "model.n_layer=4", "model.multiple_of=32")
    chosen = config(layout, *settings)
    parts = memory.activations(model_of(chosen), replace(memory_layout(chosen, layout), micro=4))
    for found in run_ranks(kept_by, tensor, layout, *settings):
        assert parts["blocks"] + parts["ends"] + parts["logits"] == pytest.approx(found, rel=0.05)


POWERS = ("ema.widths=[0.05,0.1]", "checkpoint.every_images=12", "checkpoint.keep_every_images=12")


@pytest.mark.parametrize("ema", [(), ("ema.decay=0.99",), ("ema.decay=0.99", *POWERS)], ids=["0", "1", "3"])
def test_a_checkpoint_is_as_large_as_planned(tmp_path, ema):
    layout, settings = Layout(2, 1, 3), (*LARGE, *ema)
    chosen = config(layout, *settings)
    planned = memory.checkpoint_bytes(model_of(chosen), chosen.ema.averages)
    assert run_ranks(saved_bytes, 2, layout, tmp_path, *settings)[0] == pytest.approx(planned, rel=0.01)
