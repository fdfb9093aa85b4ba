"""The tokenizer's objective (paper section 2.2): reconstruction, perceptual, adversarial, codebook."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from llamagen_dist.config import TokenizerLossSection
from llamagen_dist.evaluation.perceptual import LPIPS
from llamagen_dist.models.vq import VQLosses


def reconstruction_loss(kind: str, reconstruction: Tensor, images: Tensor) -> Tensor:
    """``l2``: mean squared error; ``l1``: mean absolute error; over pixels in [-1, 1], fp32."""
    return (F.mse_loss if kind == "l2" else F.l1_loss)(reconstruction.float(), images.float())


def hinge_discriminator_loss(real: Tensor, fake: Tensor) -> Tensor:
    """0.5 (mean max(0, 1 - real) + mean max(0, 1 + fake)) of the logits; 0 once both are right by 1."""
    return 0.5 * (F.relu(1.0 - real.float()).mean() + F.relu(1.0 + fake.float()).mean())


def hinge_generator_loss(fake: Tensor) -> Tensor:
    """-mean of the logits of the reconstructions."""
    return -fake.float().mean()


class GeneratorLosses(NamedTuple):
    """0-d tensors: total, the weighted sum that is minimised, and its unweighted terms (None: off)."""

    total: Tensor
    reconstruction: Tensor
    vq: Tensor | None
    commit: Tensor | None
    entropy: Tensor | None
    perceptual: Tensor | None
    adversarial: Tensor | None


class TokenizerLoss:
    """The weighted sum that ``section`` describes; holds the perceptual network, if there is one."""

    def __init__(self, section: TokenizerLossSection, device: torch.device) -> None:
        self.section = section
        self.perceptual: LPIPS | None = None
        without = "set loss.perceptual=none"
        if section.perceptual == "lpips":
            self.perceptual = LPIPS("vgg16", section.vgg16_weights, "loss.vgg16_weights", without).to(device)
        elif section.perceptual == "lpips-hed":
            self.perceptual = LPIPS("hed", section.hed_weights, "loss.hed_weights", without).to(device)

    def adversarial_from(self) -> int | None:
        """The image count at which the discriminator enters; None if it never does."""
        d = self.section.discriminator
        return None if d.kind == "none" or d.weight == 0 else d.start_images

    def generator(
        self, images: Tensor, reconstruction: Tensor, codebook: VQLosses, fake_logits: Tensor | None
    ) -> GeneratorLosses:
        """fake_logits: the discriminator's view of ``reconstruction``; None before it takes part."""
        s = self.section
        reconstructed = reconstruction_loss(s.reconstruction, reconstruction, images)
        total = s.reconstruction_weight * reconstructed
        for weight, term in zip((s.codebook_weight, s.commitment_weight, s.entropy_weight), codebook, strict=True):
            if term is not None:
                total = total + weight * term
        perceptual = adversarial = None
        if self.perceptual is not None:
            perceptual = self.perceptual(reconstruction, images)
            total = total + s.perceptual_weight * perceptual
        if fake_logits is not None:
            adversarial = hinge_generator_loss(fake_logits)
            total = total + s.discriminator.weight * adversarial
        return GeneratorLosses(
            total, reconstructed, codebook.vq, codebook.commit, codebook.entropy, perceptual, adversarial
        )

    def describe(self) -> str:
        """One line that names every term, its weight, and what is switched off."""
        s, d = self.section, self.section.discriminator
        parts = [f"{s.reconstruction_weight:g} x {s.reconstruction.upper()} reconstruction"]
        if self.perceptual is not None:
            parts.append(f"{s.perceptual_weight:g} x {self.perceptual.name.upper()} ({self.perceptual.trunk.source})")
        else:
            parts.append("perceptual loss off (loss.perceptual: none)")
        parts += [f"{s.codebook_weight:g} x codebook", f"{s.commitment_weight:g} x commitment"]
        parts.append(
            f"{s.entropy_weight:g} x entropy" if s.entropy_weight > 0 else "entropy off (loss.entropy_weight: 0)"
        )
        if self.adversarial_from() is None:
            off = "kind: none" if d.kind == "none" else "weight: 0"
            parts.append(f"adversarial loss off (loss.discriminator.{off})")
        else:
            parts.append(f"{d.weight:g} x PatchGAN hinge from image {d.start_images:,}")
        return "loss: " + ", ".join(parts)
