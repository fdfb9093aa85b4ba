"""The InceptionV3 of FID (the TensorFlow graph of 2015-12-05) in plain PyTorch, batch norm folded, with two taps.

It differs from torchvision's network of the same name: average pools leave the padding out of the mean, the last
block pools by maximum, and there is no auxiliary head. Weights: llamagen_dist/evaluation/inception_weights.py.
"""

from collections.abc import Mapping
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SIDE = 299
POOL_FEATURES, SPATIAL_CHANNELS, SPATIAL_SIDE, LOGITS = 2048, 7, 17, 1008
SPATIAL_FEATURES = SPATIAL_SIDE * SPATIAL_SIDE * SPATIAL_CHANNELS
BN_EPS = 1e-3
RESIZE = "TF1 bilinear (corner-anchored, no antialiasing) to 299 x 299, then (x - 128) / 128"
TAPS = {
    "fid": "2048 means of the last block over its 8 x 8 positions",
    "sfid": "channels 0-6 of Mixed_6d (its 1 x 1 branch after ReLU), 17 x 17 x 7 flattened as height, width, channel",
}


class Features(NamedTuple):
    pool: Tensor
    """float32 [B, 2048], what FID, KID, precision and recall look at."""
    spatial: Tensor
    """float32 [B, 2023], what sFID looks at."""
    logits: Tensor | None
    """float32 [B, 1008] without the bias (as the Inception Score has always been computed), where weights exist."""


def resize_tf1(images: Tensor, side: int = SIDE) -> Tensor:
    """TensorFlow 1's resize_bilinear with align_corners=False: output pixel i reads at i x (input / output).

    images: uint8 [B, H, W, 3] -> float32 [B, 3, side, side], values still 0 … 255, channels-last memory.
    """
    pixels = images.permute(0, 3, 1, 2).float()
    for axis in (3, 2):  # across, then down, as TensorFlow does
        size = pixels.shape[axis]
        place = torch.arange(side, device=pixels.device, dtype=torch.float32) * (size / side)
        low = place.floor().long()
        part = (place - low).view(-1, *([1] * (3 - axis)))
        left = pixels.index_select(axis, low)
        right = pixels.index_select(axis, (low + 1).clamp(max=size - 1))
        pixels = left + (right - left) * part
    return pixels.contiguous(memory_format=torch.channels_last)


class Conv(nn.Module):
    """Convolution with its batch norm folded in, then ReLU. ``same``: the output is as large as the input."""

    def __init__(
        self, inputs: int, outputs: int, kernel: int | tuple[int, int] = 1, stride: int = 1, same: bool = True
    ) -> None:
        super().__init__()
        height, width = (kernel, kernel) if isinstance(kernel, int) else kernel
        self.weight = nn.Parameter(torch.zeros(outputs, inputs, height, width), requires_grad=False)
        self.bias = nn.Parameter(torch.zeros(outputs), requires_grad=False)
        self.stride, self.padding = stride, (height // 2, width // 2) if same else (0, 0)

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight, self.bias, self.stride, self.padding).relu_()


def _mean3(x: Tensor) -> Tensor:
    return F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)


class Mixed35(nn.Module):
    """Mixed_5b, 5c, 5d."""

    def __init__(self, inputs: int, pooled: int) -> None:
        super().__init__()
        self.branch1x1 = Conv(inputs, 64)
        self.branch5x5_1 = Conv(inputs, 48)
        self.branch5x5_2 = Conv(48, 64, 5)
        self.branch3x3dbl_1 = Conv(inputs, 64)
        self.branch3x3dbl_2 = Conv(64, 96, 3)
        self.branch3x3dbl_3 = Conv(96, 96, 3)
        self.branch_pool = Conv(inputs, pooled)

    def forward(self, x: Tensor) -> Tensor:
        double = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        return torch.cat(
            [self.branch1x1(x), self.branch5x5_2(self.branch5x5_1(x)), double, self.branch_pool(_mean3(x))], 1
        )


class Shrink35(nn.Module):
    """Mixed_6a: 35 x 35 to 17 x 17."""

    def __init__(self) -> None:
        super().__init__()
        self.branch3x3 = Conv(288, 384, 3, 2, same=False)
        self.branch3x3dbl_1 = Conv(288, 64)
        self.branch3x3dbl_2 = Conv(64, 96, 3)
        self.branch3x3dbl_3 = Conv(96, 96, 3, 2, same=False)

    def forward(self, x: Tensor) -> Tensor:
        double = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        return torch.cat([self.branch3x3(x), double, F.max_pool2d(x, 3, 2)], 1)


class Mixed17(nn.Module):
    """Mixed_6b to 6e."""

    def __init__(self, width: int) -> None:
        super().__init__()
        across, down = (1, 7), (7, 1)
        self.branch1x1 = Conv(768, 192)
        self.branch7x7_1 = Conv(768, width)
        self.branch7x7_2 = Conv(width, width, across)
        self.branch7x7_3 = Conv(width, 192, down)
        self.branch7x7dbl_1 = Conv(768, width)
        self.branch7x7dbl_2 = Conv(width, width, down)
        self.branch7x7dbl_3 = Conv(width, width, across)
        self.branch7x7dbl_4 = Conv(width, width, down)
        self.branch7x7dbl_5 = Conv(width, 192, across)
        self.branch_pool = Conv(768, 192)

    def forward(self, x: Tensor) -> Tensor:
        single = self.branch7x7_3(self.branch7x7_2(self.branch7x7_1(x)))
        double = self.branch7x7dbl_3(self.branch7x7dbl_2(self.branch7x7dbl_1(x)))
        double = self.branch7x7dbl_5(self.branch7x7dbl_4(double))
        return torch.cat([self.branch1x1(x), single, double, self.branch_pool(_mean3(x))], 1)


class Shrink17(nn.Module):
    """Mixed_7a: 17 x 17 to 8 x 8."""

    def __init__(self) -> None:
        super().__init__()
        self.branch3x3_1 = Conv(768, 192)
        self.branch3x3_2 = Conv(192, 320, 3, 2, same=False)
        self.branch7x7x3_1 = Conv(768, 192)
        self.branch7x7x3_2 = Conv(192, 192, (1, 7))
        self.branch7x7x3_3 = Conv(192, 192, (7, 1))
        self.branch7x7x3_4 = Conv(192, 192, 3, 2, same=False)

    def forward(self, x: Tensor) -> Tensor:
        long = self.branch7x7x3_4(self.branch7x7x3_3(self.branch7x7x3_2(self.branch7x7x3_1(x))))
        return torch.cat([self.branch3x3_2(self.branch3x3_1(x)), long, F.max_pool2d(x, 3, 2)], 1)


class Mixed8(nn.Module):
    """Mixed_7b and 7c; the latter pools by maximum."""

    def __init__(self, inputs: int, by_maximum: bool) -> None:
        super().__init__()
        self.by_maximum = by_maximum
        self.branch1x1 = Conv(inputs, 320)
        self.branch3x3_1 = Conv(inputs, 384)
        self.branch3x3_2a = Conv(384, 384, (1, 3))
        self.branch3x3_2b = Conv(384, 384, (3, 1))
        self.branch3x3dbl_1 = Conv(inputs, 448)
        self.branch3x3dbl_2 = Conv(448, 384, 3)
        self.branch3x3dbl_3a = Conv(384, 384, (1, 3))
        self.branch3x3dbl_3b = Conv(384, 384, (3, 1))
        self.branch_pool = Conv(inputs, 192)

    def forward(self, x: Tensor) -> Tensor:
        single, double = self.branch3x3_1(x), self.branch3x3dbl_2(self.branch3x3dbl_1(x))
        pooled = F.max_pool2d(x, 3, stride=1, padding=1) if self.by_maximum else _mean3(x)
        return torch.cat(
            [
                self.branch1x1(x),
                self.branch3x3_2a(single),
                self.branch3x3_2b(single),
                self.branch3x3dbl_3a(double),
                self.branch3x3dbl_3b(double),
                self.branch_pool(pooled),
            ],
            1,
        )


class Inception(nn.Module):
    """uint8 [B, H, W, 3] -> Features. The names of its parts are those of the usual PyTorch ports."""

    def __init__(self) -> None:
        super().__init__()
        self.Conv2d_1a_3x3 = Conv(3, 32, 3, 2, same=False)
        self.Conv2d_2a_3x3 = Conv(32, 32, 3, same=False)
        self.Conv2d_2b_3x3 = Conv(32, 64, 3)
        self.Conv2d_3b_1x1 = Conv(64, 80)
        self.Conv2d_4a_3x3 = Conv(80, 192, 3, same=False)
        self.Mixed_5b, self.Mixed_5c, self.Mixed_5d = Mixed35(192, 32), Mixed35(256, 64), Mixed35(288, 64)
        self.Mixed_6a = Shrink35()
        self.Mixed_6b, self.Mixed_6c, self.Mixed_6d, self.Mixed_6e = (Mixed17(width) for width in (128, 160, 160, 192))
        self.Mixed_7a = Shrink17()
        self.Mixed_7b, self.Mixed_7c = Mixed8(1280, by_maximum=False), Mixed8(2048, by_maximum=True)
        self.fc: Tensor | None = None

    @torch.inference_mode()
    def forward(self, images: Tensor) -> Features:
        """images: uint8 [B, H, W, 3] of any size; resized and scaled here, so no caller can do it otherwise."""
        return self.features((resize_tf1(images) - 128.0) / 128.0)

    def features(self, x: Tensor) -> Features:
        """x: float32 [B, 3, 299, 299], (pixel - 128) / 128."""
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(F.max_pool2d(x, 3, 2)))
        x = self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(F.max_pool2d(x, 3, 2))))
        x = self.Mixed_6d(self.Mixed_6c(self.Mixed_6b(self.Mixed_6a(x))))
        spatial = x[:, :SPATIAL_CHANNELS].permute(0, 2, 3, 1).flatten(1)
        x = self.Mixed_7c(self.Mixed_7b(self.Mixed_7a(self.Mixed_6e(x))))
        pool = x.mean(dim=(2, 3))
        return Features(pool, spatial.contiguous(), None if self.fc is None else pool @ self.fc.T)


def conv_names() -> dict[str, tuple[int, ...]]:
    """Name of every convolution -> the shape of its weight, in the order of the forward pass."""
    with torch.device("meta"):
        network = Inception()
    return {name: tuple(part.weight.shape) for name, part in network.named_modules() if isinstance(part, Conv)}


def assemble(weights: Mapping[str, Tensor]) -> Inception:
    """The network from unfolded weights: NAME.conv.weight, NAME.bn.{weight, bias, running_mean, running_var}.

    Batch norm is folded into the convolutions in float64. ``fc.weight`` [1008, 2048], if there, gives the logits.
    """
    network = Inception()
    for name, conv in network.named_modules():
        if not isinstance(conv, Conv):
            continue
        weight = weights[f"{name}.conv.weight"].double()
        gain, shift, mean, variance = (
            weights[f"{name}.bn.{part}"].double() for part in ("weight", "bias", "running_mean", "running_var")
        )
        scale = gain / torch.sqrt(variance + BN_EPS)
        conv.weight.copy_(weight * scale.view(-1, 1, 1, 1))
        conv.bias.copy_(shift - mean * scale)
    if "fc.weight" in weights:
        network.fc = weights["fc.weight"].float()
    return network.to(memory_format=torch.channels_last).eval()
