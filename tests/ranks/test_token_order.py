"""``order: rar`` under every kind of layout and resume: the losses are those of one plain process."""

from pathlib import Path
from typing import Any

import pytest
import torch

from llamagen_dist.models.sizes import TARGET_POSITIONS
from llamagen_dist.training.token_order import TokenOrder
from tests import checkpoints as store
from tests.ranks.forked import run_ranks
from tests.ranks.layouts import (
    BATCH,
    MIXED,
    SERIAL,
    STEPS,
    TOLERANCE,
    Layout,
    apart_from,
    bf16_apart_from,
    make_task,
    mostly_long,
    resume_from,
    save_after,
    steps,
    train,
    worst,
)

# of ten steps three are random, four half and half, three in raster order with the table switched off
RAR = ("model.order=rar", f"train.anneal_from={3 * BATCH}", f"train.anneal_until={7 * BATCH}")
TEXT = (*RAR, "model.condition=text", "model.prefix_tokens=5")


@pytest.fixture(scope="module")
def serial() -> dict[str, Any]:
    return run_ranks(train, 1, SERIAL, *RAR)[0]


@pytest.mark.parametrize("layout", mostly_long(*MIXED, quick=MIXED[1:2]))
def test_every_layout_equals_one_plain_process(serial, layout):
    """With accumulation, recomputation and dropout."""
    assert apart_from(serial, layout, *RAR) < TOLERANCE


@pytest.mark.long
def test_captions_too():
    plain = run_ranks(train, 1, SERIAL, *TEXT)[0]
    for layout in (Layout(2, 2, 1, True), Layout(2, 1, 3)):
        assert worst(run_ranks(train, 2, layout, *TEXT)[0]["losses"], plain["losses"]) < TOLERANCE


@pytest.mark.long
def test_bf16_follows_fp32(serial):
    """0.03 nats: what bf16 weights and activations do to losses near 4.6 in ten steps."""
    for layout in (Layout(2, 1, 1), Layout(2, 2, 2)):
        assert bf16_apart_from(serial, layout, *RAR) < 0.03


def broken(what: str) -> list[tuple[float, float]]:
    at = TokenOrder.at
    if what == "ranks count for themselves":
        TokenOrder.at = lambda self, positions: at(self, positions - positions[0])  # type: ignore[method-assign]
    task = make_task(SERIAL, *RAR)
    if what == "the table stays on":
        task.model.target_positions.__dict__["shown"] = True
        type(task.model.target_positions).shown = property(lambda self: True, lambda self, on: None)
    if what == "raster from the start":
        task.order = None
    return steps(task, 0, STEPS)


@pytest.mark.parametrize("what", ["ranks count for themselves", "the table stays on", "raster from the start"])
def test_a_broken_order_is_noticed(serial, what):
    """Sabotage twins of what is above."""
    found = run_ranks(broken, 1, what)[0]
    apart = [abs(a - b) for (a, _), (b, _) in zip(found, serial["losses"], strict=True)]
    assert max(apart) > 20 * TOLERANCE
    if what == "the table stays on":
        assert max(apart[:7]) < TOLERANCE, "only the raster phase differs"


def kept(folder: Path) -> list[str]:
    found = store.newest(folder)
    assert found is not None
    return [key for key in store.read_weights(folder) if key == TARGET_POSITIONS]


@pytest.mark.parametrize("count", mostly_long(5, 8, quick=[8]))
def test_a_run_goes_on_in_the_same_order_at_any_layout(tmp_path, count):
    """From the middle of the annealing, and from behind it, where the table is not in the checkpoint any more."""
    source = Layout(2, 2, 1, True)
    losses, _ = run_ranks(save_after, 2, source, tmp_path, count, *RAR)[0]
    assert len(kept(tmp_path)) == (count < 7)
    assert run_ranks(resume_from, 2, source, tmp_path, count, *RAR)[0][0] == losses
    for target in (SERIAL, Layout(2, 1, 3)):
        assert worst(run_ranks(resume_from, target.ranks, target, tmp_path, count, *RAR)[0][0], losses) < TOLERANCE


def resume_in_another_order(folder: Path) -> list[tuple[float, float]]:
    torch.manual_seed(0)
    TokenOrder.at = lambda self, positions: torch.rand(len(positions), self.tokens).argsort(dim=1)  # type: ignore
    return resume_from(SERIAL, folder, 5, *RAR)[0]


def test_an_order_from_a_generators_state_is_noticed(tmp_path):
    """Sabotage twin: a resume would start the generator anew."""
    losses, _ = run_ranks(save_after, 1, SERIAL, tmp_path, 5, *RAR)[0]
    assert worst(run_ranks(resume_in_another_order, 1, tmp_path)[0], losses) > 20 * TOLERANCE
