"""The checkers of the faults themselves: each is shown a good run, and one in which just its own thing is wrong."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from llamagen_dist.data import digest
from llamagen_dist.data.order import Order
from llamagen_dist.parallel.entries import replicated
from llamagen_dist.parallel.topology import Topology
from tests import checkpoints as store
from tests.expected_digest import expected
from tests.slurm.faults import checks
from tests.slurm.faults.campaign import judge
from tests.slurm.faults.injections import FAULTS
from tests.slurm.faults.programs import GPT
from tests.slurm.faults.trial import Trial

STEPS, KILLED = 30, 17
FAULT = next(fault for fault in FAULTS if fault.number == 5)  # a kill: 15 steps again are allowed


def run(folder: Path, redone_from: int | None = 11, nudge: float = 0.0) -> Trial:
    """The files of a run that was killed after step 17 and went on with step ``redone_from`` (None: it was not)."""
    trial = Trial(GPT, folder, folder, folder)
    trial.place.path.mkdir(parents=True)
    samples = torch.zeros((), dtype=torch.int64)
    order = Order(GPT.samples, 0)
    with open(folder / "metrics.jsonl", "w") as file:
        for step in range(1, STEPS + 1):
            samples = samples + expected(order, step * GPT.batch, (step - 1) * GPT.batch)
            line = {"loss": 4.0 - step / 100 + nudge, "samples": digest.text(samples), "images_per_s": id(folder) % 97}
            file.write(json.dumps({"step": step, "images_seen": step * GPT.batch, **line}) + "\n")
    for step in (20, 30):
        weight = torch.arange(6.0).reshape(2, 3) * step + nudge
        store.save(folder, step, [replicated("weights", "w", weight)], {}, Topology(), config_text="kind: gpt\n")
    steps = [*range(1, KILLED + 1), *range(redone_from, STEPS + 1)] if redone_from else [*range(1, STEPS + 1)]
    owners = ["7.0"] * KILLED + ["7.1"] * (len(steps) - KILLED) if redone_from else ["7.0"] * len(steps)
    text = "".join(f"{n}.5 {owner} {step}\n" for n, (owner, step) in enumerate(zip(owners, steps, strict=True)))
    folder.with_name(folder.name + "-steps.txt").write_text(text)
    return trial


@pytest.fixture
def whole(tmp_path: Path) -> Trial:
    return run(tmp_path / "whole", redone_from=None)


def test_a_good_run_passes(tmp_path, whole):
    trial = run(tmp_path / "killed")
    assert judge(trial, FAULT, whole) == []
    assert checks.steps_redone(trial.steps()) == [7]


def test_a_restart_from_zero_is_bit_equal_and_still_reported(tmp_path, whole):
    trial = run(tmp_path / "killed", redone_from=1)
    assert judge(trial, FAULT, whole) == ["a restart did 17 steps again, more than 15"]


def test_steps_left_out_are_reported(tmp_path, whole):
    assert judge(run(tmp_path / "killed", redone_from=20), FAULT, whole) == ["a restart left out 2 steps"]


def test_after_a_signal_one_step_again_is_too_many(tmp_path):
    steps = run(tmp_path / "killed", redone_from=KILLED).steps()
    assert checks.redone_too_many(steps, 0) == ["a restart did 1 steps again, more than 0"]
    assert checks.redone_too_many(run(tmp_path / "signal", redone_from=KILLED + 1).steps(), 0) == []


@pytest.mark.parametrize("tolerance", [0.0, 1e-5])
def test_numbers_beyond_the_tolerance_are_reported(tmp_path, whole, tolerance):
    other = run(tmp_path / "other", nudge=3e-6)
    lines = checks.same_lines(other.metrics(), whole.metrics(), tolerance)
    weights = checks.same_weights(other.folder, whole.folder, tolerance)
    if tolerance:
        assert (lines, weights) == ([], [])
        far = run(tmp_path / "far", nudge=3e-3)
        lines = checks.same_lines(far.metrics(), whole.metrics(), tolerance)
        weights = checks.same_weights(far.folder, whole.folder, tolerance)
    assert lines[0].startswith("step 1: loss is 3.99")
    assert lines[-1] == "and 27 more"
    assert weights[0].startswith("weights:w differs by up to ")


def spoil_metrics(change: Callable[[list[dict]], object]) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        change(lines)
        (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))

    return spoil


def shift_a_sample(lines: list[dict]) -> None:
    """As if the images from step 12 on were those of one position later."""
    order = Order(GPT.samples, 0)
    moved = expected(order, 12 * GPT.batch + 1, 12 * GPT.batch) - expected(order, 12 * GPT.batch, 191)
    for line in lines[11:]:
        line["samples"] = digest.text(digest.number(line["samples"]) + moved)


def flip_a_bit(folder: Path) -> None:
    file = next((folder / "checkpoints/step_00000030").glob("weights-*"))
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)


def half_a_checkpoint(folder: Path) -> None:
    shutil.copytree(folder / "checkpoints/step_00000020", folder / "checkpoints/step_00000025")
    (folder / "checkpoints/step_00000025/COMPLETE").unlink()


@pytest.mark.parametrize(
    ("spoil", "sentence"),
    [
        (spoil_metrics(lambda lines: lines.pop(13)), "missing: [14]"),
        (spoil_metrics(lambda lines: lines.insert(13, lines[13])), "too often: [14]"),
        (spoil_metrics(lambda lines: lines[20].update(loss=3.79 + 1e-15)), "step 21: loss is 3.79"),
        (spoil_metrics(shift_a_sample), "from step 12 on the run has seen other samples"),
        (spoil_metrics(lambda lines: [line.pop("samples") for line in lines]), "no line of metrics.jsonl tells"),
        (flip_a_bit, "weights:w differs"),
        (flip_a_bit, "damaged (sha256"),
        (half_a_checkpoint, "step_00000025 is half a checkpoint"),
        (
            lambda folder: (folder / "launch/.lock.host.17.tmp.json").touch(),
            "launch/.lock.host.17.tmp.json is left over",
        ),
        (lambda folder: (folder / "launch/rank_0.tmp").touch(), "launch/rank_0.tmp is left over"),
    ],
)
def test_one_wrong_thing_is_reported(tmp_path, whole, spoil: Callable[[Path], object], sentence: str):
    trial = run(tmp_path / "killed")
    spoil(trial.folder)
    assert any(sentence in problem for problem in judge(trial, FAULT, whole)), judge(trial, FAULT, whole)
