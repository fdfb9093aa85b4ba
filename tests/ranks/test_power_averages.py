"""Two power-function averages under every kind of layout: the same as one plain process, and through a resume."""

from pathlib import Path
from typing import Any

import pytest
import torch

from tests import checkpoints as store
from tests.ranks.forked import run_ranks
from tests.ranks.layouts import BATCH, SERIAL, STEPS, TOLERANCE, Layout, make_task, mostly_long, resume_from, steps

EVERY = f"checkpoint.every_images={BATCH}", f"checkpoint.keep_every_images={BATCH}"
SETTINGS = ("ema.widths=[0.05,0.2]", *EVERY)
NEAR = 3 * TOLERANCE  # the largest difference of any weight, which says less than a mean over them as the loss is one
LAYOUTS = [SERIAL, Layout(2, 1, 0), Layout(2, 2, 2), Layout(3, 1, 1), Layout(2, 1, 3), Layout(4, 2, 3)]


def powers(task: Any) -> dict[str, torch.Tensor]:
    found = {f"{e.group}:{e.key}": e.read(0) for e in task.entries() if e.group.startswith("ema-")}
    return {key: tensor.clone() for key, tensor in found.items() if tensor is not None}


def train(layout: Layout, folder: Path | None, *settings: str) -> tuple[Any, Any]:
    """Losses and final averages; folder: where to save after five steps."""
    task = make_task(layout, *settings)
    losses = steps(task, 0, 5)
    if folder is not None:
        state = {"task": dict(task.scalars())}
        store.save(folder, 5, task.entries(), state, task.topology, config_text="kind: gpt\n")
    return losses + steps(task, 5, STEPS), powers(task)


def go_on(layout: Layout, folder: Path, forget: str = "") -> Any:
    """The averages at the end; forget: an expression for entries that the resume leaves out."""
    from tests.ranks import layouts

    layouts.averages = powers  # what resume_from returns beside the losses
    return resume_from(layout, folder, 5, *SETTINGS, forget=forget)[1]


def gap(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    assert one.keys() == other.keys()
    return max(float((one[name] - other[name]).abs().max()) for name in one)


@pytest.fixture(scope="module")
def plain() -> Any:
    return run_ranks(train, 1, SERIAL, None, *SETTINGS)[0]


def test_they_change_nothing_of_the_training(plain):
    losses, kept = plain
    assert {name.partition(":")[0] for name in kept} == {"ema-0.05", "ema-0.2"}
    assert losses == run_ranks(train, 1, SERIAL, None, *EVERY)[0][0], "to the last bit"


@pytest.mark.parametrize("layout", mostly_long(*LAYOUTS[1:], quick=[Layout(2, 2, 2)]))
def test_every_layout_keeps_the_same_averages_and_resumes_them_to_the_bit(plain, tmp_path, layout):
    _, kept = run_ranks(train, layout.ranks, layout, tmp_path, *SETTINGS)[0]
    assert gap(kept, plain[1]) < NEAR
    again = run_ranks(go_on, layout.ranks, layout, tmp_path)[0]
    assert gap(again, kept) == 0
    assert gap(run_ranks(go_on, 1, SERIAL, tmp_path)[0], kept) < NEAR, "on another layout"
    forgotten = run_ranks(go_on, layout.ranks, layout, tmp_path, r"ema-0\.2:")[0]
    assert gap(forgotten, kept) > 10 * NEAR, "sabotage twin: one of them starts over"
