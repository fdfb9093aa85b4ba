"""As few prefix tokens of each image as a given quality needs: the rate follows the image."""

import torch
from torch import Tensor

from llamagen_dist.evaluation.image_quality import Region, psnr
from llamagen_dist.models.vq import VQModel, to_uint8


def shortest_prefixes(
    model: VQModel, codes: Tensor, originals: Tensor, least_psnr: float, region: Region | None = None
) -> Tensor:
    """int64 (B,) on the CPU: how many tokens each image needs for ``least_psnr`` dB; N where all N do not reach it.

    Every length is tried, since a longer prefix need not be better, on the images that are not there yet.

    codes: int64 (B, 1, N), of ``originals``, uint8 (B, 3, S, S) on the CPU.
    region: see ``psnr``.
    """
    count = codes.shape[-1]
    lengths = torch.full((len(codes),), count)
    waiting = torch.arange(len(codes))
    for length in range(1, count):
        if not len(waiting):
            break
        shown = to_uint8(model.decode(codes[waiting.to(codes.device), :, :length])).cpu()
        reached = psnr(shown, originals[waiting], region) >= least_psnr
        lengths[waiting[reached]] = length
        waiting = waiting[~reached]
    return lengths
