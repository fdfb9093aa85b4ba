"""The InceptionV3 of FID (the TensorFlow graph of 2015-12-05) in plain PyTorch, batch norm folded, with two taps.

It differs from torchvision's network of the same name: average pools leave the padding out of the mean, the last
block pools by maximum, and there is no auxiliary head. Weights: llamagen_dist/evaluation/inception_weights.py.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llamagen_dist.evaluation.resizing import RESIZES

POOL_FEATURES, SPATIAL_CHANNELS, SPATIAL_SIDE, LOGITS = 2048, 7, 17, 1008
SPATIAL_FEATURES = SPATIAL_SIDE * SPATIAL_SIDE * SPATIAL_CHANNELS
ACROSS, DOWN = (1, 7), (7, 1)
BN_EPS = 1e-3
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


Step = tuple[int, int | tuple[int, int]]
"""Of a chain of convolutions: (output channels, kernel)."""
Chains = Mapping[str, Sequence[Step | list[Step]]]


class Mixed(nn.Module):
    """A block: chains of convolutions and a pooling side by side, whose outputs are concatenated.

    inputs: channels.
    chains: name -> steps. A single step has its chain's name, several are NAME_1, NAME_2 and so on; a last step that is
        a list forks the chain into NAME_2a and NAME_2b.
    pooled: channels of the convolution after the pooling. None: the block halves the side; then no convolution
        follows the pooling, which has stride 2 and no padding, as the last step of every chain has.
    by_maximum: pool by maximum, not by mean.
    """

    def __init__(
        self,
        inputs: int,
        chains: Chains,
        pooled: int | None = None,
        by_maximum: bool = False,
    ) -> None:
        super().__init__()
        self.by_maximum, self.chains = by_maximum, list[list[list[str]]]()
        for chain, steps in chains.items():
            width, stages = inputs, []
            for number, step in enumerate(steps, 1):
                stem = f"{chain}_{number}" if len(steps) > 1 else chain
                fork = (
                    {stem: step} if isinstance(step, tuple) else dict(zip((f"{stem}a", f"{stem}b"), step, strict=True))
                )
                halve = pooled is None and number == len(steps)
                for name, (outputs, kernel) in fork.items():
                    self.add_module(name, Conv(width, outputs, kernel, 2 if halve else 1, same=not halve))
                stages.append(list(fork))
                width = outputs
            self.chains.append(stages)
        self.branch_pool = None if pooled is None else Conv(inputs, pooled)

    def forward(self, x: Tensor) -> Tensor:
        outputs = []
        for stages in self.chains:
            ends = [x]
            for names in stages:
                ends = [getattr(self, name)(ends[0]) for name in names]
            outputs += ends
        if self.branch_pool is None:
            return torch.cat([*outputs, F.max_pool2d(x, 3, 2)], 1)
        if self.by_maximum:
            around = F.max_pool2d(x, 3, stride=1, padding=1)
        else:  # TensorFlow leaves the padding out of the mean
            around = F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)
        return torch.cat([*outputs, self.branch_pool(around)], 1)


def _mixed35(inputs: int, pooled: int) -> Mixed:
    """Mixed_5b, 5c, 5d."""
    chains: Chains = {
        "branch1x1": [(64, 1)],
        "branch5x5": [(48, 1), (64, 5)],
        "branch3x3dbl": [(64, 1), (96, 3), (96, 3)],
    }
    return Mixed(inputs, chains, pooled)


def _mixed17(width: int) -> Mixed:
    """Mixed_6b to 6e: 7 x 7 convolutions, factorised into rows and columns."""
    chains: Chains = {
        "branch1x1": [(192, 1)],
        "branch7x7": [(width, 1), (width, ACROSS), (192, DOWN)],
        "branch7x7dbl": [(width, 1), (width, DOWN), (width, ACROSS), (width, DOWN), (192, ACROSS)],
    }
    return Mixed(768, chains, 192)


def _mixed8(inputs: int, by_maximum: bool) -> Mixed:
    """Mixed_7b and 7c; the latter pools by maximum."""
    fork: list[Step] = [(384, (1, 3)), (384, (3, 1))]
    chains: Chains = {
        "branch1x1": [(320, 1)],
        "branch3x3": [(384, 1), fork],
        "branch3x3dbl": [(448, 1), (384, 3), fork],
    }
    return Mixed(inputs, chains, 192, by_maximum)


class Inception(nn.Module):
    """uint8 [B, H, W, 3] -> Features. The names of its parts are those of the usual PyTorch ports.

    resize: how pictures become inputs of 299 x 299, a name in RESIZES.
    """

    def __init__(self, resize: str = "tf1") -> None:
        super().__init__()
        self.resize = RESIZES[resize]
        self.Conv2d_1a_3x3 = Conv(3, 32, 3, 2, same=False)
        self.Conv2d_2a_3x3 = Conv(32, 32, 3, same=False)
        self.Conv2d_2b_3x3 = Conv(32, 64, 3)
        self.Conv2d_3b_1x1 = Conv(64, 80)
        self.Conv2d_4a_3x3 = Conv(80, 192, 3, same=False)
        self.Mixed_5b, self.Mixed_5c, self.Mixed_5d = _mixed35(192, 32), _mixed35(256, 64), _mixed35(288, 64)
        self.Mixed_6a = Mixed(288, {"branch3x3": [(384, 3)], "branch3x3dbl": [(64, 1), (96, 3), (96, 3)]})
        self.Mixed_6b, self.Mixed_6c, self.Mixed_6d, self.Mixed_6e = (_mixed17(width) for width in (128, 160, 160, 192))
        long: list[Step] = [(192, 1), (192, ACROSS), (192, DOWN), (192, 3)]
        self.Mixed_7a = Mixed(768, {"branch3x3": [(192, 1), (320, 3)], "branch7x7x3": long})
        self.Mixed_7b, self.Mixed_7c = _mixed8(1280, by_maximum=False), _mixed8(2048, by_maximum=True)
        self.fc: Tensor | None = None

    @torch.inference_mode()
    def forward(self, images: Tensor) -> Features:
        """images: uint8 [B, H, W, 3] of any size; resized and scaled here, so no caller can do it otherwise."""
        return self.features(self.resize.inputs(images))

    def features(self, x: Tensor) -> Features:
        """x: float32 [B, 3, 299, 299], about -1 … 1."""
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


def assemble(weights: Mapping[str, Tensor], resize: str = "tf1") -> Inception:
    """The network from unfolded weights: NAME.conv.weight, NAME.bn.{weight, bias, running_mean, running_var}.

    Batch norm is folded into the convolutions in float64. ``fc.weight`` [1008, 2048], if there, gives the logits.
    """
    network = Inception(resize)
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
