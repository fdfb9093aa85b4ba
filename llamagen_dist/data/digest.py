"""One number for a set of samples, to check that a run saw each of them as often as it should.

The digest is the sum, modulo 2^64, of a 64-bit hash of every sample's number in the data set. Sums do not care about
order and add up: over micro-batches, ranks, steps and resumes. So after k whole epochs a run's digest is k times that
of the data set, and ``expected`` tells it for any other position; a sample that was left out or shown twice changes it.
"""

import torch
from torch import Tensor

from llamagen_dist import prng
from llamagen_dist.data.order import Order

_CHUNK = 1 << 18


def digest(samples: Tensor) -> Tensor:
    """int64 () that stands for the unsigned sum. samples: int64, any shape."""
    stream = prng.stream(0, "digest", samples)
    high, low = (prng.bits32(stream, place).to(torch.int64) for place in (0, 1))
    return ((high << 32) | (low & 0xFFFFFFFF)).sum()


def expected(order: Order, images_seen: int, first: int = 0) -> Tensor:
    """The digest of what positions ``first`` … ``images_seen`` - 1 of a run in this order show.

    It does not depend on the batch size or the number of ranks. About 2 µs a position.
    """
    total = torch.zeros((), dtype=torch.int64)
    for start in range(first, images_seen, _CHUNK):
        total += digest(order.at(torch.arange(start, min(start + _CHUNK, images_seen))))
    return total


def text(value: Tensor | int) -> str:
    """16 hexadecimal digits, as in metrics.jsonl and state.json."""
    return f"{int(value) & (1 << 64) - 1:016x}"


def number(text: str) -> int:
    """The int64 that ``text`` wrote."""
    value = int(text, 16)
    return value - (1 << 64) if value >= 1 << 63 else value
