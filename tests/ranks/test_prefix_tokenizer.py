"""A prefix tokenizer on forked ranks: neither ranks nor micro-batches change its lengths, a resume is bit-equal."""

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from llamagen_dist.build import build_vq
from llamagen_dist.config import load
from llamagen_dist.data.shards import open_shards
from llamagen_dist.parallel.topology import Topology, start
from tests.image_shards import write_images
from tests.ranks.forked import run_ranks
from tests.ranks.tiny_tokenizer import BATCH, batch, kept, steps
from tokenizer_training import task as task_module
from tokenizer_training.task import TokenizerTask

STEPS, HALF, N = 10, 5, 8


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("prefix")
    write_images(folder / "images", 9, 16)
    path = folder / "tokenizer.yaml"
    path.write_text(yaml.safe_dump({
        "kind": "tokenizer", "run_dir": str(folder / "unused"),
        "model": {"channels": 8, "channel_multipliers": [1, 2], "res_blocks": 1, "z_channels": 8, "codebook_size": 32,
                  "tokens": "prefix", "token_count": N, "image_size": 16, "token_width": 16, "token_layers": 1},
        "data": {"train": str(folder / "images"), "validation": str(folder / "images"), "image_size": 16},
        "loss": {"perceptual": "none",
                 "discriminator": {"start_images": 0, "channels": 8, "layers": 2, "norm": "group", "weight": 0.1}},
        "codebook": {"statistics": True, "revive_after_steps": 3},
        "train": {"images": 8000, "global_batch": BATCH}, "optim": {"lr": 0.002, "weight_decay": 0.0, "eps": 1e-4},
        "log": {"every_steps": 4}}))  # fmt: skip
    task_of(path, Topology())  # imports what the forked ranks would each import
    return path


def task_of(config: Path, topology: Topology, *changes: str) -> TokenizerTask:
    torch.manual_seed(0)
    settings = load(config, changes, kind="tokenizer")
    return TokenizerTask(build_vq(settings.model), settings, topology, open_shards(settings.data.validation))


def learn(config: Path, changes: tuple[str, ...] = (), resumed: bool = False, by_rank: bool = False) -> dict[str, Any]:
    """Lines, held-out scores, and whether runs resumed from the middle are bit-equal: one, and one a step too early.

    by_rank: lengths by the position on the rank, as a generator per rank would draw them."""
    torch.set_num_threads(1)
    topology = start()
    if by_rank:
        drawn = task_module.prefix_lengths
        task_module.prefix_lengths = lambda config, first, count: drawn(config, 0, count)
    task = task_of(config, topology, *changes)
    lines = list(steps(task, range(HALF)))
    middle, scalars = {name: value.clone() for name, value in kept(task).items()}, task.scalars()
    lines += steps(task, range(HALF, STEPS))
    end, equal = kept(task), []
    for early in (0, BATCH) if resumed else ():
        again = task_of(config, topology, *changes)
        for entry in again.entries():
            entry.write(middle[f"{entry.group}/{entry.key}"])
        again.load_scalars(scalars)
        for step in range(HALF, STEPS):
            again.step(batch(step, topology), step * BATCH - early)
        equal.append(all(torch.equal(value, end[name]) for name, value in kept(again).items()))
    return {"lines": lines, "scores": task.validate(), "equal": equal}


def far(a: dict[str, Any], b: dict[str, Any]) -> float:
    """The largest difference of two runs' lines, relative to the number where that is above 0.1."""
    assert [line.keys() for line in a["lines"]] == [line.keys() for line in b["lines"]]
    pairs = [(one[name], two[name]) for one, two in zip(a["lines"], b["lines"], strict=True) for name in one]
    return max(abs(x - y) / max(0.1, abs(x)) for x, y in pairs)


def test_two_ranks_learn_what_one_learns_and_a_resume_is_bit_equal(config):
    """fp32, ten steps, discriminator and revival on: 1e-5, which summing in another order stays below."""
    (one,) = run_ranks(learn, 1, config)
    two = run_ranks(learn, 2, config, ("train.micro_batch=2",), True)
    assert far(one, two[0]) < 1e-5
    assert [run["equal"] for run in two] == [[True, False]] * 2, "twin: lengths of other positions are other weights"
    wrong = run_ranks(learn, 2, config, ("train.micro_batch=2",), False, True)[0]
    assert far(one, wrong) > 1e-3, "sabotage twin: lengths that depend on the rank are seen"
    for name, value in one["scores"].items():
        assert two[0]["scores"][name] == pytest.approx(value, rel=1e-4), name
    assert {f"psnr_at_{k}" for k in (1, 2, 4)} <= one["scores"].keys()
    assert "psnr_at_8" not in one["scores"]  # which is psnr
