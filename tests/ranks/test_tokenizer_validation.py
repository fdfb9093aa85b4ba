"""Validation of a tokenizer while it trains: the same on any number of ranks, nothing of it reaches the training."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llamagen_dist.build import build_vq
from llamagen_dist.config import TokenizerConfigFile
from llamagen_dist.config.section import build
from llamagen_dist.data.batch import ImageBatch
from llamagen_dist.data.images import load_images, to_floats
from llamagen_dist.data.shards import open_shards
from llamagen_dist.errors import UserError
from llamagen_dist.evaluation.frechet import frechet_distance, gaussian_of
from llamagen_dist.evaluation.image_quality import ssim, ssim_llamagen
from llamagen_dist.evaluation.inception import Features
from llamagen_dist.evaluation.inception_weights import Extractor
from llamagen_dist.models.vq import VQModel, to_uint8
from llamagen_dist.parallel.topology import Topology, start
from tests.image_shards import write_images
from tests.random_vgg16 import write_vgg16
from tests.ranks.forked import run_ranks
from tokenizer_training import validation
from tokenizer_training.task import TokenizerTask

CODES, COUNT = 32, 9


class Projected(nn.Module):
    """2,048 numbers of a picture's 48 coarse pixels, in the place of Inception's."""

    images = 0

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("matrix", torch.randn(48, 2048, generator=torch.Generator().manual_seed(0)))

    def forward(self, images: Tensor) -> Features:
        Projected.images += len(images)
        coarse = F.adaptive_avg_pool2d(images.permute(0, 3, 1, 2).float() / 255, 4).flatten(1)
        return Features(coarse @ self.matrix, torch.zeros(len(images), 2023), None)


@pytest.fixture
def projected(monkeypatch):
    """Features of no cost; the real network's are compared in the long test below."""
    made = Extractor(Projected(), {"weights_sha256": "0", "source": "test"})
    monkeypatch.setattr(validation, "open_extractor", lambda section: made)
    monkeypatch.setattr(Projected, "images", 0)


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_images(tmp_path_factory.mktemp("images") / "shards", COUNT, 16, (1, 2, 2, 1))


def make_task(folder: Path, topology: Topology | None = None, **parts: Any) -> TokenizerTask:
    config = build(TokenizerConfigFile,
        {"kind": "tokenizer", "run_dir": folder.parent,
         "model": {"channels": 8, "channel_multipliers": [1, 2], "res_blocks": 1, "z_channels": 8,
                   "codebook_size": CODES, "codebook_dim": 4, **parts.pop("model", {})},
         "data": {"train": folder, "validation": folder, "image_size": parts.pop("size", 16)},
         "loss": {"perceptual": "none", "discriminator": {"kind": "none"}, **parts.pop("loss", {})},
         "optim": {"lr": 1e-2, "weight_decay": 0}, "train": {"images": 400, "global_batch": 4},
         "validation": {"batch": 4, **parts.pop("validation", {})}, **parts}, "test")  # fmt: skip
    torch.manual_seed(0)
    return TokenizerTask(build_vq(config.model), config, topology or Topology(), open_shards(folder))


def shown(task: TokenizerTask) -> tuple[Tensor, Tensor]:
    """uint8 (n, 3, S, S): what the tokenizer makes of the held-out images, and those."""
    pixels = load_images(task.held_out, range(len(task.held_out)), task.config.data.image_size)
    with torch.no_grad():
        made = to_uint8(task.model.eval()(to_floats(pixels))[0])
    return made, torch.from_numpy(pixels).permute(0, 3, 1, 2)


# --- what is measured ---


def test_ssims_perplexity_and_rfid_are_those_of_the_pictures(shards, projected, capsys):
    task = make_task(shards, validation={"rfid": True})
    found = task.validate()
    assert "biased upward for few images" in capsys.readouterr().out
    assert task.describe()["rfid_of"]["images"] == COUNT
    assert "singular" in task.describe()["rfid_of"]["bias"], "nine images have a rank of eight"
    made, originals = shown(task)
    region = (1, 2, 14, 15)
    assert found["ssim"] == pytest.approx(float(ssim(made, originals, region).mean()), abs=1e-4)
    assert found["ssim_llamagen"] == pytest.approx(float(ssim_llamagen(made, originals, region).mean()), abs=1e-4)
    assert found["ssim_llamagen"] > found["ssim"] + 0.01
    with torch.no_grad():
        codes = task.model.encode(to_floats(load_images(task.held_out, range(COUNT), 16)))
    share = torch.bincount(codes.flatten(), minlength=CODES) / codes.numel()
    assert found["codebook_perplexity"] == pytest.approx(float(torch.special.entr(share).sum().exp()), rel=1e-3)
    a, b = (gaussian_of(Projected()(part.permute(0, 2, 3, 1)).pool) for part in (made, originals))
    assert found["rfid"] == pytest.approx(frechet_distance(a, b), rel=1e-3)
    plain = make_task(shards).validate()
    assert plain == {name: value for name, value in found.items() if name != "rfid"}
    assert "rfid_of" not in make_task(shards).describe()


def on_ranks(folder: Path, broken: bool) -> dict[str, float]:
    torch.set_num_threads(1)
    task = make_task(folder, start(), validation={"rfid": True})
    if broken:  # as if all were rank 0: half of the images twice, the others never
        task.validation.topology = replace(task.topology, rank=0)
    scores = task.validate()
    assert task.validate() == scores
    return scores


def test_any_number_of_ranks_counts_each_image_once(shards, projected):
    one = run_ranks(on_ranks, 1, shards, False)[0]
    for ranks in (2, 4):  # nine images: ranks have different numbers of them
        (shards.parent / validation.KEPT).unlink(missing_ok=True)
        results = run_ranks(on_ranks, ranks, shards, False)
        assert all(result == results[0] for result in results)
        assert results[0] == pytest.approx(one, rel=1e-5)
    (shards.parent / validation.KEPT).unlink()
    wrong = run_ranks(on_ranks, 2, shards, True)[0]
    for name in ("val_loss", "psnr", "rfid"):
        assert wrong[name] != pytest.approx(one[name], rel=1e-3), "sabotage twin"


@pytest.mark.long
def test_rfid_is_that_of_eval_reconstruct(tmp_path, inception_cache):
    """On real Inception features; rel 1e-4, for a few pixels that round the other way. One image less is seen."""
    import json

    import eval.reconstruct as reconstruct
    from tests.tokenizer_run import TINY, save_tokenizer

    images = write_images(tmp_path / "images", 12, 16)
    task = make_task(images, model=TINY, validation={"rfid": True, "inception": {"cache": str(inception_cache)}})
    found = task.validate()
    assert task.validate() == found, "the second time with the statistics of the first"
    run = save_tokenizer(tmp_path / "run", task.model, TINY, image_size=16)
    config = tmp_path / "reconstruct.yaml"
    config.write_text("kind: reconstruct\n")
    for limit in (12, 11):
        out = tmp_path / f"out-{limit}"
        paths = [f"tokenizer={run}", f"images={images}", f"out={out}", f"inception.cache={inception_cache}"]
        reconstruct.main([str(config), *paths, "rfid=true", "batch=5", f"limit={limit}"])
        record = json.loads((out / "record.json").read_text())
        assert (record["rfid"] == pytest.approx(found["rfid"], rel=1e-4)) == (limit == 12)
        assert (record["ssim_llamagen"] == pytest.approx(found["ssim_llamagen"], rel=1e-4)) == (limit == 12)


def test_pictures_of_nan_have_no_rfid(shards, projected):
    task = make_task(shards, validation={"rfid": True})
    with torch.no_grad():
        task.model.post_quant_conv.bias.fill_(math.nan)
    measured = task.validate()
    assert all(math.isnan(measured[key]) for key in ("psnr", "ssim", "ssim_llamagen", "rfid"))


# --- what is kept ---


def test_the_originals_are_looked_at_once_in_a_run(tmp_path, projected):
    images = write_images(tmp_path / "shards", COUNT, 16)
    kept = tmp_path / validation.KEPT

    def looked_at(first: TokenizerTask) -> tuple[int, float]:
        before = Projected.images
        scores = first.validate()
        return Projected.images - before, round(scores["rfid"], 6)

    task = make_task(images, validation={"rfid": True})
    (both, rfid), (once, again) = looked_at(task), looked_at(task)
    assert (both, once) == (2 * COUNT, COUNT)
    assert rfid == again
    resumed = make_task(images, validation={"rfid": True})
    assert looked_at(resumed) == (COUNT, rfid), "a resume reads them"
    assert looked_at(make_task(images, validation={"rfid": True, "images": 7}))[0] == 14, "of other images: made again"
    looked_at(make_task(images, validation={"rfid": True}))
    data = bytearray(kept.read_bytes())
    data[-5] ^= 1
    kept.write_bytes(bytes(data))
    assert looked_at(make_task(images, validation={"rfid": True})) == (2 * COUNT, rfid), "damaged: made again"
    kept.write_bytes(bytes(data[:100]))
    assert looked_at(make_task(images, validation={"rfid": True})) == (2 * COUNT, rfid)


# --- what may not be touched ---


def losses(folder: Path, every: int, **parts: Any) -> list[dict[str, Tensor]]:
    task, lines = make_task(folder, model={"quantizer": "ema"}, codebook={"statistics": True}, **parts), []
    for step in range(5):
        images = torch.rand(4, 3, 16, 16, generator=torch.Generator().manual_seed(step)) * 2 - 1
        lines.append(dict(task.step(ImageBatch(images, torch.arange(4)), 4 * step)))
        if every and step % every == 0:
            task.validate()
    return lines


def test_validation_changes_no_step(shards, projected, monkeypatch):
    def same(a: list[dict[str, Tensor]], b: list[dict[str, Tensor]]) -> bool:
        return all(
            torch.equal(value, other[name]) for one, other in zip(a, b, strict=True) for name, value in one.items()
        )

    without = losses(shards, 0)
    assert same(without, losses(shards, 1, validation={"rfid": True}))
    monkeypatch.setattr(VQModel, "eval", lambda self: self)  # sabotage twin: the codebook learns from held-out images
    assert not same(without, losses(shards, 1, validation={"rfid": True}))


# --- LPIPS that the loss does not have ---


@pytest.mark.long
def test_lpips_is_measured_beside_any_loss_once(tmp_path):
    images = write_images(tmp_path / "shards", 3, 16)
    file = write_vgg16(tmp_path / "vgg16.pth")
    asked = {"lpips": {"weights": str(file)}}
    task = make_task(images, validation=asked)
    found = task.validate()
    made, originals = shown(task)
    expected = task.validation.perceptual[0].distances(made, originals)
    assert found["lpips-custom"] == pytest.approx(float(expected.mean()), rel=1e-3)
    assert task.loss.perceptual is None
    in_loss = make_task(images, validation=asked, loss={"perceptual": "lpips", "vgg16_weights": str(file)})
    assert in_loss.validation.perceptual == [in_loss.loss.perceptual]


# --- what is refused, when the run starts ---


def test_what_cannot_be_measured_is_refused_at_the_start(shards, tmp_path, projected):
    one = write_images(tmp_path / "one", 1, 16)
    with pytest.raises(UserError, match=r"^validation.rfid: a covariance needs at least two .* there is 1; raise"):
        make_task(one, validation={"rfid": True})
    with pytest.raises(UserError, match=r"^validation.lpips: needs pictures of at least 16 x 16 pixels; leave it out$"):
        make_task(shards, validation={"lpips": {"weights": "absent.pth"}})  # 13 pixels are not padding
    with pytest.raises(UserError, match=r"^validation.lpips.weights: absent.pth cannot be read .*leave validation"):
        make_task(one, validation={"lpips": {"weights": "absent.pth"}})
    with pytest.raises(UserError, match=r"validation.lpips.trunk: vgg16 needs weights: PATH"):
        make_task(one, validation={"lpips": {}})
    with pytest.raises(UserError, match=r"validation.rfd.*did you mean .*rfid"):
        make_task(shards, validation={"rfd": True})


def test_missing_inception_weights_are_named(shards, tmp_path):
    absent = {"rfid": True, "inception": {"package": "absent", "cache": str(tmp_path)}}
    with pytest.raises(UserError, match=r"^validation.rfid: .*no package 'absent'.*set validation\.inception\.weights"):
        make_task(shards, validation=absent)
    absent["inception"] = {"weights": str(tmp_path / "absent.pt")}
    with pytest.raises(UserError, match=r"absent\.pt"):
        make_task(shards, validation=absent)
