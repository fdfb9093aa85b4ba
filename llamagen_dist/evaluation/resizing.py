"""How pictures of any size become the 299 x 299 inputs of the FID network: one named rule for each common evaluator.

The rule moves FID more than anything else in an evaluator (64 crops of photographs: 245.4, 247.1 or 264.4 by the three
below), so its name is part of every record.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

SIDE = 299


def resize_tf1(images: Tensor, side: int = SIDE) -> Tensor:
    """TensorFlow 1's resize_bilinear with align_corners=False: output pixel i reads at i x (input / output).

    images: uint8 [B, H, W, 3] -> float32 [B, 3, side, side], values still 0 … 255, channels-last memory.
    """
    pixels = images.permute(0, 3, 1, 2).float()
    for axis in (3, 2):  # across, then down, as TensorFlow does
        size = pixels.shape[axis]
        position = torch.arange(side, device=pixels.device, dtype=torch.float32) * (size / side)
        low = position.floor().long()
        part = (position - low).view(-1, *([1] * (3 - axis)))
        left = pixels.index_select(axis, low)
        right = pixels.index_select(axis, (low + 1).clamp(max=size - 1))
        pixels = left + (right - left) * part
    return pixels.contiguous(memory_format=torch.channels_last)


def _tf1(images: Tensor) -> Tensor:
    return (resize_tf1(images) - 128.0) / 128.0


def _pytorch_fid(images: Tensor) -> Tensor:
    pixels = images.permute(0, 3, 1, 2).float() / 255
    return 2 * F.interpolate(pixels, size=(SIDE, SIDE), mode="bilinear", align_corners=False) - 1


def _clean_fid(images: Tensor) -> Tensor:
    # PyTorch's antialiased bicubic filter is PIL's (a = -0.5, weights renormalised at the border) and, on floats, does
    # not round either; the filter overshoots at edges, hence the clamp. In float64, as PIL has its weights: they depend
    # on positions that float32 knows to a few digits only.
    pixels = images.permute(0, 3, 1, 2).double().contiguous()
    scaled = F.interpolate(pixels, size=(SIDE, SIDE), mode="bicubic", align_corners=False, antialias=True)
    return ((scaled.clamp(0, 255) - 128.0) / 128.0).float()


class Resize(NamedTuple):
    what: str
    """The rule in words, as records state it."""
    inputs: Callable[[Tensor], Tensor]
    """uint8 [B, H, W, 3] -> float32 [B, 3, 299, 299], scaled to about -1 … 1."""


RESIZES = {
    "tf1": Resize("TF1 bilinear (corner-anchored, no antialiasing) to 299 x 299, then (x - 128) / 128", _tf1),
    "pytorch-fid": Resize(
        "bilinear (half-pixel centres, no antialiasing) to 299 x 299, then 2 x / 255 - 1", _pytorch_fid
    ),
    "clean-fid": Resize(
        "bicubic (a = -0.5, half-pixel centres, antialiased, not rounded, clipped to 0 … 255) to 299 x 299, then "
        "(x - 128) / 128",
        _clean_fid,
    ),
}
"""``tf1``: what ADM's evaluator and torch-fidelity do, and with them the published FIDs of this field."""
