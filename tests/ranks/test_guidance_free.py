"""``guidance: free`` under every kind of layout and resume: the losses are those of one plain process."""

from typing import Any

import pytest

from llamagen_dist.models import gpt
from llamagen_dist.training import gpt_task
from tests.ranks.forked import run_ranks
from tests.ranks.layouts import (
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

FREE = ("model.guidance=free",)
BOTH = (*FREE, "model.order=rar", "train.anneal_from=36", "train.anneal_until=84")
ALL = (*BOTH, "model.qk_norm=true", "model.z_loss=1e-3", "optim.kind=muon", "ema.decay=0.9")
TEXT = (*BOTH, "model.condition=text", "model.prefix_tokens=5")


@pytest.fixture(scope="module")
def serial() -> dict[str, Any]:
    return run_ranks(train, 1, SERIAL, *FREE)[0]


@pytest.mark.parametrize("layout", mostly_long(*MIXED, quick=MIXED[1:2]))
def test_every_layout_equals_one_plain_process(serial, layout):
    """With accumulation, recomputation and dropout."""
    assert apart_from(serial, layout, *FREE) < TOLERANCE


@pytest.mark.long
@pytest.mark.parametrize("settings", [BOTH, TEXT, ALL], ids=["with rar", "captions", "all switches"])
def test_it_goes_with_random_orders_captions_and_all_other_switches(settings):
    plain = run_ranks(train, 1, SERIAL, *settings)[0]
    for layout in (Layout(2, 2, 1, True), Layout(2, 1, 3)):
        # Muon's updates are orthogonal whatever the gradient's size, so that rounding shows more (test_muon.py)
        near = 10 * TOLERANCE if settings is ALL else TOLERANCE
        assert worst(run_ranks(train, 2, layout, *settings)[0]["losses"], plain["losses"]) < near


@pytest.mark.long
def test_bf16_follows_fp32(serial):
    """0.03 nats: what bf16 weights and activations do to losses near 4.6 in ten steps."""
    for layout in (Layout(2, 1, 1), Layout(2, 2, 2)):
        assert bf16_apart_from(serial, layout, *FREE) < 0.03


def broken(what: str) -> list[tuple[float, float]]:
    if what == "ranks count for themselves":
        own = gpt_task.training_beta
        gpt_task.training_beta = lambda model, batch, seed: own(model, batch, seed + int(batch.positions[0]))
    if what == "logits are not mixed":
        gpt.mixed = lambda logits, null, beta: logits
    return steps(make_task(SERIAL, *FREE), 0, STEPS)


@pytest.mark.parametrize("what", ["ranks count for themselves", "logits are not mixed"])
def test_a_broken_guidance_is_noticed(serial, what):
    """Sabotage twins of what is above."""
    assert worst(run_ranks(broken, 1, what)[0], serial["losses"]) > 20 * TOLERANCE


@pytest.mark.long
def test_a_run_goes_on_with_the_same_betas_at_any_layout(tmp_path):
    source = Layout(2, 2, 1, True)
    losses, _ = run_ranks(save_after, 2, source, tmp_path, 5, *BOTH)[0]
    assert run_ranks(resume_from, 2, source, tmp_path, 5, *BOTH)[0][0] == losses
    for target in (SERIAL, Layout(2, 1, 3)):
        assert worst(run_ranks(resume_from, target.ranks, target, tmp_path, 5, *BOTH)[0][0], losses) < TOLERANCE
    other = (*BOTH, "train.seed=4")
    assert worst(run_ranks(resume_from, 1, SERIAL, tmp_path, 5, *other)[0][0], losses) > 20 * TOLERANCE, "sabotage twin"
