"""Muon at every layout against one plain process: a matrix's update is made of all of it, wherever its pieces lie."""

from typing import Any

import pytest
import torch

from llamagen_dist.parallel import muon
from tests.ranks.forked import run_ranks
from tests.ranks.layouts import (
    SERIAL,
    STEPS,
    Layout,
    make_task,
    mostly_long,
    resume_from,
    save_after,
    steps,
    train,
    worst,
)

MUON = ("optim.kind=muon", "optim.muon_lr=3e-3", "model.n_kv_head=2", "model.qk_norm=true")
AVERAGED = (*MUON, "ema.decay=0.9")
# Newton-Schulz multiplies the smallest singular values, and the rounding in them, by 3.4^5 = 485; Adam divides by them
TOLERANCE = 1e-4
NEAR = 1e-2
LAYOUTS = [Layout(r, t, zero) for r, t in [(1, 1), (2, 1), (2, 2), (4, 2)] for zero in range(4)][1:]
LAYOUTS += [Layout(3, 1, 1), Layout(3, 1, 3), Layout(2, 2, 0, True), Layout(4, 2, 1, True)]
QUICK = [Layout(4, 2, 0), Layout(3, 1, 1), Layout(2, 2, 3)]


@pytest.fixture(scope="module")
def serial() -> dict[str, Any]:
    return run_ranks(train, 1, SERIAL, *MUON)[0]


@pytest.mark.parametrize("layout", mostly_long(*LAYOUTS, quick=QUICK))
def test_every_layout_equals_one_plain_process(serial, layout):
    more = ("train.micro_batch=2", "compute.recompute_every=1") if layout.ranks != 4 else ()
    results = run_ranks(train, layout.ranks, layout, *MUON, *more)
    for result in results:
        assert worst(result["losses"], serial["losses"]) < TOLERANCE
        assert abs(result["validation"]["val_loss"] - serial["validation"]["val_loss"]) < TOLERANCE
        assert result["replicas"] == results[0]["replicas"], "copies of a weight must stay equal to the last bit"
        dp = layout.ranks // layout.tensor if layout.zero else 1
        assert result["bytes"]["moments"] == pytest.approx(serial["bytes"]["moments"] / layout.tensor / dp, rel=0.05), (
            "one moment of a matrix, shared out like the rest (vectors and the class table are on every rank)"
        )


RECIPE = (
    "model.z_loss=0.02",
    "model.guidance=free",
    "model.order=rar",
    "train.anneal_from=36",
    "train.anneal_until=84",
)
RECIPE += ("optim.embedding_decay=0", "optim.norm_decay=0.1", "model.condition=text", "model.prefix_tokens=5")


@pytest.mark.long
def test_all_switches_go_together():
    plain = run_ranks(train, 1, SERIAL, *MUON, *RECIPE)[0]
    for layout in (Layout(2, 2, 0, True), Layout(3, 1, 2), Layout(4, 2, 3)):
        for result in run_ranks(train, layout.ranks, layout, *MUON, *RECIPE, "train.micro_batch=2"):
            assert worst(result["losses"], plain["losses"]) < TOLERANCE, layout
    without = run_ranks(train, 1, SERIAL, *MUON, *(s for s in RECIPE if "norm_decay" not in s))[0]
    assert worst(without["losses"], plain["losses"]) > TOLERANCE, "sabotage twin: one switch less"


def test_adamw_is_another_optimizer(serial):
    """Sabotage twin of all of them: the comparison is not blind to which optimizer steps."""
    adamw = run_ranks(train, 1, SERIAL, *(s for s in MUON if "optim" not in s))[0]
    assert worst(adamw["losses"], serial["losses"]) > 20 * TOLERANCE


@pytest.mark.parametrize(
    "source", mostly_long(SERIAL, Layout(4, 2, 1), Layout(3, 1, 3), Layout(2, 1, 1), quick=[Layout(2, 1, 1)])
)
def test_a_checkpoint_goes_on_at_any_layout(tmp_path, source):
    losses, averages = run_ranks(save_after, source.ranks, source, tmp_path, 5, *AVERAGED)[0]
    targets = [SERIAL, Layout(2, 2, 3)] + (
        [Layout(2, 1, 2), Layout(4, 2, 0), Layout(3, 1, 1)] if source.ranks > 2 else []
    )
    for target in targets:
        resumed, averaged = run_ranks(resume_from, target.ranks, target, tmp_path, 5, *AVERAGED)[0]
        assert worst(resumed, losses) < TOLERANCE, target
        assert max(float((averaged[n] - averages[n]).abs().max()) for n in averages) < TOLERANCE, target
    again, averaged = run_ranks(resume_from, source.ranks, source, tmp_path, 5, *AVERAGED)[0]
    assert again == losses, "bit for bit at the same layout"
    assert all((averaged[n] == averages[n]).all() for n in averages)
    forgetful, _ = run_ranks(lambda: resume_from(SERIAL, tmp_path, 5, *AVERAGED, forget="optimizer:momentum/"), 1)[0]
    assert worst(forgetful, losses) > 20 * TOLERANCE, "sabotage twin: fresh momentum"


@pytest.mark.long
@pytest.mark.parametrize("layout", [Layout(2, 1, 1), Layout(2, 2, 2), Layout(4, 2, 3)], ids=str)
def test_bf16_stays_near_and_resumes_bit_for_bit(tmp_path, serial, layout):
    settings = (*AVERAGED, "compute.precision=bf16")
    losses = run_ranks(train, layout.ranks, layout, *settings)[0]["losses"]
    assert 0 < worst(losses, serial["losses"]) < NEAR, "as AdamW's in test_precision.py"
    expected, _ = run_ranks(save_after, layout.ranks, layout, tmp_path, 5, *settings)[0]
    assert run_ranks(resume_from, layout.ranks, layout, tmp_path, 5, *settings)[0][0] == expected


# --- sabotage ---


def train_with_parts_made_apart() -> list[tuple[float, float]]:
    """Each tensor-parallel rank makes the update of its own part."""

    def apart(self, matrix, pieces) -> None:
        for piece in pieces:
            if piece.numel():
                piece.copy_(muon.orthogonalized(piece.view(matrix.shape)).flatten())

    muon.Gathered._make = apart
    return steps(make_task(Layout(2, 2, 0), *MUON), 0, STEPS)


def train_with_parts_in_another_order() -> list[tuple[float, float]]:
    own = muon.Gathered._make
    muon.Gathered._make = lambda self, matrix, pieces: own(self, matrix, list(pieces)[::-1])
    return steps(make_task(Layout(2, 1, 3), *MUON), 0, STEPS)


def train_without_telling_the_others() -> list[tuple[float, float]]:
    torch.distributed.broadcast = lambda *_, **__: type("Done", (), {"wait": lambda self: None})()
    return steps(make_task(Layout(2, 1, 0), *MUON), 0, STEPS)


@pytest.mark.parametrize(
    "broken", [train_with_parts_made_apart, train_with_parts_in_another_order, train_without_telling_the_others]
)
def test_a_broken_update_is_noticed(serial, broken):
    assert worst(run_ranks(broken, 2)[0], serial["losses"]) > 20 * TOLERANCE
