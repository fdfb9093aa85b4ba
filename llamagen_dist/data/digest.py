"""One number for a set of samples, to check that a run saw each of them as often as it should.

The digest is the sum, modulo 2^64, of a 64-bit hash of every sample's number in the data set. Sums do not care about
order and add up: over micro-batches, ranks, steps and resumes. So after k whole epochs a run's digest is k times that
of the data set; a sample that was left out or shown twice changes it.
"""

import torch
from torch import Tensor

from llamagen_dist import prng


def digest(samples: Tensor) -> Tensor:
    """int64 () that stands for the unsigned sum. samples: int64, any shape."""
    stream = prng.stream(0, "digest", samples)
    high, low = (prng.bits32(stream, half).to(torch.int64) for half in (0, 1))
    return ((high << 32) | (low & 0xFFFFFFFF)).sum()


def text(value: Tensor | int) -> str:
    """16 hexadecimal digits, as in metrics.jsonl and state.json."""
    return f"{int(value) & (1 << 64) - 1:016x}"


def number(text: str) -> int:
    """The int64 that ``text`` wrote."""
    value = int(text, 16)
    return value - (1 << 64) if value >= 1 << 63 else value
