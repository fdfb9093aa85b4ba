"""Several tokenizers compared: scores that cost no GPT, what a small GPT made of each, and how well the two agree."""

import math
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import numpy as np

from llamagen_dist.evaluation.correlation import rank_correlation

BETTER = {
    "psnr": "higher",
    "ssim": "higher",
    "ssim_llamagen": "higher",
    "lpips": "lower",
    "lpips-hed": "lower",
    "lpips-custom": "lower",
    "rfid": "lower",
    "pfid": "lower",
    "codebook_usage": "higher",
    "codebook_perplexity": "higher",
    "bits_per_pixel": "lower",
    "entropy_bits_per_pixel": "lower",
}
"""Scores of a tokenizer alone, with the direction that is usually called better."""


def rates(codes: int, perplexity: float, tokens: int, image_size: int) -> dict[str, float]:
    """Bits per pixel: of the tokens as numbers of one length, and of a code that knows how often each occurs.

    codes: of the codebook. perplexity: see ``Quantizer.health``. tokens: per image. image_size: pixels along a side.
    """
    density = tokens / image_size**2
    return {
        "bits_per_pixel": density * math.log2(codes),
        "entropy_bits_per_pixel": density * math.log2(max(perplexity, 1.0)),
    }


def probe(seeds: Mapping[int, Mapping[str, float]]) -> dict[str, Any]:
    """What the probe says of one tokenizer: the mean FID over its seeds, and their deviation where there are several.

    seeds: seed -> fid, and whatever else was measured.
    """
    fids = [one["fid"] for one in seeds.values()]
    return {
        "fid": float(np.mean(fids)),
        "fid_sd": float(np.std(fids, ddof=1)) if len(fids) > 1 else None,
        "seeds": {str(seed): dict(one) for seed, one in seeds.items()},
    }


def agreement(tokenizers: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Score -> how it orders the tokenizers against the FID of their probes.

    Signs are turned so that +1 is one order of both: the better score, the lower FID. A score that a tokenizer lacks,
    that is the same for all, or that has fewer than three tokenizers is left out; so is everything without a probe.
    """
    measured = [one for one in tokenizers.values() if one.get("probe")]
    found: dict[str, Any] = {}
    for score, better in BETTER.items():
        values = [one.get(score) for one in measured]
        if None in values:
            continue
        sign = 1.0 if better == "lower" else -1.0
        known = rank_correlation(
            [sign * float(v) for v in values if v is not None], [o["probe"]["fid"] for o in measured]
        )
        if known is not None:
            found[score] = {"better": better, **asdict(known)}
    return found


def noise_share(tokenizers: Mapping[str, Mapping[str, Any]]) -> float | None:
    """Of the variance of single probes' FIDs the share that lies between the seeds of one tokenizer, 0 to 1.

    None with fewer than two seeds or tokenizers: then nobody knows. Near 1 the order of the probes is chance.
    """
    groups = [[one["fid"] for one in t["probe"]["seeds"].values()] for t in tokenizers.values() if t.get("probe")]
    if len(groups) < 2 or any(len(group) < 2 for group in groups):
        return None
    within = float(np.mean([np.var(group, ddof=1) for group in groups]))
    # the variance of the tokenizers' means also has the noise of the seeds in it
    between = max(0.0, float(np.var([np.mean(g) for g in groups], ddof=1)) - within / len(groups[0]))
    return within / (within + between) if within + between else None
