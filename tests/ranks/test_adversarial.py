"""What a discriminator does on forked ranks: batch statistics, adaptive weight, R1 and LeCAM as on one rank."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from llamagen_dist.build import build_vq
from llamagen_dist.config import TokenizerConfigFile
from llamagen_dist.config.section import build
from llamagen_dist.data.batch import ImageBatch
from llamagen_dist.data.shards import open_shards
from llamagen_dist.parallel.topology import Topology, start
from tests import checkpoints as store
from tests.image_shards import write_images
from tests.ranks.forked import run_ranks
from tokenizer_training import batch_norm
from tokenizer_training.batch_norm import SynchronisedBatchNorm2d
from tokenizer_training.task import TokenizerTask

STEPS, BATCH = 10, 8
PATCHES: dict[str, Any] = {
    "norm": "batch", "layers": 2, "adaptive_weight": True, "ramp_images": 40, "r1_weight": 1.0, "r1_every": 4,
    "lecam_weight": 0.1, "lecam_decay": 0.5}  # fmt: skip
WHOLE: dict[str, Any] = {"kind": "stylegan", "loss": "non_saturating", "minibatch_stddev": 2, "r1_weight": 1.0,
                         "r1_every": 4, "channels": 1}  # fmt: skip
TOGETHER: dict[str, Any] = {"rtol": 1e-5, "atol": 1e-5}


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("images")
    write_images(folder, count=4, size=16)
    return folder


def make_task(shards: Path, discriminator: dict[str, Any], micro: int | None = None) -> TokenizerTask:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    config = build(TokenizerConfigFile,
        {"kind": "tokenizer", "run_dir": shards / "run",
         "model": {"channels": 8, "channel_multipliers": [1, 2], "res_blocks": 1, "z_channels": 8, "codebook_size": 32,
                   "codebook_dim": 4},
         "data": {"train": shards, "validation": shards, "image_size": 16},
         "train": {"images": STEPS * BATCH, "global_batch": BATCH, "micro_batch": micro},
         # an eps with which Adam does not make steps of one size out of rounding errors
         "optim": {"lr": 1e-3, "weight_decay": 0, "eps": 1e-3}, "guard": {"skip_non_finite": 1},
         "loss": {"perceptual": "none", "discriminator": {"start_images": 0, "channels": 8, **discriminator}}},
        "test")  # fmt: skip
    return TokenizerTask(build_vq(config.model), config, start(), open_shards(shards))


def share_of(step: int) -> ImageBatch:
    """This rank's images of that step."""
    share, rank = BATCH // dist.get_world_size(), dist.get_rank()
    images = torch.rand(BATCH, 3, 16, 16, generator=torch.Generator().manual_seed(step)) * 2 - 1
    return ImageBatch(images[rank * share : (rank + 1) * share], torch.arange(share))


def steps(task: TokenizerTask, *numbers: int) -> list[dict[str, Tensor]]:
    """Metrics as the log has them: means over the ranks."""
    whole = start()
    lines = [task.step(share_of(step), step * BATCH) for step in numbers or range(STEPS)]
    return [{name: whole.mean(value.detach().float()) for name, value in line.items()} for line in lines]


def state(task: TokenizerTask) -> dict[str, Tensor]:
    return {f"{e.group}/{e.key}": e.local().clone() for e in task.entries() if "optimizer" not in e.group}


def drop_batch_norm(task: TokenizerTask) -> None:
    for module in task.discriminator.plain.modules():
        if isinstance(module, SynchronisedBatchNorm2d):
            module.group = None


def drop_its_gradient(task: TokenizerTask) -> None:
    batch_norm._SumOverRanks.backward = staticmethod(lambda ctx, gradient: (gradient, None))


def drop_adaptive(task: TokenizerTask) -> None:
    task.loss.mean = lambda values: values


def drop_lecam(task: TokenizerTask) -> None:
    task.topology = Topology()  # what the task itself sums, which here are the logits only


TWINS: list[Callable[[TokenizerTask], None]] = [drop_batch_norm, drop_adaptive, drop_lecam, drop_its_gradient]
"""The last one is for good."""


def train(shards: Path, twins: bool) -> list[tuple[list[dict[str, Tensor]], dict[str, Tensor]]]:
    """Metrics and weights of both kinds of discriminator, and of the first with each twin."""
    results = []
    for keys in (PATCHES, WHOLE):
        task = make_task(shards, keys)
        results.append((steps(task), state(task)))
    for sabotage in TWINS if twins else ():
        task = make_task(shards, PATCHES)
        sabotage(task)
        results.append((steps(task, 0, 1, 2), {}))
    return results


def alike(one: tuple[list[dict[str, Tensor]], dict[str, Tensor]], other: Any) -> bool:
    """Whether metrics and weights agree to 1e-5."""
    (a, x), (b, y) = one, other
    assert [line.keys() for line in a] == [line.keys() for line in b]
    assert x.keys() == y.keys()
    pairs = [(u[name], v[name]) for u, v in zip(a, b, strict=True) for name in u]
    pairs += [(x[name].float(), y[name].float()) for name in x]
    return all(torch.allclose(u, v, **TOGETHER) for u, v in pairs)


@pytest.fixture(scope="module")
def alone(shards: Path) -> Any:
    return run_ranks(train, 1, shards, False)[0]


def test_two_ranks_train_as_one_does(shards, alone):
    results = run_ranks(train, 2, shards, True)
    for rank in results:
        assert [alike(mine, theirs) for mine, theirs in zip(rank[:2], alone, strict=True)] == [True, True]
    first = results[0]
    few = (alone[0][0][:3], {})
    assert alike((first[0][0][:3], {}), few)
    assert [alike(broken, few) for broken in first[2:]] == [False] * len(TWINS), "sabotage twins"
    lines = first[0][0]
    assert ["r1" in line for line in lines] == [(step + 1) % 4 == 0 for step in range(STEPS)]
    assert all(1e-3 < float(line["adaptive_weight"]) < 1e4 for line in lines)


@pytest.mark.long
def test_four_ranks_train_as_one_does(shards, alone):
    for rank in run_ranks(train, 4, shards, False):
        assert [alike(mine, theirs) for mine, theirs in zip(rank, alone, strict=True)] == [True, True]


def life_of_a_run(shards: Path, folder: Path) -> list[tuple[str, bool]]:
    """What a rehearsal, a step that is left out, and a checkpoint do to the discriminator's own state."""
    found: list[tuple[str, bool]] = []

    def same(what: str, one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
        found.append((what, all(torch.equal(one[name], other[name]) for name in one)))

    task = make_task(shards, PATCHES)
    before = state(task)
    task.rehearse(share_of(0), 0)
    same("rehearsal", before, state(task))
    steps(task, 0, 1, 2)
    before = state(task)
    task.step(ImageBatch(share_of(3).images * float("nan"), torch.arange(BATCH // 2)), 3 * BATCH)
    means = "discriminator/lecam_means"  # batch statistics saw the NaN, as they do without the penalties
    same("left out", {means: before[means]}, state(task))
    found.append(("has means", bool((before[means] != 0).all())))

    task = make_task(shards, PATCHES)
    steps(task, 0, 1, 2)
    saved = store.save(folder, 3, task.entries(), {}, task.topology, config_text="")
    scalars = dict(task.scalars())
    steps(task, 3, 4, 5)
    for what, lost in (("resume", ""), ("resume without the means", "lecam_means")):
        again = make_task(shards, PATCHES)
        store.restore(saved, [entry for entry in again.entries() if entry.key != (lost or None)])
        again.load_scalars(scalars)
        steps(again, 3, 4, 5)
        same(what, state(task), state(again))

    task, counts = make_task(shards, PATCHES, micro=1), [0, 0]

    def hook(which: int, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
        counts[which] += 1
        return dist.all_reduce(bucket.buffer().div_(2), async_op=True).get_future().then(lambda f: f.value()[0])

    for which, engine in enumerate((task.generator, task.discriminator)):
        engine.module.register_comm_hook(which, hook)
    found.append(("R1 is due", "r1" in task.step(share_of(3), 3 * BATCH)))
    found.append(("one reduction a step", counts == [1, 1]))
    return found


@pytest.mark.long
def test_the_penalties_state_in_the_life_of_a_run(shards, tmp_path):
    expected = [("rehearsal", True), ("left out", True), ("has means", True), ("resume", True),
                ("resume without the means", False), ("R1 is due", True), ("one reduction a step", True)]  # fmt: skip
    assert run_ranks(life_of_a_run, 2, shards, tmp_path / "run") == [expected] * 2
