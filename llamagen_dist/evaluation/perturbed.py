"""Codes as a generator that errs would draw them: a share of an image's codes, replaced by near neighbours (pFID).

Reconstructions of such codes, scored against the originals, rank tokenizers by what a GPT will make of them, which the
FID of plain reconstructions does not (Qiu et al. 2025, arXiv 2503.08354: perturbation rate and strength).
"""

import torch
from torch import Tensor

from llamagen_dist import prng

_ROWS = 1024  # codes whose distances to all others are in memory at once


def nearest_codes(codebook: Tensor, count: int) -> Tensor:
    """int64 [K, count]: of every code its nearest others, the nearest first.

    codebook: (K, C) float, as the decoder sees it. ValueError where there are not so many others.
    """
    codes = codebook.detach().double().cpu()
    if count >= len(codes):
        raise ValueError(f"{count} neighbours of each of {len(codes)} codes")
    lengths = codes.square().sum(1)
    found = []
    for start in range(0, len(codes), _ROWS):
        rows = codes[start : start + _ROWS]
        distances = lengths[start : start + _ROWS, None] + lengths - 2 * rows @ codes.T
        own = torch.arange(len(rows))
        distances[own, start + own] = torch.inf
        found.append(distances.topk(count, largest=False).indices)
    return torch.cat(found)


def perturb(codes: Tensor, neighbours: Tensor, share: float, seed: int, samples: Tensor) -> Tensor:
    """int64 [B, N]: round(share x N) codes of each image, each replaced by one of its neighbours, all equally likely.

    Which positions and which neighbours is a hash of (seed, sample, position): independent of batch and ranks.

    codes: int64 [B, N].
    neighbours: int64 [K, k], see ``nearest_codes``.
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
