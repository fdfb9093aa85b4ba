"""The global data order: a keyed permutation per (seed, epoch), computed, never stored.

Position p of a run belongs to epoch ``p // count``; within the epoch a Feistel network over the smallest
power of two that holds ``count``, followed by cycle walking, maps ``p % count`` to a sample. Both are
bijections, so every epoch visits each sample exactly once, and a data set of 10^9 samples costs no memory:
the state of a resumed run is one integer, and any number of ranks can cut up the same global batch. (Luby and
Rackoff 1988 for the network; Black and Rogaway 2002 for cycle walking.)
"""

from collections.abc import Callable
from functools import partial
from typing import overload

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from llamagen_dist import prng

_ROUNDS = 6  # each half is rewritten three times
_SORTED_UP_TO = 64  # so few samples are sorted by a hash: the network would reach few of their permutations


def _feistel(x: Tensor, keys: list[Tensor], bits: int) -> Tensor:
    """One pass of the network. x: int64 [n] in [0, 2^bits); keys: int32 [n] per round."""
    low_bits = bits // 2
    low_mask, high_mask = (1 << low_bits) - 1, (1 << (bits - low_bits)) - 1
    low, high = x & low_mask, x >> low_bits
    for number, key in enumerate(keys):  # the halves take turns, so they need not be equally wide
        if number % 2:
            low = low ^ (prng.bits32(key, high).to(torch.int64) & low_mask)
        else:
            high = high ^ (prng.bits32(key, low).to(torch.int64) & high_mask)
    return (high << low_bits) | low


@overload
def position_to_sample(positions: Tensor, count: int, seed: int) -> tuple[Tensor, Tensor]: ...
@overload
def position_to_sample(
    positions: NDArray[np.int64], count: int, seed: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]: ...
def position_to_sample(
    positions: Tensor | NDArray[np.int64], count: int, seed: int
) -> tuple[Tensor, Tensor] | tuple[NDArray[np.int64], NDArray[np.int64]]:
    """(epoch, sample) of global positions, in the type that came in.

    positions: int64, any shape, >= 0. count: samples in the data set, 1 … 2^62. Both results have the shape
    of ``positions``. Raises ValueError for a count or position outside these bounds.
    """
    if not 1 <= count <= 1 << 62:
        raise ValueError(f"count must lie in 1 … 2^62, not {count}")
    if isinstance(positions, np.ndarray):
        epoch, sample = position_to_sample(torch.from_numpy(np.ascontiguousarray(positions, np.int64)), count, seed)
        return epoch.numpy(), sample.numpy()
    shape, flat = positions.shape, positions.reshape(-1).to(torch.int64)
    if flat.numel() and int(flat.min()) < 0:
        raise ValueError("positions count from 0")
    epoch = flat // count
    sample = flat - epoch * count
    stream = prng.stream(seed, "order", epoch)
    if count <= _SORTED_UP_TO:
        hashes = prng.bits32(stream[:, None], torch.arange(count))
        return epoch.reshape(shape), hashes.argsort(dim=1, stable=True).gather(1, sample[:, None]).reshape(shape)
    bits = (count - 1).bit_length()
    keys = [prng.bits32(stream, number) for number in range(_ROUNDS)]
    sample = _feistel(sample, keys, bits)
    outside = (sample >= count).nonzero()[:, 0]
    while outside.numel():  # walk the cycle until it is back inside; more than half do so at every pass
        walked = _feistel(sample[outside], [key[outside] for key in keys], bits)
        sample[outside] = walked
        outside = outside[walked >= count]
    return epoch.reshape(shape), sample.reshape(shape)


class Ahead:
    """A function of positions, computed a block of consecutive ones at a time: many small calls become one large.

    compute: int64 positions [n] -> tensor [n].
    """

    def __init__(self, compute: Callable[[Tensor], Tensor], block: int = 4096) -> None:
        self._compute, self._block_size = compute, block
        self._blocks: dict[int, Tensor] = {}

    def at(self, start: int, length: int) -> Tensor:
        """[length]: the values at positions ``start`` … ``start + length - 1``."""
        size = self._block_size
        first, last = start // size, (start + max(length, 1) - 1) // size
        self._blocks = {number: self._block(number) for number in range(first, last + 1)}
        offset = start - first * size
        return torch.cat(list(self._blocks.values()))[offset : offset + length]

    def _block(self, number: int) -> Tensor:
        if number in self._blocks:
            return self._blocks[number]
        return self._compute(torch.arange(number * self._block_size, (number + 1) * self._block_size))


def _samples(count: int, seed: int, positions: Tensor) -> Tensor:
    return position_to_sample(positions, count, seed)[1]


class Order:
    """``position_to_sample`` for consecutive positions, computed a block ahead (about 1 µs a position)."""

    def __init__(self, count: int, seed: int, block: int = 4096) -> None:
        self._ahead = Ahead(partial(_samples, count, seed), block)  # picklable, for decoding processes

    def samples(self, start: int, length: int) -> Tensor:
        """int64 [length]: the samples at positions ``start`` … ``start + length - 1``."""
        return self._ahead.at(start, length)
