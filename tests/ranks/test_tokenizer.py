"""The tokenizer's program on forked ranks: two ranks learn what one learns, a resumed run is bit-equal."""

import contextlib
import io
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import yaml

from llamagen_dist.build import build_vq
from llamagen_dist.config import load
from llamagen_dist.config.resume import compare
from llamagen_dist.data.batch import ImageBatch
from llamagen_dist.data.shards import open_shards
from llamagen_dist.errors import UserError
from llamagen_dist.parallel.topology import start
from llamagen_dist.tracking.log_line import MEASURED
from tests import checkpoints as store
from tests.image_shards import write_images
from tests.ranks.forked import run_ranks
from tokenizer_training.task import TokenizerTask
from tokenizer_training.train import main

IMAGES, BATCH, START, WARM_UP = 96, 8, 48, 24


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    write_images(folder / "train", 40, 16, (2, 2, 2, 2))
    write_images(folder / "validation", 9, 16, (2, 2, 2, 2), seed=1)
    path = folder / "tokenizer.yaml"
    path.write_text(yaml.safe_dump({
        "kind": "tokenizer", "run_dir": str(folder / "unused"),
        "model": {"channels": 8, "channel_multipliers": [1, 2], "res_blocks": 1, "z_channels": 8, "codebook_size": 32,
                  "codebook_dim": 4, "codebook_init": "first_batch"},
        "data": {"train": str(folder / "train"), "validation": str(folder / "validation"), "image_size": 16},
        "loss": {"perceptual": "none",
                 "discriminator": {"start_images": START, "warmup_images": WARM_UP, "ramp_images": 16, "channels": 8,
                                   "layers": 2, "norm": "group", "weight": 0.1}},
        "train": {"images": IMAGES, "global_batch": BATCH}, "optim": {"lr": 0.001, "weight_decay": 0.0},
        "validation": {"at_images": [48], "batch": 4}, "checkpoint": {"every_images": 32, "keep_last": 9},
        "log": {"every_steps": 1}}))  # fmt: skip
    return path


def call(config: Path, settings: tuple[str, ...]) -> tuple[str, str]:
    """(stdout, error sentence) of the program on this rank."""
    torch.set_num_threads(1)
    said = io.StringIO()
    try:
        with contextlib.redirect_stdout(said):
            main([str(config), *settings])
    except UserError as error:
        return said.getvalue(), str(error)
    return said.getvalue(), ""


def train(ranks: int, config: Path, folder: Path, *settings: str) -> str:
    results = run_ranks(call, ranks, config, (f"run_dir={folder}", *settings))
    assert [error for _, error in results] == [""] * ranks
    assert all(said == "" for said, _ in results[1:])
    return results[0][0]


def lines(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    groups = ("weights", "optimizer", "discriminator", "discriminator_optimizer")
    return {f"{g}/{k}": v for g in groups for k, v in store.read_weights(folder, group=g).items()}


@pytest.fixture(scope="module")
def two_ranks(config: Path) -> tuple[Path, str]:
    folder = config.parent / "two"
    return folder, train(2, config, folder)


def test_two_ranks_learn_what_one_learns(config, two_ranks):
    folder, said = two_ranks
    assert "perceptual loss off (loss.perceptual: none)" in said
    train(1, config, config.parent / "one")
    a, b = lines(folder), lines(config.parent / "one")
    assert [line.keys() for line in a] == [line.keys() for line in b]
    assert [line.get("samples") for line in a] == [line.get("samples") for line in b]
    for one, other in zip(a, b, strict=True):
        for name in one.keys() - MEASURED - {"samples"}:
            assert one[name] == pytest.approx(other[name], rel=5e-3, abs=5e-4), (name, one["images_seen"])
    train(
        1, config, config.parent / "seed", "train.seed=1", "tracking.pictures=0"
    )  # and the tolerance is one that other data misses
    assert lines(config.parent / "seed")[0]["loss"] != pytest.approx(a[0]["loss"], rel=5e-3, abs=5e-4)
    shown = [str(file.relative_to(folder)) for file in sorted(folder.glob("pictures/*/*"))]
    assert shown == [f"pictures/step_{step:08d}/reconstructions.png" for step in (6, 12)], "at both validations"
    assert not (config.parent / "seed" / "pictures").exists(), "twin: none are wanted"


def test_metrics_say_when_the_discriminator_came_in_and_what_validation_found(two_ranks):
    folder, _ = two_ranks
    steps = [line for line in lines(folder) if "loss" in line]
    assert [line["images_seen"] for line in steps] == list(range(BATCH, IMAGES + 1, BATCH))
    assert [("discriminator" in line) for line in steps] == [n * BATCH >= START for n in range(len(steps))]
    assert [("adversarial" in line) for line in steps] == [n * BATCH >= START + WARM_UP for n in range(len(steps))]
    found = [line for line in lines(folder) if "val_loss" in line]
    assert [line["images_seen"] for line in found] == [48, 96]
    assert all({"psnr", "ssim", "codebook_usage"} <= line.keys() for line in found)
    with np.load(folder / "codebook.npz") as looked:
        assert (int(looked["step"]), int(looked["images_seen"])) == (IMAGES // BATCH, IMAGES)
        assert (looked["counts"] > 0).mean() == found[-1]["codebook_usage"]
        assert looked["counts"].sum() == 9 * 8 * 8, "every held-out image once; a tenth would be the two ranks' padding"
        assert looked["map"].shape == (32, 2)
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["params"] == sum(
        v.numel() for k, v in store.read_weights(folder).items() if "codebook_used" not in k
    )


@pytest.fixture(scope="module")
def four_ranks(config: Path) -> Path:
    train(4, config, config.parent / "four")
    return config.parent / "four"


@pytest.mark.parametrize("images_kept", [32, pytest.param(64, marks=pytest.mark.long)])
def test_a_resumed_run_is_bit_equal(config, four_ranks, tmp_path, images_kept):
    """Once from before the discriminator came in and once from its warm-up. Four ranks: the sum of two gradients is the
    same in any order, that of more is not."""
    folder = four_ranks
    again = tmp_path / "again"
    shutil.copytree(folder, again)
    (again / "summary.json").unlink()
    for checkpoint in (again / "checkpoints").iterdir():
        if int(checkpoint.name.removeprefix("step_")) > images_kept // BATCH:
            shutil.rmtree(checkpoint)
    assert f"at image {images_kept} of {IMAGES}" in train(4, config, again)
    expected, found = weights(folder), weights(again)
    assert expected.keys() == found.keys()
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    earlier = weights(next((again / "checkpoints").glob(f"step_*{images_kept // BATCH}")))
    assert sum(not torch.equal(earlier[name], value) for name, value in expected.items()) > len(expected) / 2


def test_another_config_in_the_same_folder_is_refused(config, two_ranks):
    folder, _ = two_ranks
    ((_, error),) = run_ranks(call, 1, config, (f"run_dir={folder}", "loss.reconstruction=l1"))
    assert "loss.reconstruction: l2 -> l1" in error
    assert "\n" not in error


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        (["model.codebook_size=64"], "model.codebook_size: 32 -> 64"),
        (["model.quantizer=ema"], "model.quantizer: vq -> ema"),
        (["model.l2_norm=false"], "model.l2_norm: True -> False"),
    ],
)
def test_a_resume_with_another_codebook_or_quantizer_is_refused(config, two_ranks, settings, sentence):
    folder, _ = two_ranks
    here = f"run_dir={folder}"
    with pytest.raises(UserError) as refused:
        compare(folder, load(config, [here, *settings], kind="tokenizer"))
    assert sentence in str(refused.value)
    assert "choose another run_dir" in str(refused.value)
    assert "\n" not in str(refused.value)
    watched = ["validation.rfid=true", "validation.lpips.trunk=hed"]  # the twin: what is only looked at may change
    compare(folder, load(config, [here, *watched], kind="tokenizer"))


def reductions(config: Path, folder: Path, no_sync: bool) -> tuple[int, int]:
    """How often a step of four micro-batches averages gradients: (of the generator, of the discriminator)."""
    settings = load(config, [f"run_dir={folder}", "train.micro_batch=1"], kind="tokenizer")
    task = TokenizerTask(build_vq(settings.model), settings, start(), open_shards(settings.data.validation))
    assert task.discriminator is not None
    counts = [0, 0]

    def hook(which: int, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
        counts[which] += 1
        return dist.all_reduce(bucket.buffer().div_(2), async_op=True).get_future().then(lambda f: f.value()[0])

    for which, engine in enumerate((task.generator, task.discriminator)):
        engine.module.register_comm_hook(which, hook)
        if not no_sync:  # sabotage twin
            engine.micro_step = lambda last: contextlib.nullcontext()
    task.step(ImageBatch(torch.rand(4, 3, 16, 16), torch.arange(4)), START + WARM_UP)
    return counts[0], counts[1]


def test_gradients_are_averaged_once_a_step(config, tmp_path):
    assert run_ranks(reductions, 2, config, tmp_path, True) == [(1, 1)] * 2
    assert run_ranks(reductions, 2, config, tmp_path, False) == [(4, 4)] * 2


def rehearsal(config: Path, folder: Path) -> list[str]:
    """What a rehearsal before the very first step changes."""
    settings = load(config, [f"run_dir={folder}", "loss.discriminator.norm=batch"], kind="tokenizer")
    task = TokenizerTask(build_vq(settings.model), settings, start(), open_shards(settings.data.validation))
    assert task.discriminator is not None
    modules = {"generator": task.generator.plain, "discriminator": task.discriminator.plain}
    before = {f"{n}.{k}": v.clone() for n, m in modules.items() for k, v in m.state_dict().items()}
    task.rehearse(ImageBatch(torch.rand(8, 3, 16, 16), torch.arange(8)), 0)
    after = {f"{n}.{k}": v for n, m in modules.items() for k, v in m.state_dict().items()}
    return [name for name, value in before.items() if not torch.equal(value, after[name])]


def test_a_rehearsal_starts_no_codebook_and_counts_no_batch(config, tmp_path, monkeypatch):
    assert run_ranks(rehearsal, 1, config, tmp_path) == [[]]
    monkeypatch.setattr(torch.nn.Module, "buffers", lambda self, recurse=True: iter(()))  # twin: none is put back
    assert any("running_mean" in name for name in run_ranks(rehearsal, 1, config, tmp_path)[0])
