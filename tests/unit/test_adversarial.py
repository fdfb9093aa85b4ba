"""Adversarial losses, adaptive weight, R1 and LeCAM against formulas written again; StyleGAN2's network likewise."""

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llamagen_dist.config import TokenizerLossSection
from llamagen_dist.config.discriminator import DiscriminatorSection
from llamagen_dist.errors import UserError
from llamagen_dist.models.vq import VQLosses
from tokenizer_training import adversarial
from tokenizer_training.batch_norm import SynchronisedBatchNorm2d
from tokenizer_training.discriminators import PatchGAN, build_discriminator, check_groups
from tokenizer_training.losses import TokenizerLoss
from tokenizer_training.stylegan import StyleGANDiscriminator, with_deviation

KINDS = ("hinge", "vanilla", "non_saturating")
REAL, FAKE = np.array([-3.0, -0.4, 0.3, 2.5]), np.array([-2.2, -0.7, 0.6, 1.8])


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


def by_hand(kind: str) -> tuple[float, float]:
    """(discriminator's, generator's) loss of REAL and FAKE as probabilities, fp64."""
    if kind == "hinge":
        margins = [max(0.0, 1 - r) for r in REAL], [max(0.0, 1 + f) for f in FAKE]
        return (np.mean(margins[0]) + np.mean(margins[1])) / 2, -FAKE.mean()
    entropy = -(np.log(sigmoid(REAL)).mean() + np.log(1 - sigmoid(FAKE)).mean()) / 2
    return entropy, {"vanilla": np.log(1 - sigmoid(FAKE)), "non_saturating": -np.log(sigmoid(FAKE))}[kind].mean()


@pytest.mark.parametrize("kind", KINDS)
def test_losses_and_their_gradients(kind):
    real, fake = (torch.tensor(x, requires_grad=True) for x in (REAL, FAKE))
    losses = [adversarial.discriminator_loss(kind, real, fake), adversarial.generator_loss(kind, fake)]
    assert [float(x.detach()) for x in losses] == pytest.approx(by_hand(kind), rel=1e-6)
    step = 1e-2
    for number, (loss, inputs) in enumerate(zip(losses, ([real, fake], [fake]), strict=True)):
        for logits, gradient in zip(inputs, torch.autograd.grad(loss, inputs), strict=True):
            for i in range(len(REAL)):
                values = []
                for sign in (1, -1):
                    moved = logits.detach().clone()
                    moved[i] += sign * step
                    arguments = [moved if x is logits else x.detach() for x in ([real, fake], [fake])[number]]
                    f = (adversarial.discriminator_loss, adversarial.generator_loss)[number]
                    values.append(float(f(kind, *arguments)))
                assert (values[0] - values[1]) / (2 * step) == pytest.approx(float(gradient[i]), abs=2e-5)


def test_what_a_lost_generator_can_learn_from():
    """The gradient by a logit of -8: almost none in the minimax game, all there is in the non-saturating one. With
    LlamaGen's arguments, swapped, the discriminator's own gradient by a fake would be nil."""
    fake = torch.tensor([-8.0], requires_grad=True)
    slopes = [float(torch.autograd.grad(adversarial.generator_loss(kind, fake), fake)[0]) for kind in KINDS]
    assert slopes == pytest.approx([-1.0, -sigmoid(np.array(-8.0)), -sigmoid(np.array(8.0))], rel=1e-4)
    fooled = torch.tensor([2.0], requires_grad=True)
    loss = adversarial.discriminator_loss("non_saturating", torch.zeros(1), fooled)
    assert float(torch.autograd.grad(loss, fooled)[0]) == pytest.approx(0.5 * float(sigmoid(np.array(2.0))))
    swapped = F.binary_cross_entropy_with_logits(torch.zeros(1), fooled)
    assert float(torch.autograd.grad(swapped, fooled)[0]) == 0.0, "sabotage twin"


def test_the_weight_grows_over_its_ramp():
    assert [adversarial.ramp(seen, 100, 50) for seen in (0, 100, 110, 149, 150, 900)] == [0, 0, 0.2, 0.98, 1, 1]
    assert adversarial.ramp(0, 100, 0) == 1.0
    loss = TokenizerLoss(section(weight=0.5, start_images=100, ramp_images=50), torch.device("cpu"))
    images = torch.zeros(1, 3, 2, 2)
    codes = VQLosses(torch.tensor(0.0), torch.tensor(0.0), None)
    totals = [float(loss.generator(images, images, codes, torch.full((1,), -4.0), seen).total) for seen in (110, 200)]
    assert totals == pytest.approx([0.2 * 0.5 * 4.0, 0.5 * 4.0])


def section(**keys: Any) -> TokenizerLossSection:
    return TokenizerLossSection.model_validate({"perceptual": "none", "discriminator": keys})


def balanced(scale: float = 1.0) -> tuple[list[Tensor], list[Tensor], Tensor, Tensor]:
    """(gradients by two layers as computed, as by ordinary backward passes; the ratio, as computed and by hand)."""
    torch.manual_seed(0)
    first, last, judge = nn.Conv2d(2, 4, 3, padding=1), nn.Conv2d(4, 3, 3, padding=1), nn.Conv2d(3, 1, 4)
    x, target = torch.randn(2, 2, 8, 8), torch.randn(2, 3, 8, 8)
    loss = TokenizerLoss(section(weight=0.3, adaptive_weight=True), torch.device("cpu"), last.weight)
    loss.section = loss.section.model_copy(update={"reconstruction_weight": scale})
    weights = [first.weight, last.weight]

    def forward() -> tuple[Tensor, Tensor, Tensor]:
        hidden = first(x)
        images = last(F.silu(hidden))
        return images, judge(images), hidden.square().mean()

    images, logits, commit = forward()
    terms = loss.generator(target, images, VQLosses(torch.tensor(0.0), commit, None), logits)
    computed = list(torch.autograd.grad(terms.total, weights))
    images, logits, commit = forward()
    looks, play = scale * F.mse_loss(images, target), -logits.mean()
    apart = [torch.autograd.grad(part, last.weight, retain_graph=True)[0].norm() for part in (looks, play)]
    ratio = (apart[0] / (apart[1] + 1e-4)).clamp(0, 1e4)
    total = looks + 0.25 * commit + 0.3 * ratio * play
    assert float(terms.total.detach()) == pytest.approx(float(total.detach()), rel=1e-5)
    assert float(terms.adversarial.detach()) == pytest.approx(float(play.detach()), rel=1e-5)
    return computed, list(torch.autograd.grad(total, weights)), terms.adaptive_weight, ratio


def test_the_adaptive_weight_balances_gradients_at_the_last_layer():
    computed, expected, ratio, by_hand_ratio = balanced()
    assert float(ratio) == pytest.approx(float(by_hand_ratio), rel=1e-5)
    assert not ratio.requires_grad
    for one, other in zip(computed, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)
    assert float(balanced(scale=1e6)[2]) == 1e4, "clamped"
    assert 0.1 < float(ratio) < 1e3, "and here it is not"


def test_r1_is_the_squared_gradient_of_an_images_mean_logit():
    torch.manual_seed(0)
    slope, images = torch.randn(3, 4, 4), torch.randn(5, 3, 4, 4, requires_grad=True)
    real = 0.5 * (slope * images.square()).sum((1, 2, 3))[:, None, None, None].expand(-1, 1, 6, 6)
    expected = (slope * images).detach().square().sum((1, 2, 3)).mean()  # however many patches
    assert float(adversarial.r1_penalty(real, images)) == pytest.approx(float(expected), rel=1e-5)
    network, images = PatchGAN(channels=4, layers=2, norm="batch"), torch.randn(4, 3, 16, 16, requires_grad=True)
    weight = network.main[5].weight  # behind batch norms, whose second derivative it needs

    def penalty() -> Tensor:
        return adversarial.r1_penalty(network(images)[0], images)

    with torch.no_grad():
        weight.normal_()
    (gradient,) = torch.autograd.grad(penalty(), weight)
    direction, step, values = gradient / gradient.norm(), 1e-2, []
    for moved in (step, -2 * step):
        with torch.no_grad():
            weight += moved * direction
        values.append(float(penalty().detach()))
    assert (values[0] - values[1]) / (2 * step) == pytest.approx(float(gradient.norm()), rel=1e-2)


def test_r1_and_lecam_join_the_discriminators_loss_with_their_weights():
    keys = {"r1_weight": 3.0, "r1_every": 4, "lecam_weight": 0.2, "weight": 0.5}
    loss = TokenizerLoss(section(**keys), torch.device("cpu"))
    images = torch.tensor([[[[2.0]]], [[[-1.0]]]], requires_grad=True)
    real, fake, means = 1.5 * images, torch.tensor([[[[0.5]]], [[[-3.0]]]]), torch.tensor([1.0, -1.0])
    total, terms = loss.discriminator(real, fake, images, means)
    hinge = 0.5 * (np.mean([0.0, 2.5]) + np.mean([1.5, 0.0]))
    lecam = np.mean([4.0**2, 0.0]) + np.mean([0.5**2, 4.0**2])
    assert {name: float(value) for name, value in terms.items()} == pytest.approx(
        {"discriminator": hinge, "r1": 1.5**2, "lecam": lecam}
    )
    assert float(total) == pytest.approx(hinge + 0.5 * 3.0 * 4 * 2.25 + 0.2 * lecam)
    total, terms = loss.discriminator(real, fake, None, means)  # the steps between
    assert float(total) == pytest.approx(hinge + 0.2 * lecam)
    assert terms.keys() == {"discriminator", "lecam"}


def blurred(x: Tensor, pad: int) -> Tensor:
    """[1, 3, 3, 1] is a box of two pixels, three times over."""
    x = F.pad(x, (pad,) * 4)
    for _ in range(3):
        x = (x[..., :-1] + x[..., 1:]) / 2
        x = (x[..., :-1, :] + x[..., 1:, :]) / 2
    return x


def stylegan_again(state: dict[str, Tensor], images: Tensor, group: int) -> Tensor:
    """The network of arXiv 1912.04958 written a second time, in fp64, with dense sums in place of convolutions."""
    state = {name: value.double() for name, value in state.items()}

    def layer(name: str, x: Tensor, stride: int = 1, pad: int = 0) -> Tensor:
        weight = state[f"{name}.weight"]
        size = weight.shape[2]
        patches = F.pad(x, (pad,) * 4).unfold(2, size, stride).unfold(3, size, stride)
        y = torch.einsum("bchwij,ocij->bohw", patches, weight) / math.sqrt(weight[0].numel())
        return y + state[f"{name}.bias"][:, None, None] if f"{name}.bias" in state else y

    def active(x: Tensor) -> Tensor:
        return torch.where(x > 0, x, 0.2 * x) * 2**0.5

    x = active(layer("start", images.double()))
    for number in range(len({name.split(".")[1] for name in state if name.startswith("blocks")})):
        key = f"blocks.{number}"
        main = active(layer(f"{key}.first", x, pad=1))
        main = active(layer(f"{key}.second", blurred(main, 2), stride=2))
        x = (main + layer(f"{key}.skip", blurred(x, 1)[:, :, ::2, ::2])) / 2**0.5
    if group:
        spreads = [np.sqrt(part.numpy().var(0) + 1e-8).mean() for part in x.split(group)]
        extra = torch.tensor(spreads).repeat_interleave(group)[:, None, None, None]
        x = torch.cat([x, extra.expand(-1, 1, *x.shape[2:])], 1)
    x = active(layer("mixed", x, pad=1)).flatten(1)
    for name in ("hidden", "logit"):
        x = x @ state[f"{name}.weight"].T / math.sqrt(x.shape[1]) + state[f"{name}.bias"]
        x = active(x) if name == "hidden" else x
    return x


@pytest.mark.parametrize(("size", "group"), [(32, 2), (24, 0)])
def test_stylegans_discriminator_is_the_papers(size, group):
    torch.manual_seed(0)
    network = StyleGANDiscriminator(3, size, channels=1, deviation_group=group)
    with torch.no_grad():
        for name, value in network.named_parameters():
            if name.endswith("bias"):
                value.normal_()
    images = torch.randn(4, 3, size, size)
    (logits,) = network(images)
    assert logits.shape == (4, 1, 1, 1)
    expected = stylegan_again(dict(network.state_dict()), images, group)
    torch.testing.assert_close(logits.flatten().double(), expected.detach().flatten(), rtol=1e-4, atol=1e-5)
    assert not any("blur" in name for name in network.state_dict()), "a constant is not saved"


def test_stylegans_sizes():
    """At 256 pixels the widths of LlamaGen's: 64, 128, 256, then 512, down to 4 x 4; and its layers keep the scale."""
    network = StyleGANDiscriminator(3, 256)
    assert [block.second.weight.shape[0] for block in network.blocks] == [128, 256, 512, 512, 512, 512]
    widths = [64, 128, 256, 512, 512, 512, 512]
    blocks = sum(9 * a * a + a + 9 * a * b + b + a * b for a, b in itertools.pairwise(widths))
    ends = 3 * 64 + 64 + 9 * 513 * 512 + 512 + 16 * 512 * 512 + 512 + 512 + 1
    assert sum(p.numel() for p in network.parameters()) == blocks + ends
    small = StyleGANDiscriminator(3, 32, channels=8)
    (logits,) = small(torch.randn(32, 3, 32, 32))
    assert 0.3 < float(logits.detach().square().mean().sqrt()) < 3
    weight = small.blocks[0].first.weight
    assert float(weight.std()) == pytest.approx(1.0, rel=0.05), "equalised: the scale is applied when it is used"


def test_the_deviation_of_a_group_does_not_depend_on_how_groups_are_dealt_out():
    torch.manual_seed(0)
    x = torch.randn(8, 3, 2, 2)
    whole = with_deviation(x, 2)
    assert torch.equal(whole, torch.cat([with_deviation(part, 2) for part in x.split(4)]))
    assert not torch.allclose(with_deviation(x, 8), torch.cat([with_deviation(part, 4) for part in x.split(4)]))
    assert torch.equal(whole[:, :3], x)
    spread = np.sqrt(x[2:4].numpy().var(0) + 1e-8).mean()
    assert whole[2:4, 3].flatten().tolist() == pytest.approx([spread] * 8, rel=1e-5)


def test_groups_that_do_not_fit_are_refused():
    stylegan = DiscriminatorSection(kind="stylegan")
    check_groups(stylegan, 8, 4)
    check_groups(DiscriminatorSection(kind="stylegan", minibatch_stddev=0), 7, 3)
    check_groups(DiscriminatorSection(), 7, 3)
    with pytest.raises(UserError, match=r"minibatch_stddev: 4 does not divide the 6 images of a rank; change"):
        check_groups(stylegan, 6, 6)
    with pytest.raises(UserError, match=r"4 does not divide the 2 images of a rank's micro-batch"):
        check_groups(stylegan, 8, 2)


def test_sizes_that_do_not_fit_are_refused():
    stylegan = DiscriminatorSection(kind="stylegan")
    assert [size for size in (4, 8, 36, 64, 96, 100, 256, 384, 448) if not list(stylegan.misfits(size))] == [
        8, 64, 96, 256, 384, 448]  # fmt: skip
    assert "data.image_size 36 cannot be" in next(stylegan.misfits(36))
    assert not list(DiscriminatorSection(kind="stylegan", weight=0).misfits(36))


def test_batch_norm_of_one_rank_is_torchs_to_the_last_bit():
    torch.manual_seed(0)
    ours, theirs = SynchronisedBatchNorm2d(5), nn.BatchNorm2d(5)
    for _ in range(2):
        x = torch.randn(4, 5, 3, 3)
        assert torch.equal(ours(x), theirs(x))
    assert all(torch.equal(a, b) for a, b in zip(ours.buffers(), theirs.buffers(), strict=True))
    assert ours.state_dict().keys() == theirs.state_dict().keys()


def test_only_lecam_has_a_buffer_and_the_log_says_what_is_on():
    keys = {"lecam_weight": 0.1, "channels": 4}
    assert "lecam_means" in build_discriminator(DiscriminatorSection(**keys), 3, 64, None).state_dict()
    assert "lecam_means" not in build_discriminator(DiscriminatorSection(channels=4), 3, 64, None).state_dict()
    line = TokenizerLoss(
        section(kind="stylegan", loss="vanilla", generator_loss="hinge", adaptive_weight=True, ramp_images=500,
                start_images=100, r1_weight=1.0, lecam_weight=0.1), torch.device("cpu")).describe()  # fmt: skip
    assert (
        "0.5 x adaptive weight x StyleGAN2 discriminator vanilla against hinge from image 100, growing over 500" in line
    )
    assert "1 x R1 every 16 steps" in line
    assert "0.1 x LeCAM" in line
