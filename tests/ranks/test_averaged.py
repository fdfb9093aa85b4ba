"""The held-out loss of the moving average: that average's own, and training never notices that it was measured."""

from typing import Any

import pytest
import torch

from llamagen_dist.build import gpt_config
from llamagen_dist.parallel import ema
from tests.plain_gpt import whole_gpt
from tests.ranks.forked import run_ranks
from tests.ranks.layouts import (
    CLASSES,
    SERIAL,
    TOKENS,
    TOLERANCE,
    VOCABULARY,
    Layout,
    averages,
    config,
    global_batch,
    make_task,
    mostly_long,
    steps,
)

AVERAGE = ("ema.decay=0.7",)
EVALUATED = (*AVERAGE, "validation.weights=ema")


def train(layout: Layout, look: bool, *settings: str) -> dict[str, Any]:
    task = make_task(layout, *settings)
    result: dict[str, Any] = {"losses": steps(task, 0, 4)}
    if look:
        result["validation"] = task.validate()
        result["averages"] = averages(task)
    result["losses"] += steps(task, 4, 7)
    return result


def train_without_changing_back(layout: Layout) -> dict[str, Any]:
    exchange, times = ema.exchange, 0

    def once(states: Any) -> None:
        nonlocal times
        times += 1
        if times == 1:
            exchange(states)

    ema.exchange = once
    return train(layout, True, *EVALUATED)


def loss_of(average: dict[str, torch.Tensor]) -> float:
    """Computed by a plain model that never was in an engine."""
    sizes = gpt_config(config(SERIAL).model, vocab_size=VOCABULARY, image_tokens=TOKENS, num_classes=CLASSES)
    model = whole_gpt(sizes, seed=0).eval()
    shapes = dict(model.named_parameters())
    model.load_state_dict({n: a.view(shapes[n].shape) for n, a in average.items() if n in shapes}, strict=False)
    batch = global_batch(10**6)
    with torch.no_grad():
        return float(model.loss(batch.tokens, batch.condition))


LAYOUTS = [SERIAL, Layout(2, 1, 0), Layout(2, 1, 1), Layout(2, 2, 2), Layout(2, 1, 3), Layout(4, 2, 3)]


@pytest.mark.parametrize("layout", mostly_long(*LAYOUTS, quick=[SERIAL, Layout(2, 2, 2)]))
def test_the_average_is_measured_and_training_never_notices(layout):
    measured = run_ranks(train, layout.ranks, layout, True, *EVALUATED)
    never = run_ranks(train, layout.ranks, layout, False, *AVERAGE)
    trained = run_ranks(train, layout.ranks, layout, True, *AVERAGE)
    assert [r["losses"] for r in measured] == [r["losses"] for r in never], "to the last bit"
    own = loss_of(measured[0]["averages"])
    assert all(abs(r["validation"]["val_loss"] - own) < TOLERANCE for r in measured)
    assert all(abs(r["validation"]["val_loss"] - own) > 100 * TOLERANCE for r in trained), "else nothing is shown"


@pytest.mark.parametrize("layout", [SERIAL, Layout(2, 1, 1)], ids=str)
def test_weights_that_stay_exchanged_are_noticed(layout):
    left = run_ranks(train_without_changing_back, layout.ranks, layout)
    never = run_ranks(train, layout.ranks, layout, False, *AVERAGE)
    assert left[0]["losses"][:4] == never[0]["losses"][:4]
    assert left[0]["losses"][4:] != never[0]["losses"][4:]


def test_tensors_larger_than_a_piece_are_exchanged_whole(monkeypatch):
    monkeypatch.setattr(ema, "_PIECE", 7)
    weights, average = torch.randn(5, 9), torch.randn(5, 9)
    before = weights.clone(), average.clone()
    ema.exchange({weights: {ema.KEY: average}})
    assert torch.equal(weights, before[1])
    assert torch.equal(average, before[0])
