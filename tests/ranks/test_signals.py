"""A signal at any moment of a run: saved within one step, and what goes on is bit for bit the whole run."""

import os
import signal
import time
from pathlib import Path

import pytest
import torch

from llamagen_dist.checkpoint.saver import Saver
from llamagen_dist.training import guards
from llamagen_dist.training.gpt_task import GPTTask
from tests import checkpoints as store
from tests.ranks.fit_run import lines, nothing, run
from tests.ranks.forked import end_ranks, run_ranks
from tests.ranks.layouts import BATCH, STEPS, Layout, mostly_long

LAYOUT = Layout(2)
SETTINGS = (
    "log.every_steps=1",
    f"checkpoint.every_images={3 * BATCH}",
    f"validation.every_images={5 * BATCH}",
    "ema.decay=0.5",
)
KEYS = ("step", "images_seen", "loss", "grad_norm", "lr", "samples", "val_loss", "val_loss_null")


def interrupted(folder: Path, when: str, number: int, saves: bool = True) -> None:
    """Rank 1 gets the signal ``when``; the others hear of it from rank 1."""

    def fire(task: GPTTask) -> None:
        if task.topology.rank == 1:
            os.kill(os.getpid(), number)

    def at(step: int):
        return lambda task, current: fire(task) if current == step else None

    faults = {"read": nothing, "compute": nothing}
    if when == "before the first batch":
        enter = guards.StopFlag.__enter__

        def told(flag):
            entered = enter(flag)
            if flag._topology.rank == 1:
                os.kill(os.getpid(), number)
            return entered

        guards.StopFlag.__enter__ = told
    elif when == "in the first batch":
        faults["read"] = at(1)
    elif when == "in a step":
        faults["compute"] = at(4)
    elif when == "in the last step":
        faults["compute"] = at(STEPS)
    elif when == "in a validation":
        validate = GPTTask.validate

        def validate_and_fire(task):
            fire(task)
            return validate(task)

        GPTTask.validate = validate_and_fire
    elif when == "in a background save":
        write = Saver._write_round

        def slow(*arguments):
            time.sleep(0.4)  # step 3's save is under way in step 4
            write(*arguments)

        Saver._write_round = slow
        faults["read"] = at(4)
    if not saves:
        save = Saver.save
        Saver.save = lambda self, step, *a, **k: save(self, step, *a, **k) if step % 3 == 0 else None
    run(LAYOUT, folder, *SETTINGS, **faults)


def whole(folder: Path) -> dict[str, torch.Tensor]:
    return run(LAYOUT, folder, *SETTINGS)


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    return run_ranks(whole, 2, folder)[0], comparable(folder)


def comparable(folder: Path) -> list[dict]:
    return [{key: line[key] for key in KEYS if key in line} for line in lines(folder)]


def redone(folder: Path) -> int:
    """Steps that were made and are not in the newest checkpoint."""
    reached = max((line["step"] for line in lines(folder)), default=0) if (folder / "metrics.jsonl").exists() else 0
    newest = store.newest(folder)
    return reached - (0 if newest is None else store.read_state(newest)["step"])


MOMENTS = {
    "before the first batch": 0,
    "in the first batch": 1,
    "in a validation": 5,
    "in a background save": 4,
    "in the last step": STEPS,
}


@pytest.mark.parametrize("when", mostly_long(*MOMENTS, quick=["in a validation", "in a background save"]))
def test_a_signal_is_saved_within_one_step_and_nothing_is_lost(tmp_path, reference, when):
    ends = end_ranks(interrupted, 2, tmp_path, when, signal.SIGUSR2)
    if when != "in the last step":
        for code, trace in ends:
            assert code == 1
            assert f"Stopped: {tmp_path}: stopped at image {MOMENTS[when] * BATCH} of {STEPS * BATCH}" in trace
    assert redone(tmp_path) == 0
    steps = [store.read_state(f)["step"] for f in store.complete(tmp_path)]
    assert steps[-1:] == [MOMENTS[when]] * bool(MOMENTS[when])
    if when == "in a background save":
        assert steps == [3, 4]
    weights, told = reference
    found = run_ranks(whole, 2, tmp_path)[0]
    assert comparable(tmp_path) == told
    if found:  # a finished run has nothing more to do
        assert found.keys() == weights.keys()
        assert all(torch.equal(found[name], weights[name]) for name in weights if when != "in the last step")
    last = store.newest(tmp_path)
    assert store.read_state(last)["step"] == STEPS
    saved = {f"weights:{key}": tensor for key, tensor in store.read_weights(last).items()}
    assert all(torch.equal(saved[name], weights[name]) for name in saved if name in weights)


def test_a_stop_without_a_save_is_noticed(tmp_path):
    """Sabotage twin: the same comparison sees the step that is lost."""
    end_ranks(interrupted, 2, tmp_path, "in a step", signal.SIGUSR2, False)
    assert redone(tmp_path) == 1
