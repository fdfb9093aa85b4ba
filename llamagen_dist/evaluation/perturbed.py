"""Codes as a generator that errs would draw them: a share of an image's codes, replaced by near neighbours (pFID).

Reconstructions of such codes, scored against the originals, rank tokenizers by what a GPT will make of them, which the
FID of plain reconstructions does not (Qiu et al. 2025, arXiv 2503.08354: perturbation rate and strength).
"""

import torch
from torch import Tensor

from llamagen_dist import prng


def perturb(codes: Tensor, neighbours: Tensor, share: float, seed: int, samples: Tensor) -> Tensor:
    """int64 [B, N]: round(share x N) codes of each image, each replaced by one of its neighbours, all equally likely.

    Which positions and which neighbours is a hash of (seed, sample, position): independent of batch and ranks.

    codes: int64 [B, N].
    neighbours: int64 [K, k], of every code its nearest others (``Quantizer.neighbours``).
    share: above 0, up to 1.
    samples: int64 [B], the images' numbers in their set.
    """
    positions = torch.arange(codes.shape[1])
    order = (
        prng.bits(seed, "perturbed-position", samples[:, None], positions).to(torch.int64).argsort(dim=1, stable=True)
    )
    chosen = torch.zeros_like(codes, dtype=torch.bool).scatter_(1, order[:, : round(share * codes.shape[1])], True)
    which = prng.integers(seed, "perturbing-neighbour", samples[:, None], neighbours.shape[1], positions)
    return torch.where(chosen, neighbours[codes, which], codes)
