"""The network that tells real images from reconstructions: patch by patch, or (stylegan.py) as a whole."""

import torch
import torch.distributed as dist
from torch import Tensor, nn

from llamagen_dist.config.discriminator import DiscriminatorSection
from llamagen_dist.errors import UserError
from tokenizer_training.batch_norm import SynchronisedBatchNorm2d
from tokenizer_training.stylegan import StyleGANDiscriminator


def build_discriminator(
    section: DiscriminatorSection, image_channels: int, image_size: int, group: dist.ProcessGroup | None
) -> nn.Module:
    """With its initial weights. group: the ranks that share batch statistics; None: there is one.

    With LeCAM it has a buffer ``lecam_means``, fp32 (2,): the moving averages of the logits, real and fake.
    """
    network: nn.Module
    if section.kind == "stylegan":
        network = StyleGANDiscriminator(image_channels, image_size, section.channels, section.minibatch_stddev)
    else:
        network = PatchGAN(image_channels, section.channels, section.layers, section.norm, group)
    if section.lecam_weight > 0:  # a buffer, so that checkpoints hold it and a rehearsal puts it back
        network.register_buffer("lecam_means", torch.zeros(2))
    return network


def check_groups(section: DiscriminatorSection, share: int, micro: int) -> None:
    """That every micro-batch is whole groups of ``minibatch_stddev``. Raises UserError.

    share, micro: images of one rank in a step and in a micro-batch.
    """
    group = section.minibatch_stddev if section.kind == "stylegan" else 0
    if group and (share % group or min(micro, share) % group):
        what = (
            f"{min(micro, share)} images of a rank's micro-batch" if share % group == 0 else f"{share} images of a rank"
        )
        raise UserError(
            f"loss.discriminator.minibatch_stddev: {group} does not divide the {what}; change train.global_batch, "
            "train.micro_batch or the number of ranks, choose another group size, or 0 for none"
        )


class PatchGAN(nn.Module):
    """LlamaGen's PatchGAN: ``layers`` strided 4x4 convolutions, one of stride 1, one logit per patch.

    With 64 channels and 3 layers it has 2,765,633 parameters and gives 30 x 30 logits for 256 x 256 pixels;
    its parameter names (``main.0``, ``main.2``, ``main.3`` …) are LlamaGen's. norm: ``batch`` (LlamaGen's, over all
    ranks of ``group``) or ``group``, whose result for an image does not depend on the other images.
    """

    def __init__(
        self,
        image_channels: int = 3,
        channels: int = 64,
        layers: int = 3,
        norm: str = "batch",
        group: dist.ProcessGroup | None = None,
    ) -> None:
        super().__init__()
        main: list[nn.Module] = [nn.Conv2d(image_channels, channels, 4, 2, 1), nn.LeakyReLU(0.2)]
        width = channels
        for number in range(1, layers + 1):
            before, width = width, channels * min(2**number, 8)
            stride = 2 if number < layers else 1
            normalise = SynchronisedBatchNorm2d(width, group) if norm == "batch" else nn.GroupNorm(1, width)
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
