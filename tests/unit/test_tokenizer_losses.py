"""Loss values by hand, a discriminator that waits for its turn, and a perceptual loss that refuses bad files."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from llamagen_dist.build import build_vq
from llamagen_dist.config import TokenizerConfigFile, TokenizerLossSection
from llamagen_dist.config.section import build
from llamagen_dist.data.batch import ImageBatch
from llamagen_dist.data.images import load_images, to_floats
from llamagen_dist.data.shards import open_shards
from llamagen_dist.errors import UserError
from llamagen_dist.models.vq import VQLosses, to_uint8
from llamagen_dist.parallel.topology import Topology
from llamagen_dist.training.guards import NonFiniteError
from tests.image_shards import write_images
from tests.random_vgg16 import write_vgg16
from tokenizer_training.adversarial import discriminator_loss, generator_loss
from tokenizer_training.discriminators import PatchGAN
from tokenizer_training.losses import (
    TokenizerLoss,
    reconstruction_loss,
)
from tokenizer_training.task import TokenizerTask
from tokenizer_training.train import enlarged

CPU = torch.device("cpu")


def section(**keys: Any) -> TokenizerLossSection:
    return TokenizerLossSection.model_validate({"perceptual": "none", **keys})


def test_reconstruction_by_hand():
    images, found = torch.tensor([0.0, 1.0, -1.0]), torch.tensor([0.5, 1.0, 0.0])
    assert reconstruction_loss("l2", found, images).item() == pytest.approx((0.25 + 1.0) / 3)
    assert reconstruction_loss("l1", found, images).item() == pytest.approx(0.5)


def test_hinge_by_hand():
    real, fake = torch.tensor([2.0, 0.5]), torch.tensor([-3.0, 0.0])
    assert discriminator_loss("hinge", real, fake).item() == pytest.approx(0.5 * (0.25 + 0.5))
    assert discriminator_loss("hinge", fake, real).item() > 1.0  # real and fake are not interchangeable
    assert discriminator_loss("hinge", torch.tensor([1.0]), torch.tensor([-1.0])).item() == 0.0
    assert generator_loss("hinge", fake).item() == pytest.approx(1.5)


def test_the_total_is_the_weighted_sum_of_its_terms():
    loss = TokenizerLoss(
        section(reconstruction_weight=3.0, codebook_weight=2.0, commitment_weight=0.25, entropy_weight=0.1,
                discriminator={"weight": 0.5}), CPU)  # fmt: skip
    images, found = torch.zeros(1, 3, 4, 4), torch.full((1, 3, 4, 4), 0.2)
    codebook = VQLosses(torch.tensor(0.3), torch.tensor(0.4), torch.tensor(-2.0))
    terms = loss.generator(images, found, codebook, torch.tensor([[1.0, 3.0]]))
    assert terms.reconstruction.item() == pytest.approx(0.04)
    assert terms.adversarial.item() == pytest.approx(-2.0)
    assert terms.total.item() == pytest.approx(3 * 0.04 + 2 * 0.3 + 0.25 * 0.4 - 0.1 * 2.0 - 0.5 * 2.0)
    without = loss.generator(images, found, VQLosses(codebook.vq, codebook.commit, None), None)
    assert without.total.item() == pytest.approx(3 * 0.04 + 2 * 0.3 + 0.25 * 0.4)
    assert without.adversarial is None
    assert without.perceptual is None


def test_what_is_switched_off_is_said():
    line = TokenizerLoss(section(), CPU).describe()
    assert "perceptual loss off (loss.perceptual: none)" in line
    assert "entropy off" in line
    assert "0.5 x PatchGAN hinge from image 2,560,000" in line
    assert "\n" not in line
    assert (
        "adversarial loss off (loss.discriminator.kind: none)"
        in TokenizerLoss(section(discriminator={"kind": "none"}), CPU).describe()
    )


def test_patchgan_has_the_reference_systems_names_and_sizes():
    network = PatchGAN()
    assert sum(p.numel() for p in network.parameters()) == 2_765_633
    assert sorted({int(name.split(".")[1]) for name in network.state_dict()}) == [0, 2, 3, 5, 6, 8, 9, 11]
    assert "main.3.running_mean" in network.state_dict()
    (logits,) = network(torch.zeros(1, 3, 256, 256))
    assert logits.shape == (1, 1, 30, 30)
    assert network.main[2].weight.std().item() == pytest.approx(0.02, rel=0.02)
    assert network.main[3].weight.mean().item() == pytest.approx(1.0, abs=0.01)
    assert not network.main[3].bias.any()


def test_group_norm_looks_at_one_image_at_a_time_and_batch_norm_does_not():
    torch.manual_seed(0)
    images = torch.randn(4, 3, 32, 32)
    for norm, alone in (("group", True), ("batch", False)):
        network = PatchGAN(channels=8, layers=2, norm=norm)
        (whole,), (part,) = network(images), network(images[:1])
        assert torch.allclose(whole[:1], part, atol=1e-5) == alone


def settings(folder: Path, **changes: Any) -> TokenizerConfigFile:
    loss = {"perceptual": "none",
            "discriminator": {"start_images": 8, "channels": 8, "layers": 2, "norm": "group"}}  # fmt: skip
    return build(TokenizerConfigFile,
        {"kind": "tokenizer", "run_dir": folder / "run",
         "model": {"channels": 8, "channel_multipliers": [1, 2], "res_blocks": 1, "z_channels": 8, "codebook_size": 32,
                   "codebook_dim": 4, **changes.pop("model", {})},
         "data": {"train": folder, "validation": folder, "image_size": 16},
         "train": {"images": 32, "global_batch": 4, **changes.pop("train", {})},
         "optim": {"lr": 1e-3, "weight_decay": 0}, "loss": {**loss, **changes.pop("loss", {})}, **changes},
        "test")  # fmt: skip


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("images")
    write_images(folder, count=10, size=16, padding=(2, 2, 2, 2))
    return folder


def make_task(folder: Path, **changes: Any) -> TokenizerTask:
    torch.manual_seed(0)
    config = settings(folder, **changes)
    return TokenizerTask(build_vq(config.model), config, Topology(), open_shards(folder))


def batch(seed: int = 1) -> Tensor:
    return torch.rand(4, 3, 16, 16, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def numbered(images: Tensor) -> ImageBatch:
    return ImageBatch(images, torch.arange(40, 40 + len(images)))


def snapshot(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


def test_the_discriminator_neither_runs_nor_learns_before_its_start(shards):
    task = make_task(shards)
    calls: list[int] = []
    task.discriminator.plain.register_forward_hook(lambda *_: calls.append(1))
    before = snapshot(task.discriminator.plain)
    for images_seen in (0, 4):
        metrics = task.step(numbered(batch()), images_seen)
        assert not {"adversarial", "discriminator", "discriminator_grad_norm"} & metrics.keys()
    assert calls == []
    assert all(torch.equal(value, before[name]) for name, value in task.discriminator.plain.state_dict().items())
    assert task.scalars() == {"optimizer.step": 2.0, "discriminator_optimizer.step": 0.0}
    metrics = task.step(numbered(batch()), 8)  # its first image
    assert {"adversarial", "discriminator", "discriminator_grad_norm"} <= metrics.keys()
    assert len(calls) == 2
    assert not torch.equal(task.discriminator.plain.main[0].weight, before["main.0.weight"])
    assert task.scalars()["discriminator_optimizer.step"] == 1.0


def test_in_its_warm_up_the_discriminator_learns_alone(shards):
    """Until it joins, the generator's numbers are to the last bit those of a run that never has a discriminator."""

    def judged(**keys: Any) -> TokenizerTask:
        own = {"start_images": 4, "channels": 8, "layers": 2, "norm": "group", **keys}
        return make_task(shards, loss={"discriminator": own})

    warm, at_once, never = judged(warmup_images=8), judged(), judged(kind="none")
    for images_seen in (0, 4, 8):
        lines = [dict(task.step(numbered(batch(images_seen)), images_seen)) for task in (warm, at_once, never)]
        assert ("discriminator" in lines[0]) == (images_seen >= 4)
        assert "adversarial" not in lines[0]
        assert all(torch.equal(value, lines[0][name]) for name, value in lines[2].items())
        if images_seen == 4:
            assert torch.equal(lines[0]["discriminator"], lines[1]["discriminator"]), "it has seen the same pictures"
    assert _distance(warm, never) == 0
    assert _distance(at_once, never) > 0, "sabotage twin: without a warm-up the generator follows at once"
    assert "adversarial" in warm.step(numbered(batch(12)), 12)
    never.step(numbered(batch(12)), 12)
    assert _distance(warm, never) > 0


def test_the_adversarial_weight_grows_once_the_warm_up_is_over():
    game = {"start_images": 100, "warmup_images": 50, "ramp_images": 20, "weight": 0.5}
    loss = TokenizerLoss(section(discriminator=game), CPU)
    codebook, images = VQLosses(None, None, None), torch.zeros(1, 3, 4, 4)
    found = {
        seen: loss.generator(images, images, codebook, torch.full((1, 1), -2.0), seen).total.item()
        for seen in (150, 155, 170, 900)
    }
    assert found == pytest.approx({150: 0.0, 155: 0.25, 170: 1.0, 900: 1.0})
    assert "from image 100, alone for 50 images, growing over 20 images" in loss.describe()


def test_the_generators_pass_leaves_no_gradient_in_the_discriminator(shards):
    task = make_task(shards)
    losses, reconstruction = task._generator_pass(batch(), task.discriminator, 8)
    task.generator.backward(losses.total)
    assert all(p.grad is None and p.requires_grad for p in task.discriminator.plain.parameters())
    task._discriminator_pass(task.discriminator, batch(), reconstruction.detach(), 1.0, 8)
    assert all(p.grad is not None for p in task.discriminator.plain.parameters())


def test_micro_batches_change_nothing(shards):
    whole, pieces, wrong = make_task(shards), make_task(shards, train={"micro_batch": 1}), make_task(shards)
    for images_seen in (0, 4, 8, 12):
        a, b = (
            whole.step(numbered(batch(images_seen)), images_seen),
            pieces.step(numbered(batch(images_seen)), images_seen),
        )
        assert a.keys() == b.keys()
        assert all(float(a[name]) == pytest.approx(float(b[name]), rel=2e-3, abs=2e-4) for name in a)
        wrong.step(numbered(batch(99)), images_seen)
    distance = [_distance(whole, other) for other in (pieces, wrong)]
    assert distance[0] < 0.05 * distance[1]  # rounding, against what other pictures would have done


def _distance(one: TokenizerTask, other: TokenizerTask) -> float:
    pairs = zip(one.model.parameters(), other.model.parameters(), strict=True)
    return sum(float((a - b).detach().square().sum()) for a, b in pairs) ** 0.5


def test_a_loss_that_is_not_finite_stops_before_any_weight_changes(shards):
    task = make_task(shards)
    before = [snapshot(task.model), snapshot(task.discriminator.plain)]
    bad = batch()
    bad[2, 0, 3, 3] = float("nan")
    with pytest.raises(
        NonFiniteError,
        match=r"rank 0: the loss is nan on sample 40, sample 41, sample 42, sample 43.*No weight was changed",
    ):
        task.step(numbered(bad), 8)
    for module, kept in zip((task.model, task.discriminator.plain), before, strict=True):
        assert all(torch.equal(value, kept[name]) for name, value in module.state_dict().items())


def test_a_discriminators_gradient_that_is_not_finite_also_comes_before_the_generators_update(shards):
    """With ``skip_non_finite`` the step is left out, and the next one counts."""
    task = make_task(shards, guard={"skip_non_finite": 1})
    weight = task.discriminator.plain.main[0].weight
    hook = weight.register_hook(lambda gradient: gradient * float("inf"))
    before = [snapshot(task.model), snapshot(task.discriminator.plain), dict(task.scalars())]
    task.step(numbered(batch()), 8)
    assert task.guard.skipped == 1
    for module, kept in zip((task.model, task.discriminator.plain), before, strict=False):
        assert all(torch.equal(value, kept[name]) for name, value in module.state_dict().items())
    assert task.scalars() == before[2]
    hook.remove()
    task.step(numbered(batch()), 8)
    assert not torch.equal(weight, before[1]["main.0.weight"]), "a sound step does change it"
    weight.register_hook(lambda gradient: gradient * float("inf"))
    with pytest.raises(NonFiniteError, match=r"gradient norm is .*inf.*sample 40.*1 such steps were skipped before"):
        task.step(numbered(batch()), 8)


def test_the_first_batch_can_place_the_codes(shards):
    task = make_task(shards, model={"codebook_init": "first_batch"})
    with torch.no_grad():
        rows = task.model.quantize.prepare(task.model.latents(batch())).reshape(-1, 4)
        task._start_codebook(batch())
        found = task.model.quantize.embedding.weight
    assert torch.cdist(found.double(), rows.double()).min(1).values.max() < 1e-6
    assert len(torch.unique(found, dim=0)) == 32
    task.step(numbered(batch()), 4)  # a later step leaves them to the optimizer
    assert torch.cdist(task.model.quantize.embedding.weight.double(), rows.double()).min(1).values.max() > 1e-6
    with pytest.raises(UserError, match=r"only 256 latents .* 500 codes"):
        make_task(shards, model={"codebook_init": "first_batch", "codebook_size": 500}).step(numbered(batch()), 0)


def test_validation_measures_the_unpadded_part_and_counts_codes_exactly(shards):
    task = make_task(shards, validation={"batch": 3})
    found = task.validate()
    whole = make_task(shards, validation={"batch": 256}).validate()
    assert found == pytest.approx(whole, rel=1e-6)
    task.validation.region = None  # what forgetting the padding would give
    assert task.validate()["psnr"] != pytest.approx(found["psnr"], abs=1e-3)
    assert task.validate()["val_loss"] == pytest.approx(found["val_loss"])
    assert 1 / 32 <= found["codebook_usage"] <= 1
    assert (found["codebook_usage"] * 32) == round(found["codebook_usage"] * 32)


def test_pictures_of_nan_have_no_psnr(shards):
    """Rounded to bytes they are black, which is a picture like any other."""
    task = make_task(shards)
    with torch.no_grad():
        task.model.post_quant_conv.bias.fill_(math.nan)
    measured = task.validate()
    assert all(math.isnan(measured[key]) for key in ("val_loss", "psnr", "ssim"))


def test_bad_sizes_are_refused_in_one_sentence(shards):
    with pytest.raises(UserError, match=r"data.image_size: 17 .* multiple of 2"):
        make_task(shards, data={"train": shards, "validation": shards, "image_size": 17})
    with pytest.raises(UserError, match=r"loss.discriminator.layers: 3 layers need at least 24 pixels"):
        make_task(shards, loss={"discriminator": {"layers": 3, "start_images": 8}})


def test_images_too_small_for_a_perceptual_loss_are_refused(shards):
    """VGG16 would end in an error of torch's in the first step."""
    with pytest.raises(UserError, match=r"loss.perceptual: lpips-hed halves images four times .* is 8; choose"):
        make_task(shards, data={"train": shards, "validation": shards, "image_size": 8}, loss={
            "perceptual": "lpips-hed", "discriminator": {"kind": "none"}})  # fmt: skip


def test_images_smaller_than_the_crop_are_said(shards):
    stored = open_shards(shards)
    assert enlarged("data.train", stored, 24).startswith("data.train: images of 16 x 16 pixels are enlarged to")
    assert enlarged("data.train", stored, 16) == ""


@pytest.mark.long
def test_held_out_images_have_the_lpips_that_the_loss_has(tmp_path):
    """The mean over images of the part that is not padding, under the name of its VGG16; none without the loss."""
    write_images(tmp_path / "images", count=5, size=24, padding=(4, 4, 4, 4))
    looks = {"perceptual": "lpips", "vgg16_weights": write_vgg16(tmp_path / "vgg16.pth")}
    data = {"train": tmp_path / "images", "validation": tmp_path / "images", "image_size": 24}
    task = make_task(tmp_path / "images", data=data, loss=looks, validation={"batch": 3})
    found = task.validate()
    pixels = load_images(open_shards(tmp_path / "images"), range(5), 24)
    with torch.no_grad():
        shown = to_uint8(task.model.eval()(to_floats(pixels))[0])
    truth = torch.from_numpy(pixels).permute(0, 3, 1, 2)
    expected = task.loss.perceptual.distances(shown, truth, (4, 4, 20, 20)).mean().item()
    assert found["lpips-custom"] == pytest.approx(expected, rel=1e-4)
    assert found["lpips-custom"] != pytest.approx(task.loss.perceptual.distances(shown, truth).mean().item(), rel=1e-2)
    assert "lpips" not in found
    assert not [key for key in make_task(tmp_path / "images", data=data).validate() if key.startswith("lpips")]
