"""Prefix tokens in training and validation: how many of them the decoder gets, and what it makes of them."""

from collections.abc import Iterable

import torch
from torch import Tensor

from llamagen_dist import prng
from llamagen_dist.config import TokenizerConfigFile
from llamagen_dist.evaluation.image_quality import Region, psnr
from llamagen_dist.models.vq import VQModel, to_uint8


def prefix_lengths(config: TokenizerConfigFile, first: int, count: int) -> Tensor | None:
    """int64 (count,), for the images at positions ``first`` and on of the run; None: tokens are a grid, or all of them.

    A function of the seed and the image's position alone, so ranks, micro-batches and resumes change nothing.
    """
    section, tokens = config.prefix, config.model.token_count
    if tokens is None or section.lengths == "full":
        return None
    images, seed = torch.arange(first, first + count), config.train.seed
    if section.lengths == "powers":
        rungs = torch.tensor(section.rungs(tokens))
        return rungs[prng.integers(seed, "prefix length", images, len(rungs))]
    return section.shortest + prng.integers(seed, "prefix length", images, tokens - section.shortest + 1)


def measured_lengths(config: TokenizerConfigFile) -> list[int]:
    """Prefix lengths at which validation measures PSNR beside all tokens; none where tokens are a grid."""
    return [] if config.model.token_count is None else config.prefix.measured_below(config.model.token_count)


def prefix_psnr(
    model: VQModel, codes: Tensor, original: Tensor, region: Region | None, lengths: Iterable[int]
) -> list[float]:
    """The sum over images of the PSNR (dB) of the first k tokens, for each length k.

    codes: int64 (B, 1, N), of ``original``, uint8 (B, 3, S, S) on the CPU; region: see ``psnr``.
    """
    return [float(psnr(to_uint8(model.decode(codes[..., :k])).cpu(), original, region).sum()) for k in lengths]
