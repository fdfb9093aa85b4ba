"""Tokenizers with every quantizer on forked ranks: the number of ranks changes nothing, a resume is bit-equal."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor

from llamagen_dist.build import build_vq
from llamagen_dist.config import load
from llamagen_dist.data.shards import open_shards
from llamagen_dist.parallel.topology import Topology, start
from tests.image_shards import write_images
from tests.ranks.forked import run_ranks
from tests.ranks.tiny_tokenizer import BATCH, batch, kept, steps
from tokenizer_training import task as training
from tokenizer_training.task import TokenizerTask

STEPS, HALF = 10, 5
SOFT = "model.entropy_temperature=0.5"  # at LlamaGen's 0.01 the loss magnifies rounding a hundredfold
KINDS = {
    "vq": ["model.codebook_init=kmeans", "loss.entropy_weight=0.05", SOFT],
    "ema": ["model.codebook_init=first_batch", "model.codebook_decay=0.8"],
    "ibq": ["model.l2_norm=false", "optim.lr=0.001", "loss.commitment_weight=1", "loss.entropy_weight=0.05", SOFT],
    "fsq": ["model.levels=[4,4,4]"],
    "ifsq": ["model.levels=[4,4,4]"],
    "lfq": ["loss.entropy_weight=0.1", "model.entropy_temperature=1", "model.entropy_groups=2"],
}
TABLES = ("vq", "ema", "ibq")


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("quantizers")
    write_images(folder / "images", 9, 16)
    path = folder / "tokenizer.yaml"
    path.write_text(yaml.safe_dump({
        "kind": "tokenizer", "run_dir": str(folder / "unused"),
        "model": {"channels": 8, "channel_multipliers": [1, 2], "res_blocks": 1, "z_channels": 8, "codebook_size": 64},
        "data": {"train": str(folder / "images"), "validation": str(folder / "images"), "image_size": 16},
        "loss": {"perceptual": "none",
                 "discriminator": {"start_images": 0, "channels": 8, "layers": 2, "norm": "group", "weight": 0.1}},
        "codebook": {"statistics": True}, "ema": {"decay": 0.7},
        "train": {"images": 8000, "global_batch": BATCH}, "optim": {"lr": 0.002, "weight_decay": 0.0, "eps": 1e-4},
        "log": {"every_steps": 4}}))  # fmt: skip
    task_of(path, "fsq", Topology())  # imports what the forked ranks would each import
    return path


def task_of(config: Path, kind: str, topology: Topology, *more: str) -> TokenizerTask:
    torch.manual_seed(0)
    table = ["codebook.revive_after_steps=3"] if kind in TABLES else []
    settings = load(config, [f"model.quantizer={kind}", *KINDS[kind], *table, *more], kind="tokenizer")
    return TokenizerTask(build_vq(settings.model), settings, topology, open_shards(settings.data.validation))


def put_back(task: TokenizerTask, tensors: dict[str, Tensor]) -> None:
    for entry in task.entries():
        if (tensor := tensors.get(f"{entry.group}/{entry.key}")) is not None:
            entry.write(tensor)


def learn(config: Path, kinds: list[str], dropped: bool) -> dict[str, Any]:
    """By quantizer: its lines and codebook; whether a resumed run is bit-equal, and one that lacks a part of it.

    dropped: without the quantizer's own all-reduces."""
    torch.set_num_threads(1)
    topology, found = start(), {}
    for kind in kinds:
        task = task_of(config, kind, topology)
        if dropped:
            task.model.quantize.rank_mean = lambda mean: mean
            task.topology = replace(topology, dp_group=None)
            task.codebook.topology = task.topology
        task.rehearse(batch(0, topology), 0)
        lines = list(steps(task, range(HALF)))
        middle, scalars = kept(task), task.scalars()
        lines += steps(task, range(HALF, STEPS))
        end, equal = kept(task), {}
        for lost in ("", "codebook/since_line", "ema/encoder.conv_in.weight", "weights/quantize.ema_sum"):
            if lost == "" or lost in end:
                again = task_of(config, kind, topology)
                if lost:  # as a checkpoint without it would leave it: the middle's, spoilt
                    middle[lost] = middle[lost] + 1
                put_back(again, middle)
                again.load_scalars(scalars)
                resumed = list(steps(again, range(HALF, STEPS)))
                same = all(torch.equal(value, end[name]) for name, value in kept(again).items())
                equal[lost] = same and resumed == lines[HALF:]
        found[kind] = lines, end, equal
    return found


@pytest.fixture(scope="module")
def one(config: Path) -> dict[str, Any]:
    return run_ranks(learn, 1, config, list(KINDS), False)[0]


@pytest.fixture(scope="module")
def two(config: Path) -> list[dict[str, Any]]:
    return run_ranks(learn, 2, config, list(KINDS), False)


def far(a: Any, b: Any) -> float:
    """The largest difference of two runs' lines, relative to the number where that is above 0.1."""
    (lines, *_), (others, *_) = a, b
    assert [line.keys() for line in lines] == [line.keys() for line in others]
    pairs = [(one[name], other[name]) for one, other in zip(lines, others, strict=True) for name in one]
    return max(abs(x - y) / max(0.1, abs(x)) for x, y in pairs)


def averages_apart(one: dict[str, Tensor], more: dict[str, Tensor], group: str) -> float:
    """The largest difference of one run's averaged weights from another's ``group``."""
    averages = {name.removeprefix("ema/"): value for name, value in one.items() if name.startswith("ema/")}
    return max(float((value - more[f"{group}/{name}"]).abs().max()) for name, value in averages.items())


def same_on_more_ranks(kind: str, one: dict[str, Any], more: list[dict[str, Any]]) -> None:
    assert far(one[kind], more[0][kind]) < 1e-5
    lines = [line for line in one[kind][0] if "train_usage" in line]
    assert len(lines) == 3  # steps 1, 4 and 8
    for mine, theirs in zip(lines, (line for line in more[0][kind][0] if "train_usage" in line), strict=True):
        assert mine["train_usage"] == theirs["train_usage"]
    ends = [run[kind][1] for run in more]
    assert all(torch.equal(value, ends[-1][name]) for name, value in ends[0].items())
    assert averages_apart(one[kind][1], ends[0], "ema") < 1e-5
    assert averages_apart(one[kind][1], ends[0], "weights") > 1e-3, "sabotage twin: weights that are not averaged"
    assert "train_narrowest" in lines[0] or kind in TABLES
    assert ("revived" in lines[0]) == (kind in TABLES)


def bit_equal_after_a_resume(kind: str, two: list[dict[str, Any]]) -> None:
    for rank in two:
        equal = dict(rank[kind][2])
        assert equal.pop("")
        sums = ["weights/quantize.ema_sum"] if kind == "ema" else []
        assert equal.keys() == {"codebook/since_line", "ema/encoder.conv_in.weight", *sums}
        assert not any(equal.values()), "sabotage twin: a spoilt part of its state is seen"


def test_moving_averages_are_the_same_on_more_ranks_and_after_a_resume(config):
    """The quantizer with most state; the others' tests are long."""
    (one,) = run_ranks(learn, 1, config, ["ema"], False)
    two = run_ranks(learn, 2, config, ["ema"], False)
    same_on_more_ranks("ema", one, two)
    bit_equal_after_a_resume("ema", two)


@pytest.mark.long
@pytest.mark.parametrize("kind", KINDS)
def test_two_ranks_learn_what_one_learns(kind, one, two):
    same_on_more_ranks(kind, one, two)
    assert kind != "ibq" or sum(line.get("revived", 0) for line in one[kind][0]) > 0


@pytest.mark.long
def test_four_ranks_learn_what_one_learns(config, one):
    four = run_ranks(learn, 4, config, ["vq", "lfq"], False)
    for kind in four[0]:
        same_on_more_ranks(kind, one, four)
        bit_equal_after_a_resume(kind, four)


def perturbed(config: Path, broken: bool) -> list[dict[str, float]]:
    """Lines of a run with latent perturbation. broken: every rank perturbs as if its images were the batch's first."""
    torch.set_num_threads(1)
    topology = start()
    task = task_of(config, "vq", topology, "codebook.perturb_share=0.6", "codebook.perturb_neighbours=8")
    if broken:  # in this forked process alone
        real, mine = training.perturbation, topology.rank * BATCH // topology.world
        training.perturbation = lambda config, quantizer, first: real(config, quantizer, first - mine)
    return list(steps(task, range(STEPS)))


@pytest.mark.long
def test_latents_are_perturbed_alike_on_any_number_of_ranks(config, one):
    alone = run_ranks(perturbed, 1, config, False)[0]
    assert far((alone, None), one["vq"]) > 1e-2, "perturbed they are"
    for ranks in (2, 4):
        assert far((alone, None), (run_ranks(perturbed, ranks, config, False)[0], None)) < 1e-5
    assert far((alone, None), (run_ranks(perturbed, 2, config, True)[0], None)) > 1e-3, "sabotage twin"


@pytest.mark.long
def test_without_its_all_reduces_two_ranks_would_learn_something_else(config, one):
    wrong = run_ranks(learn, 2, config, ["vq", "ema", "lfq"], True)[0]
    assert all(far(one[kind], wrong[kind]) > 1e-2 for kind in wrong)


@pytest.mark.long
@pytest.mark.parametrize("kind", KINDS)
def test_training_lowers_the_loss(kind, one):
    lines = one[kind][0]
    assert lines[-1]["reconstruction"] < 0.95 * lines[0]["reconstruction"]


@pytest.mark.long
@pytest.mark.parametrize("kind", KINDS)
def test_a_resumed_run_is_bit_equal(kind, two):
    bit_equal_after_a_resume(kind, two)
