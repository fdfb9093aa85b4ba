"""What generator and discriminator play against each other, how much it weighs, and what keeps it in bounds.

Logits are real numbers per patch (or image): positive means real.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

LARGEST_RATIO = 1e4


def discriminator_loss(kind: str, real: Tensor, fake: Tensor) -> Tensor:
    """Half the sum of what is wrong about real images and about reconstructions, each a mean over logits; 0-d, fp32.

    ``hinge``: max(0, 1 - real), max(0, 1 + fake): nothing once both are right by 1. ``vanilla`` and
    ``non_saturating``: cross-entropy, softplus(-real), softplus(fake) (arXiv 1406.2661, equation 1).
    """
    real, fake = real.float(), fake.float()
    if kind == "hinge":
        return 0.5 * (F.relu(1.0 - real).mean() + F.relu(1.0 + fake).mean())
    return 0.5 * (F.softplus(-real).mean() + F.softplus(fake).mean())


def generator_loss(kind: str, fake: Tensor) -> Tensor:
    """Mean over the logits of the reconstructions; 0-d, fp32.

    ``hinge``: -fake. ``vanilla``: log(1 - sigmoid(fake)), whose gradient vanishes while the discriminator is sure.
    ``non_saturating``: -log sigmoid(fake), whose gradient is largest there (arXiv 1406.2661, section 3).
    """
    fake = fake.float()
    if kind == "hinge":
        return -fake.mean()
    return -F.softplus(fake).mean() if kind == "vanilla" else F.softplus(-fake).mean()


def ramp(images_seen: int, start: int, length: int) -> float:
    """Share of the adversarial weight: 0 at ``start``, 1 from ``length`` images later on; 1 if there is no ramp."""
    return 1.0 if length == 0 else min(1.0, max(0.0, (images_seen - start) / length))


def balance(
    looks: Tensor,
    adversarial: Tensor,
    weight: float,
    images: Tensor,
    last_layer: Tensor,
    mean: Callable[[Tensor], Tensor],
) -> tuple[Tensor, Tensor]:
    """``looks + weight x ratio x adversarial``; ratio: |gradient of looks| / (|gradient of adversarial| + 1e-4).

    The norms are those at the decoder's last layer (arXiv 2012.09841, equation 7); the ratio is a constant in 0..1e4.

    looks: reconstruction and perceptual loss, weighted, 0-d; its graph is used up, as that of ``adversarial`` is.
    adversarial: 0-d.
    weight: of the adversarial loss.
    images: reconstructions (B, C, H, W); their graph stays.
    last_layer: the weight that made them.
    mean: over all ranks (collective), as DDP takes it of gradients, so the ratio is that of all ranks' micro-batch.
    """
    by_images = [torch.autograd.grad(loss, images)[0] for loss in (looks, adversarial)]
    at_last = [torch.autograd.grad(images, last_layer, g, retain_graph=True)[0] for g in by_images]
    norms = mean(torch.stack(at_last).float()).flatten(1).norm(dim=1)
    ratio = (norms[0] / (norms[1] + 1e-4)).clamp(0.0, LARGEST_RATIO)
    value = looks.detach() + weight * ratio * adversarial.detach()
    return _KnownGradient.apply(images, by_images[0] + weight * ratio * by_images[1], value), ratio


class _KnownGradient(torch.autograd.Function):
    """A loss whose gradient by ``images`` is known already: the networks behind it are not gone through again."""

    @staticmethod
    def forward(ctx: Any, images: Tensor, gradient: Tensor, loss: Tensor) -> Tensor:
        ctx.save_for_backward(gradient)
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, outer: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        return outer * gradient, None, None


def r1_penalty(real: Tensor, images: Tensor) -> Tensor:
    """Mean over the images of the squared gradient of their mean logit by their pixels; 0-d, with its graph.

    real: logits (B, 1, h, w) of ``images`` (B, C, H, W), which must require a gradient. The mean over patches, as in
    the losses, so that a weight means the same for any number of patches (arXiv 1801.04406, section 4.1).
    """
    (gradient,) = torch.autograd.grad(real.float().mean((1, 2, 3)).sum(), images, create_graph=True)
    return gradient.float().square().sum((1, 2, 3)).mean()


def lecam_penalty(real: Tensor, fake: Tensor, means: Tensor) -> Tensor:
    """Mean squares of how far logits are beyond the moving average of the other kind's; 0-d, fp32.

    means: fp32 (2,), of real and fake logits. arXiv 2104.03310, one-sided as in its authors' code: real
    logits below the average of the fakes are not pushed up by it, nor fake ones above that of the real pushed down.
    """
    return F.relu(real.float() - means[1]).square().mean() + F.relu(means[0] - fake.float()).square().mean()
