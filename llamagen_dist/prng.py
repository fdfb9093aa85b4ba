"""Every random number of the project: a hash of (seed, purpose, sample, position).

Nothing here has state, so there is nothing to save: the data order, crop choice, label dropout, dropout masks and
sampling noise of a run are the same on any number of ranks and after any resume. The mixing function is the
32-bit "lowbias32" finaliser (two odd multipliers, three xor-shifts), in int32 arithmetic that torch.compile fuses.
Golden values in tests/unit/test_prng.py fix it: a change would silently reorder every old run.
"""

import zlib
from functools import lru_cache

import torch
from torch import Tensor

_MULTIPLIER_1 = 0x7FEB352D
_MULTIPLIER_2 = 0x846CA68B - (1 << 32)  # as a signed 32-bit number


def mix(x: Tensor) -> Tensor:
    """The bijection of 32-bit integers at the bottom of everything. x: int32, any shape."""
    x = x ^ ((x >> 16) & 0xFFFF)  # >> is arithmetic on int32: mask the sign bits away
    x = x * _MULTIPLIER_1
    x = x ^ ((x >> 15) & 0x1FFFF)
    x = x * _MULTIPLIER_2
    return x ^ ((x >> 16) & 0xFFFF)


def _halves(value: int | Tensor) -> tuple[Tensor, Tensor]:
    """Low and high 32 bits of a 64-bit integer (or tensor of them) as int32."""
    wide = torch.as_tensor(value, dtype=torch.int64)
    low = ((wide + (1 << 31)) & 0xFFFFFFFF) - (1 << 31)
    return low.to(torch.int32), (wide >> 32).to(torch.int32)


def mix_(x: Tensor, scratch: Tensor) -> Tensor:
    """``mix`` in place, without allocating anything, which is what takes the time on large tensors.

    x: int32, any shape.
    scratch: memory of x's shape and type, overwritten.
    """
    for shift, mask, multiplier in ((16, 0xFFFF, _MULTIPLIER_1), (15, 0x1FFFF, _MULTIPLIER_2)):
        torch.bitwise_right_shift(x, shift, out=scratch)
        x.bitwise_xor_(scratch.bitwise_and_(mask)).mul_(multiplier)
    torch.bitwise_right_shift(x, 16, out=scratch)
    return x.bitwise_xor_(scratch.bitwise_and_(0xFFFF))


@lru_cache(maxsize=1024)
def _purpose_number(purpose: str) -> int:
    number = zlib.crc32(purpose.encode())
    return number - (1 << 32) if number >= 1 << 31 else number


def stream(seed: int, purpose: str, sample: int | Tensor = 0) -> Tensor:
    """The int32 key of one random stream per ``sample`` (a global sample number; int64 tensor of any shape)."""
    sample = torch.as_tensor(sample, dtype=torch.int64)
    seed_low, seed_high = _halves(seed)
    low, high = _halves(sample)
    device = sample.device
    key = mix(mix(seed_low.to(device) ^ _purpose_number(purpose)) ^ seed_high.to(device))
    return mix(mix(key ^ low) ^ high)


def bits32(keys: Tensor, position: int | Tensor) -> Tensor:
    """Random int32 at ``position`` (0 … 2^32) of the streams ``keys``; the two broadcast."""
    low, _ = _halves(position)
    return mix(mix(low.to(keys.device)) ^ keys)


def bits(seed: int, purpose: str, sample: int | Tensor, position: int | Tensor = 0) -> Tensor:
    """Uniform uint32 for every (sample, position) pair; ``sample`` and ``position`` broadcast."""
    return bits32(stream(seed, purpose, sample), position).view(torch.uint32)


def uniform(seed: int, purpose: str, sample: int | Tensor, position: int | Tensor = 0) -> Tensor:
    """float32 in [0, 1), 24 random bits each."""
    raw = bits32(stream(seed, purpose, sample), position)
    return ((raw >> 8) & 0xFFFFFF).to(torch.float32) * (1.0 / (1 << 24))


def integers(seed: int, purpose: str, sample: int | Tensor, high: int, position: int | Tensor = 0) -> Tensor:
    """int64 in [0, high), high <= 2^31; the bias of the multiply-shift is below high / 2^32."""
    raw = bits32(stream(seed, purpose, sample), position).to(torch.int64) & 0xFFFFFFFF
    return (raw * high) >> 32
