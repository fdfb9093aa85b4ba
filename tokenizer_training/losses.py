"""The tokenizer's objective (paper section 2.2): reconstruction, perceptual, adversarial, codebook."""

from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llamagen_dist.checkpoint import llamagen
from llamagen_dist.config import TokenizerLossSection
from llamagen_dist.errors import UserError
from llamagen_dist.files import sha256_file
from llamagen_dist.models.vq import VQLosses

VGG16_SHA256_START = "397923af"
"""The first digits of the sha256 of torchvision's VGG16 file are part of its name, vgg16-397923af.pth."""
_VGG16_CONVOLUTIONS = (0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28)


def reconstruction_loss(kind: str, reconstruction: Tensor, images: Tensor) -> Tensor:
    """``l2``: mean squared error; ``l1``: mean absolute error; over pixels in [-1, 1], fp32."""
    return (F.mse_loss if kind == "l2" else F.l1_loss)(reconstruction.float(), images.float())


def hinge_discriminator_loss(real: Tensor, fake: Tensor) -> Tensor:
    """0.5 (mean max(0, 1 - real) + mean max(0, 1 + fake)) of the logits; 0 once both are right by 1."""
    return 0.5 * (F.relu(1.0 - real.float()).mean() + F.relu(1.0 + fake.float()).mean())


def hinge_generator_loss(fake: Tensor) -> Tensor:
    """-mean of the logits of the reconstructions."""
    return -fake.float().mean()


class LPIPS(nn.Module):
    """Learned perceptual distance on VGG16 features (Zhang et al. 2018), frozen and always in eval mode.

    The heads come with the ``lpips`` package, the VGG16 weights from a local file of torchvision's; nothing
    is ever downloaded. Raises UserError for a file that is missing or is something else.
    """

    def __init__(self, vgg16_weights: Path) -> None:
        super().__init__()
        state, self.source = _read_vgg16(vgg16_weights)
        import lpips

        # pnet_rand leaves VGG16 untrained for a moment: otherwise the package would download its weights
        self.network = lpips.LPIPS(net="vgg", pnet_rand=True, verbose=False)
        slices = [getattr(self.network.net, f"slice{number}") for number in range(1, 6)]
        layers = {name: layer for part in slices for name, layer in part.named_children()}
        for number in _VGG16_CONVOLUTIONS:
            weights = {kind: state[f"features.{number}.{kind}"] for kind in ("weight", "bias")}
            try:
                layers[str(number)].load_state_dict(weights)
            except RuntimeError as error:
                reason = str(error).splitlines()[-1].strip()
                raise UserError(_not_vgg16(vgg16_weights, f"features.{number}: {reason}")) from None
        self.requires_grad_(False)
        self.train(False)

    def train(self, mode: bool = True) -> "LPIPS":
        """Stays in eval mode whatever is asked: its heads have dropout, which would make the loss noise."""
        return super().train(False)

    def forward(self, reconstruction: Tensor, images: Tensor) -> Tensor:
        """Both (B, 3, H, W) in [-1, 1] -> mean distance over the batch, 0-d."""
        return self.network(images, reconstruction).mean()


def _not_vgg16(path: Path, reason: str) -> str:
    return (
        f"loss.vgg16_weights: {path} does not hold torchvision's VGG16 weights ({reason}); name a copy of "
        "vgg16-397923af.pth, or set loss.perceptual=none"
    )


def _read_vgg16(path: Path) -> tuple[dict[str, Tensor], str]:
    """The state dict and a word on where it is from."""
    try:
        digest = sha256_file(path)
    except OSError as error:
        raise UserError(
            f"loss.vgg16_weights: {path} cannot be read ({error.strerror}); put torchvision's "
            "vgg16-397923af.pth there (it is not downloaded for you), or set loss.perceptual=none"
        ) from None
    try:
        state = llamagen.read(path)
    except UserError as error:
        raise UserError(_not_vgg16(path, f"not a weights file: {error}")) from None
    needed = [f"features.{n}.{kind}" for n in _VGG16_CONVOLUTIONS for kind in ("weight", "bias")]
    if missing := [name for name in needed if name not in state]:
        raise UserError(_not_vgg16(path, f"{missing[0]} is missing"))
    if digest.startswith(VGG16_SHA256_START):
        return state, "torchvision's VGG16"
    return state, f"NOT torchvision's published VGG16 file, sha256 {digest[:8]}…"


class GeneratorLosses(NamedTuple):
    """0-d tensors: total, the weighted sum that is minimised, and its unweighted terms (None: off)."""

    total: Tensor
    reconstruction: Tensor
    vq: Tensor
    commit: Tensor
    entropy: Tensor | None
    perceptual: Tensor | None
    adversarial: Tensor | None


class TokenizerLoss:
    """The weighted sum that ``section`` describes; holds the perceptual network, if there is one."""

    def __init__(self, section: TokenizerLossSection, device: torch.device) -> None:
        self.section = section
        self.perceptual: LPIPS | None = None
        if section.perceptual == "lpips":
            assert section.vgg16_weights is not None  # the config checks it
            self.perceptual = LPIPS(section.vgg16_weights).to(device)

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
        total = total + s.codebook_weight * codebook.vq + s.commitment_weight * codebook.commit
        if codebook.entropy is not None:
            total = total + s.entropy_weight * codebook.entropy
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
            parts.append(f"{s.perceptual_weight:g} x LPIPS ({self.perceptual.source})")
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
