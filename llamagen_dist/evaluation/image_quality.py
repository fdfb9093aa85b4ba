"""PSNR and SSIM of reconstructions: per image, in float64, on whole pictures or on a part of them.

Published averages (LlamaGen's, taming's) are means of per-image values. The PSNR of the error of all pixels together is
another number, several dB lower where images differ: it has a name of its own.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from llamagen_dist.evaluation.finite import require_finite

Region = tuple[int, int, int, int]
"""(left, top, right, bottom) in pixels, right and bottom excluded."""

PSNR_LIMIT = 100.0
"""dB given to identical images, whose PSNR is infinite, so that averages stay finite."""
ROUNDING = 1e-3
"""How far floats may lie outside [0, 1], as bfloat16 or interpolation leaves them."""
SSIM_WINDOW = 7
SSIM_K1, SSIM_K2 = 0.01, 0.03


def unpadded(padding: tuple[int, int, int, int] | None, image_size: int, stored_size: int | None) -> Region | None:
    """The part of image_size x image_size pictures that is not padding; None where there is no padding.

    padding: zero pixels (left, top, right, bottom) of the stored_size x stored_size pictures. Where the two
    sizes differ the border scales with them, rounded inwards.
    """
    if padding is None or not any(padding):
        return None
    stored = stored_size or image_size
    left, top, right, bottom = (-(-border * image_size // stored) for border in padding)
    return left, top, image_size - right, image_size - bottom


def psnr(images: Tensor, references: Tensor, region: Region | None = None) -> Tensor:
    """Peak signal-to-noise ratio of each image in dB, float64 (B,): 10 log10(1 / MSE) over all channels.

    Both: (B, C, H, W), uint8 or floats in [0, 1]; ValueError for floats that are not finite. Identical images get
    PSNR_LIMIT dB.
    """
    a, b = _unit(images, region), _unit(references, region)
    return _decibels((a - b).square().mean(dim=(1, 2, 3)))


def psnr_pooled(psnrs: Tensor) -> Tensor:
    """The PSNR in dB, float64 (), of all pixels together, as torchmetrics gives by default.

    psnrs: ``psnr`` of each image (B,), all of one size.
    """
    return _decibels((10.0 ** (-psnrs.double() / 10)).mean())


def _decibels(error: Tensor) -> Tensor:
    return (-10.0 * torch.log10(error.clamp_min(10 ** (-PSNR_LIMIT / 10)))).clamp(max=PSNR_LIMIT)


def ssim(images: Tensor, references: Tensor, region: Region | None = None) -> Tensor:
    """Structural similarity of each image, float64 (B,) (Wang et al. 2004, with scikit-image's defaults).

    A uniform 7 x 7 window, sample (N - 1) covariances, K1 = 0.01, K2 = 0.03, only windows that lie wholly
    inside the picture, then the mean over windows and channels. Both: (B, C, H, W), uint8 or finite floats in [0,
    1], at least 7 x 7 pixels (else ValueError).

    The data range is 1, what the pixels span; another one makes it read too high, see ``ssim_llamagen``.
    """
    return _ssim(images, references, region, 1.0)[0]


def both_ssims(images: Tensor, references: Tensor, region: Region | None = None) -> tuple[Tensor, Tensor]:
    """``ssim`` and ``ssim_llamagen``, from one pass over the windows."""
    own, llamagen = _ssim(images, references, region, 1.0, 2.0)
    return own, llamagen


def _ssim(images: Tensor, references: Tensor, region: Region | None, *data_ranges: float) -> list[Tensor]:
    a, b = _unit(images, region), _unit(references, region)
    if min(a.shape[-2:]) < SSIM_WINDOW:
        raise ValueError(f"SSIM needs at least {SSIM_WINDOW} x {SSIM_WINDOW} pixels, not {tuple(a.shape[-2:])}")

    def mean(x: Tensor) -> Tensor:
        return F.avg_pool2d(x, SSIM_WINDOW, stride=1)

    pixels = SSIM_WINDOW**2
    sample = pixels / (pixels - 1)
    mean_a, mean_b = mean(a), mean(b)
    var_a = sample * (mean(a * a) - mean_a * mean_a)
    var_b = sample * (mean(b * b) - mean_b * mean_b)
    covariance = sample * (mean(a * b) - mean_a * mean_b)
    found = []
    for data_range in data_ranges:
        c1, c2 = (SSIM_K1 * data_range) ** 2, (SSIM_K2 * data_range) ** 2
        numerator = (2 * mean_a * mean_b + c1) * (2 * covariance + c2)
        denominator = (mean_a**2 + mean_b**2 + c1) * (var_a + var_b + c2)
        found.append((numerator / denominator).mean(dim=(1, 2, 3)))
    return found


def ssim_llamagen(images: Tensor, references: Tensor, region: Region | None = None) -> Tensor:
    """SSIM as LlamaGen's published numbers have it: pixels in [0, 1] but data_range 2, which reads higher."""
    return _ssim(images, references, region, 2.0)[0]


def _unit(images: Tensor, region: Region | None) -> Tensor:
    if region is not None:
        left, top, right, bottom = region
        images = images[..., top:bottom, left:right]
    if images.dtype == torch.uint8:
        return images.double() / 255.0
    require_finite("pixels", images)
    least, most = (float(bound) for bound in images.aminmax())
    if least < -ROUNDING or most > 1 + ROUNDING:
        raise ValueError(
            f"ssim_range: pixels from {least:g} to {most:g}; give uint8, or floats from 0 to 1 ((x + 1) / 2 of what a "
            "decoder returns)"
        )
    return images.double()
