"""StyleGAN2's discriminator (arXiv 1912.04958, section 4.1 and appendix B), written from the paper."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Equalised(nn.Module):
    """A convolution (size > 0) or a linear layer with weights N(0, 1), scaled by 1 / sqrt(fan-in) when used.

    So Adam, whose steps have one size, changes all layers at the same relative speed (arXiv 1710.10196, section 4.1).
    """

    def __init__(self, before: int, after: int, size: int = 0, bias: bool = True) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(after, before, size, size) if size else torch.randn(after, before))
        self.bias = nn.Parameter(torch.zeros(after)) if bias else None
        self.scale = 1.0 / math.sqrt(before * max(1, size * size))

    def forward(self, x: Tensor, stride: int = 1, padding: int = 0) -> Tensor:
        if self.weight.dim() == 2:
            return F.linear(x, self.weight * self.scale, self.bias)
        return F.conv2d(x, self.weight * self.scale, self.bias, stride, padding)


def activate(x: Tensor) -> Tensor:
    """Leaky ReLU, scaled so that it keeps the variance of its input."""
    return F.leaky_relu(x, 0.2) * math.sqrt(2.0)


class Block(nn.Module):
    """Two 3x3 convolutions beside a 1x1 one, half the size; a low-pass filter goes before every stride of 2."""

    blur: Tensor

    def __init__(self, before: int, after: int) -> None:
        super().__init__()
        self.first, self.second = Equalised(before, before, 3), Equalised(before, after, 3)
        self.skip = Equalised(before, after, 1, bias=False)
        tap = torch.tensor([1.0, 3.0, 3.0, 1.0]) / 8
        self.register_buffer("blur", torch.outer(tap, tap)[None, None], persistent=False)

    def _blurred(self, x: Tensor, padding: int, stride: int = 1) -> Tensor:
        kernel = self.blur.to(x).expand(x.shape[1], 1, 4, 4)
        return F.conv2d(x, kernel, None, stride, padding, groups=x.shape[1])

    def forward(self, x: Tensor) -> Tensor:
        """(B, before, H, W) -> (B, after, H/2, W/2)."""
        main = activate(self.first(x, padding=1))
        main = activate(self.second(self._blurred(main, padding=2), stride=2))
        # a 1x1 convolution of stride 2 sees every second pixel only: the filter need not compute the others
        return (main + self.skip(self._blurred(x, padding=1, stride=2))) / math.sqrt(2.0)


def with_deviation(x: Tensor, group: int) -> Tensor:
    """Append a channel that says how much the images of a group differ (arXiv 1710.10196, section 3).

    x: (B, C, H, W), where B is a multiple of ``group``; groups are consecutive images, so that with shares of whole
        groups they are the same on any number of ranks.

    Returns (B, C + 1, H, W): the standard deviation over the group, averaged over channels and pixels.
    """
    groups = x.float().unflatten(0, (-1, group))
    deviation = (groups.var(1, unbiased=False) + 1e-8).sqrt().mean((1, 2, 3)).repeat_interleave(group)
    return torch.cat([x, deviation.to(x)[:, None, None, None].expand(-1, 1, *x.shape[2:])], 1)


class StyleGANDiscriminator(nn.Module):
    """Residual blocks that halve the image until 4 to 7 pixels are left, then one logit for all of it.

    image_channels: of the images.
    image_size: pixels, 4 to 7 times a power of two.
    channels: at 256 pixels; twice as many at half the size, up to 8 times.
    deviation_group: images whose deviation it sees (``with_deviation``); 0: it sees none.
    """

    def __init__(self, image_channels: int, image_size: int, channels: int = 64, deviation_group: int = 4) -> None:
        super().__init__()
        self.deviation_group = deviation_group
        widths, size = [max(1, min(8 * channels, channels * 256 // image_size))], image_size
        blocks = []
        while size >= 8:
            size //= 2
            widths.append(max(1, min(8 * channels, channels * 256 // size)))
            blocks.append(Block(widths[-2], widths[-1]))
        self.start = Equalised(image_channels, widths[0], 1)
        self.blocks = nn.Sequential(*blocks)
        self.mixed = Equalised(widths[-1] + (deviation_group > 0), widths[-1], 3)
        self.hidden = Equalised(widths[-1] * size * size, widths[-1])
        self.logit = Equalised(widths[-1], 1)

    def forward(self, *batches: Tensor) -> list[Tensor]:
        """Each (B, C, H, W) -> (B, 1, 1, 1) logits; several batches in one call as in ``PatchGAN``."""
        return [self._judge(images) for images in batches]

    def _judge(self, images: Tensor) -> Tensor:
        x = self.blocks(activate(self.start(images)))
        if self.deviation_group:
            x = with_deviation(x, self.deviation_group)
        x = activate(self.mixed(x, padding=1))
        return self.logit(activate(self.hidden(x.flatten(1))))[:, :, None, None]
