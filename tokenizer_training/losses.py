"""The tokenizer's objective (paper section 2.2): reconstruction, perceptual, adversarial, codebook."""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from llamagen_dist.config import TokenizerLossSection
from llamagen_dist.evaluation.perceptual import LPIPS
from llamagen_dist.models.vq import VQLosses
from tokenizer_training import adversarial as play


def reconstruction_loss(kind: str, reconstruction: Tensor, images: Tensor) -> Tensor:
    """``l2``: mean squared error; ``l1``: mean absolute error; over pixels in [-1, 1], fp32."""
    return (F.mse_loss if kind == "l2" else F.l1_loss)(reconstruction.float(), images.float())


class GeneratorLosses(NamedTuple):
    """0-d tensors: total, the weighted sum that is minimised, and its unweighted terms (None: off)."""

    total: Tensor
    reconstruction: Tensor
    vq: Tensor | None
    commit: Tensor | None
    entropy: Tensor | None
    perceptual: Tensor | None
    adversarial: Tensor | None
    adaptive_weight: Tensor | None = None


class TokenizerLoss:
    """The weighted sum that ``section`` describes; holds the perceptual network, if there is one.

    section: terms and weights.
    device: of the perceptual network.
    last_layer: the decoder's last weight, which an adaptive weight needs.
    mean: over all ranks (collective).
    rounded: whether the perceptual network computes in bfloat16; the losses are fp32 in any case.
    """

    def __init__(
        self,
        section: TokenizerLossSection,
        device: torch.device,
        last_layer: Tensor | None = None,
        mean: Callable[[Tensor], Tensor] = lambda values: values,
        rounded: bool = False,
    ) -> None:
        self.section, self.last_layer, self.mean, self.rounded = section, last_layer, mean, rounded
        self.perceptual: LPIPS | None = None
        without = "set loss.perceptual=none"
        if section.perceptual == "lpips":
            self.perceptual = LPIPS("vgg16", section.vgg16_weights, "loss.vgg16_weights", without).to(device)
        elif section.perceptual == "lpips-hed":
            self.perceptual = LPIPS("hed", section.hed_weights, "loss.hed_weights", without).to(device)

    def adversarial_from(self) -> int | None:
        """The image count at which the discriminator begins to learn; None if it never does."""
        d = self.section.discriminator
        return d.start_images if d.takes_part else None

    def generator(
        self,
        images: Tensor,
        reconstruction: Tensor,
        codebook: VQLosses,
        fake_logits: Tensor | None,
        images_seen: int | None = None,
    ) -> GeneratorLosses:
        """fake_logits: the discriminator's view of ``reconstruction``; None before it takes part.

        images_seen: position in the run, for a weight that grows; None: it has grown. Collective with an adaptive
        weight.
        """
        s, d = self.section, self.section.discriminator
        reconstructed = reconstruction_loss(s.reconstruction, reconstruction, images)
        looks = s.reconstruction_weight * reconstructed
        weights = (s.codebook_weight, s.commitment_weight, s.entropy_weight)
        codes = [weight * term for weight, term in zip(weights, codebook, strict=True) if term is not None]
        total = sum(codes, looks)
        perceptual = adversarial = ratio = None
        if self.perceptual is not None:
            with torch.autocast(images.device.type, torch.bfloat16, enabled=self.rounded):
                perceptual = self.perceptual(reconstruction, images)
            looks = looks + s.perceptual_weight * perceptual
            total = total + s.perceptual_weight * perceptual
        if fake_logits is not None:
            adversarial = play.generator_loss(d.generator_loss or d.loss, fake_logits)
            grown = 1.0 if images_seen is None else play.ramp(images_seen, d.joins_at, d.ramp_images)
            weight = d.weight * grown
            if d.adaptive_weight:
                assert self.last_layer is not None
                balanced, ratio = play.balance(looks, adversarial, weight, reconstruction, self.last_layer, self.mean)
                total = sum(codes, balanced)
            else:
                total = total + weight * adversarial
        return GeneratorLosses(
            total, reconstructed, codebook.vq, codebook.commit, codebook.entropy, perceptual, adversarial, ratio
        )

    def discriminator(
        self, real: Tensor, fake: Tensor, images: Tensor | None, means: Tensor | None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """What the discriminator minimises, and its unweighted terms.

        real, fake: logits of the images and of their reconstructions.
        images: the real ones, requiring a gradient, in a step with the R1 penalty; None in others.
        means: of LeCAM, if it is on.
        """
        d = self.section.discriminator
        total = play.discriminator_loss(d.loss, real, fake)
        terms = {"discriminator": total}
        if images is not None:
            terms["r1"] = play.r1_penalty(real, images)
            total = total + 0.5 * d.r1_weight * d.r1_every * terms["r1"]
        if means is not None:
            terms["lecam"] = play.lecam_penalty(real, fake, means)
            total = total + d.lecam_weight * terms["lecam"]
        return total, terms

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
            name = "PatchGAN" if d.kind == "patchgan" else "StyleGAN2 discriminator"
            game = d.loss if d.generator_loss in (None, d.loss) else f"{d.loss} against {d.generator_loss}"
            adapted = " x adaptive weight" if d.adaptive_weight else ""
            alone = f", alone for {d.warmup_images:,} images" if d.warmup_images else ""
            grows = f", growing over {d.ramp_images:,} images" if d.ramp_images else ""
            parts.append(f"{d.weight:g}{adapted} x {name} {game} from image {d.start_images:,}{alone}{grows}")
            parts += [f"{d.r1_weight:g} x R1 every {d.r1_every} steps"] if d.r1_weight > 0 else []
            parts += [f"{d.lecam_weight:g} x LeCAM"] if d.lecam_weight > 0 else []
        return "loss: " + ", ".join(parts)
