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
    # Each round replaces one half by its xor with a hash of the other, which can be undone: so every round, and the
    # whole, is a bijection whatever the hash is. The halves take turns, so they need not be equally wide.
    for number, key in enumerate(keys):
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
    sample = _permuted(flat - epoch * count, count, prng.stream(seed, "order", epoch))
    return epoch.reshape(shape), sample.reshape(shape)


def _permuted(indices: Tensor, count: int, stream: Tensor) -> Tensor:
    """A permutation of 0 … count - 1 for every key. indices: int64 [n] in it; stream: int32 [n], the keys."""
    if count <= _SORTED_UP_TO:
        hashes = prng.bits32(stream[:, None], torch.arange(count))
        return hashes.argsort(dim=1, stable=True).gather(1, indices[:, None])[:, 0]
    bits = (count - 1).bit_length()
    keys = [prng.bits32(stream, number) for number in range(_ROUNDS)]
    permuted = _feistel(indices, keys, bits)
    outside = (permuted >= count).nonzero()[:, 0]
    # Cycle walking: a value outside is permuted again until it is back inside. That keeps the bijection, and ends,
    # because the cycle that an index inside lies on comes back to it; more than half are back at every pass.
    while outside.numel():
        again = _feistel(permuted[outside], [key[outside] for key in keys], bits)
        permuted[outside] = again
        outside = outside[again >= count]
    return permuted


class Windows:
    """An order that stays within a few shards at a time, for storage where reading here and there is slow.

    Every epoch puts the shards in an order of its own and cuts that into windows of ``shards`` shards; the samples of a
    window come in random order, then those of the next one. A pure function of (seed, position) as the order over the
    whole set is. sizes: int64 [S], the samples of each shard.
    """

    def __init__(self, sizes: NDArray[np.int64], shards: int, seed: int) -> None:
        self._sizes, self._count = torch.from_numpy(sizes), int(sizes.sum())
        self._shards, self._seed = shards, seed
        self._epochs: dict[int, tuple[Tensor, Tensor, Tensor]] = {}

    def samples(self, positions: Tensor) -> Tensor:
        """int64 [n]: the samples at these positions. positions: int64 [n], >= 0."""
        epoch = positions // self._count
        samples = torch.empty_like(positions)
        for number in epoch.unique().tolist():
            chosen = epoch == number
            samples[chosen] = self._of_epoch(number, positions[chosen] - number * self._count)
        return samples

    def window(self, position: int) -> tuple[list[int], int, int]:
        """The shards of the window that a position lies in, its first position and the one after its last."""
        epoch, index = divmod(position, self._count)
        starts, ends, firsts = self._shard_order(epoch)
        first = int(torch.searchsorted(ends, index, right=True)) // self._shards * self._shards
        last = min(first + self._shards, len(ends)) - 1
        numbers = torch.searchsorted(self._sizes.cumsum(0), firsts[first : last + 1], right=True)
        filled = ends[first : last + 1] > starts[first : last + 1]
        begin = epoch * self._count
        return numbers[filled].tolist(), begin + int(starts[first]), begin + int(ends[last])

    def _of_epoch(self, epoch: int, indices: Tensor) -> Tensor:
        starts, ends, firsts = self._shard_order(epoch)
        window_of = torch.searchsorted(ends, indices, right=True) // self._shards
        inside = torch.empty_like(indices)
        keys = prng.stream(self._seed, "window order", epoch)
        for window in window_of.unique().tolist():
            chosen = window_of == window
            start = int(starts[window * self._shards])
            end = int(ends[min((window + 1) * self._shards, len(ends)) - 1])
            rows = indices[chosen] - start
            inside[chosen] = start + _permuted(rows, end - start, prng.bits32(keys, window).expand(len(rows)))
        shard = torch.searchsorted(ends, inside, right=True)
        return firsts[shard] + inside - starts[shard]

    def _shard_order(self, epoch: int) -> tuple[Tensor, Tensor, Tensor]:
        """(first index, index after the last, number of the first sample) of each shard, in the epoch's order."""
        if epoch not in self._epochs:
            count = len(self._sizes)
            keys = prng.stream(self._seed, "shard order", epoch)
            order = _permuted(torch.arange(count), count, keys.expand(count))
            sizes = self._sizes[order]
            ends = sizes.cumsum(0)
            firsts = (self._sizes.cumsum(0) - self._sizes)[order]
            self._epochs = {key: value for key, value in self._epochs.items() if key == epoch - 1}
            self._epochs[epoch] = (ends - sizes, ends, firsts)
        return self._epochs[epoch]


class PositionCache:
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
    """The samples of consecutive positions, computed a block ahead (about 1 µs a position).

    count: samples in the data set. sizes: int64 [S], the samples of each of its shards, which are needed where
    ``window_shards`` > 0: then the order is that of ``Windows``, else ``position_to_sample``'s over the whole set.
    """

    def __init__(
        self,
        count: int,
        seed: int,
        block: int = 4096,
        sizes: NDArray[np.int64] | None = None,
        window_shards: int = 0,
    ) -> None:
        self.at: Callable[[Tensor], Tensor] = partial(_samples, count, seed)  # picklable, for decoding processes
        self.windows: Windows | None = None
        if window_shards:
            assert sizes is not None
            assert int(sizes.sum()) == count
            self.windows = Windows(sizes, window_shards, seed)
            self.at = self.windows.samples
            block = min(block, max(count, 64))  # every window takes a call, and a small set has many in a block
        self._samples = PositionCache(self.at, block)

    def samples(self, start: int, length: int) -> Tensor:
        """int64 [length]: the samples at positions ``start`` … ``start + length - 1``."""
        return self._samples.at(start, length)
