"""The network that tells real images from reconstructions, patch by patch."""

import torch
from torch import Tensor, nn


class PatchGAN(nn.Module):
    """LlamaGen's PatchGAN: ``layers`` strided 4x4 convolutions, one of stride 1, one logit per patch.

    With 64 channels and 3 layers it has 2,765,633 parameters and gives 30 x 30 logits for 256 x 256 pixels;
    its parameter names (``main.0``, ``main.2``, ``main.3`` …) are LlamaGen's. norm: ``batch`` (LlamaGen's) or
    ``group``, whose result for an image does not depend on the other images or on the number of ranks.
    """

    def __init__(self, image_channels: int = 3, channels: int = 64, layers: int = 3, norm: str = "batch") -> None:
        super().__init__()
        main: list[nn.Module] = [nn.Conv2d(image_channels, channels, 4, 2, 1), nn.LeakyReLU(0.2)]
        width = channels
        for number in range(1, layers + 1):
            before, width = width, channels * min(2**number, 8)
            stride = 2 if number < layers else 1
            normalise = nn.BatchNorm2d(width) if norm == "batch" else nn.GroupNorm(1, width)
            main += [nn.Conv2d(before, width, 4, stride, 1, bias=False), normalise, nn.LeakyReLU(0.2)]
        main.append(nn.Conv2d(width, 1, 4, 1, 1))
        self.main = nn.Sequential(*main)
        self.apply(_initialise)

    def forward(self, *batches: Tensor) -> list[Tensor]:
        """Each (B, C, H, W) -> (B, 1, h, w) logits.

        Several batches in one call are one forward pass for DDP, which must see all uses of the weights
        before the backward pass; batch statistics are taken of each batch on its own.
        """
        return [self.main(images) for images in batches]


def _initialise(module: nn.Module) -> None:
    """Convolutions N(0, 0.02), norms N(1, 0.02) with bias 0; convolution biases keep torch's default."""
    with torch.no_grad():
        if isinstance(module, nn.Conv2d):
            module.weight.normal_(0.0, 0.02)
        elif isinstance(module, (nn.BatchNorm2d, nn.GroupNorm)):
            module.weight.normal_(1.0, 0.02)
            module.bias.zero_()
