"""bf16 weights with fp32 masters: near fp32, bit-exact resumes on the same layout, nothing lost in small updates."""

import pytest
import torch

from llamagen_dist.config import GPTConfigFile
from llamagen_dist.parallel.deepspeed_engine import DeepSpeedEngine
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

BF16 = ("compute.precision=bf16", "ema.decay=0.9")
NEAR = 1e-2  # relative spacing of bf16 is 2^-8 = 4e-3; losses are averages of many rounded logits


@pytest.mark.parametrize(
    "layout",
    mostly_long(Layout(1, 1, 1), Layout(2, 1, 2), Layout(4, 2, 1), Layout(4, 2, 3), quick=[Layout(2, 1, 2)]),
)
def test_bf16_stays_near_fp32(layout):
    plain = run_ranks(train, 1, SERIAL)[0]
    for settings in (BF16, (*BF16, "train.micro_batch=1")):
        found = run_ranks(train, layout.ranks, layout, *settings)[0]
        assert worst(found["losses"], plain["losses"]) < NEAR
        assert found["losses"] != plain["losses"], "bf16 must be on"


def test_a_text_model_trains_in_bf16_too():
    settings = ("model.condition=text", "model.prefix_tokens=5")
    plain = run_ranks(train, 1, SERIAL, *settings)[0]
    found = run_ranks(train, 2, Layout(2, 1, 3), *settings, *BF16)[0]
    assert worst(found["losses"], plain["losses"]) < NEAR


def first_masters(whole: bool, rounded: bool) -> dict[str, torch.Tensor]:
    if rounded:
        DeepSpeedEngine._unround = lambda self, held, exact: None
    task = make_task(Layout(2, 2, 2), *BF16, whole=whole)
    found = {f"{e.group}:{e.key}": e.read(0) for e in task.entries() if e.group in ("weights", "ema")}
    return {name: tensor.clone() for name, tensor in found.items() if tensor is not None}


def plain_weights() -> dict[str, torch.Tensor]:
    return {e.key: e.read(0).clone() for e in make_task(SERIAL, whole=True).entries() if e.group == "weights"}


def test_the_masters_start_with_all_their_digits():
    exact = run_ranks(plain_weights, 1)[0]
    for whole in (True, False):
        for name, tensor in run_ranks(first_masters, 2, whole, False)[0].items():
            assert torch.equal(tensor, exact[name.partition(":")[2]]), (whole, name)
    rounded = run_ranks(first_masters, 2, False, True)[0]
    assert not torch.equal(rounded["weights:tok_embeddings.weight"], exact["tok_embeddings.weight"]), "sabotage twin"


def held(layout: Layout) -> dict[str, int]:
    task = make_task(layout, *BF16)
    steps(task, 0, 1)
    assert {p.dtype for p in task.model.parameters()} == {torch.bfloat16}
    assert task.model.rotary.dtype == torch.float32, "the rotary table is never rounded"
    return task.engine.held_bytes()


def test_bf16_halves_the_weights_and_keeps_fp32_masters():
    wide, narrow = run_ranks(train, 2, Layout(2, 1, 2))[0]["bytes"], run_ranks(held, 2, Layout(2, 1, 2))[0]
    assert narrow["weights"] == pytest.approx(wide["weights"] / 2, rel=0.01)
    assert narrow["masters"] == pytest.approx(wide["masters"], rel=0.01)
    assert narrow["ema"] == narrow["masters"]


@pytest.mark.parametrize(
    "layout", mostly_long(Layout(2, 1, 1), Layout(2, 1, 2), Layout(4, 2, 3), quick=[Layout(2, 1, 2)])
)
def test_a_bf16_run_resumes_bit_for_bit(tmp_path, layout):
    losses, averages = run_ranks(save_after, layout.ranks, layout, tmp_path, 5, *BF16)[0]
    again, averaged = run_ranks(resume_from, layout.ranks, layout, tmp_path, 5, *BF16)[0]
    assert again == losses
    assert all((averaged[n] == averages[n]).all() for n in averages)
    other, _ = run_ranks(resume_from, 1, Layout(1, 1, 1), tmp_path, 5, *BF16)[0]
    assert worst(other, losses) < NEAR


def tiny_updates(precision: str) -> float:
    """How far the masters move in all steps at a rate far below the spacing of bf16 weights."""
    task = make_task(Layout(1, 1, 1), f"compute.precision={precision}", "optim.lr=1e-6", "optim.weight_decay=0")
    before = {e.key: e.read(0).clone() for e in task.entries() if e.group == "weights"}
    steps(task, 0, STEPS)
    after = {e.key: e.read(0) for e in task.entries() if e.group == "weights"}
    return max(float((after[n] - before[n]).abs().max()) for n in before)


def test_small_updates_are_kept_in_the_masters():
    for precision in ("fp32", "bf16"):
        moved = run_ranks(tiny_updates, 1, precision)[0]
        assert 5e-6 < moved < 2e-5, (precision, moved)


def test_bf16_without_masters_is_refused():
    with pytest.raises(ValueError, match=r"set parallel\.zero to 1, 2 or 3"):
        GPTConfigFile.model_validate(
            {
                "kind": "gpt",
                "run_dir": "x",
                "data": {"train": "x", "validation": "x"},
                "model": {"size": "GPT-B"},
                "train": {"images": 256},
                "compute": {"precision": "bf16"},
            }
        )
