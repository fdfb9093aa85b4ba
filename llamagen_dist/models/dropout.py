"""Dropout whose masks are a function of (seed, global sample, site, element), so that no layout can change them.

One 32-bit hash (llamagen_dist.prng) serves two neighbouring elements with 16 bits each, so probabilities are whole
multiples of 2^-16; what is kept is scaled by the probability really used.
"""

from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from torch import Tensor

from llamagen_dist import prng

LEVELS = 1 << 16


@dataclass(frozen=True)
class Randomness:
    """The dropout of one forward pass. Immutable: recomputation and compilation see the same masks.

    Sites are numbers: ``layer(n)`` has keys of its own, in which ``site`` tells the dropouts of one layer apart.

    keys: int32 (B,), one per sample.
    first: the position, in the whole sequence, of the first row that is dropped from (a sequence-parallel rank holds
        a part).
    """

    keys: Tensor
    first: int = 0

    def at(self, first: int) -> "Randomness":
        """The same masks seen from row ``first`` on."""
        return replace(self, first=first)

    def layer(self, number: int) -> "Randomness":
        return replace(self, keys=self._site_keys(4 * (number + 1)))

    def _site_keys(self, site: int) -> Tensor:
        # an odd multiplier spreads neighbouring sites before they are mixed; masked to fit into int32
        return prng.mix(self.keys ^ ((site + 1) * 0x632BE5AB & 0x7FFFFFFF))

    def kept(self, x: Tensor, p: float, site: int) -> Tensor:
        """int8 of x's shape (B, S, dim), dim even: 0 where x is dropped, else 1.

        Element x[b, s, d] has the number (first + s) x dim + d, whatever part of the sequence x is. The three branches
        below give the same mask.
        """
        _, rows, dim = x.shape
        keys, begin, count = self._site_keys(site).view(-1, 1), self.first * dim // 2, rows * dim // 2
        # an element's bits are half of a 32-bit hash: that of (number / 2), alike for all samples and so made once,
        # mixed with the sample's key
        last = threshold(p) - LEVELS // 2 - 1  # the 16 bits are compared as signed numbers: up to this one is dropped
        if torch.compiler.is_compiling():  # one fused loop, without memory; the other branch needs few passes instead
            numbers = torch.arange(2 * begin, 2 * (begin + count), dtype=torch.int32, device=x.device)
            raw = prng.mix(prng.mix(numbers >> 1) ^ keys)
            # the lower 16 bits for even elements, the upper for odd: the order of two int16 in an int32 of this machine
            half = torch.where((numbers & 1) == 1, raw >> 16, (raw << 16) >> 16)
            return (half > last).view(x.shape).to(torch.int8)
        hashed = _hashed_numbers(begin, count, x.device)
        if x.device.type != "cpu":
            return (prng.mix(hashed ^ keys).view(torch.int16) > last).view(x.shape).to(torch.int8)
        kept = torch.empty(x.shape, dtype=torch.int8, device=x.device)
        raw, scratch = torch.empty_like(hashed), torch.empty_like(hashed)
        halves = raw.view(torch.int16)
        for sample, key in zip(kept.view(len(keys), -1), keys.flatten().tolist(), strict=True):  # stays in the cache
            torch.bitwise_xor(hashed, key, out=raw)
            prng.mix_(raw, scratch)
            sample.copy_(halves.clamp_(last, last + 1).sub_(last))  # several times as fast as a comparison, as bool
        return kept

    def dropout(self, x: Tensor, p: float, site: int) -> Tensor:
        """x (B, S, dim) with elements dropped with probability p and the others scaled up."""
        if threshold(p) == 0:
            return x
        return x * self.kept(x, p, site) * scale(p)

    def add_dropped(self, x: Tensor, y: Tensor, p: float, site: int) -> Tensor:
        """x + dropout(y)."""
        if threshold(p) == 0:
            return x + y
        return torch.add(x, y * self.kept(y, p, site), alpha=scale(p))

    def drop_path(self, x: Tensor, p: float, site: int) -> Tensor:
        """x (B, …) with whole samples dropped with probability p and the others scaled up."""
        if threshold(p) == 0:
            return x
        raw = (self._site_keys(site) >> 16) + LEVELS // 2
        return torch.where((raw >= threshold(p)).view(-1, *(1,) * (x.dim() - 1)), x * scale(p), 0.0)

    def attention_dropout(self, probabilities: Tensor, p: float, site: int, first_head: int) -> Tensor:
        """probabilities (B, heads, S, S): elements numbered by (head in the whole model, query, key)."""
        _, heads, rows, columns = probabilities.shape
        begin = first_head * rows * columns
        numbers = torch.arange(begin, begin + heads * rows * columns, dtype=torch.int32, device=probabilities.device)
        raw = prng.mix(prng.mix(numbers) ^ self._site_keys(site).view(-1, 1)).view(probabilities.shape)
        return torch.where((raw >> 16) + LEVELS // 2 >= threshold(p), probabilities * scale(p), 0.0)


def threshold(p: float) -> int:
    """How many of the 2^16 levels are dropped."""
    return round(p * LEVELS)


def scale(p: float) -> float:
    """What is kept is multiplied by this."""
    return LEVELS / (LEVELS - threshold(p))


@lru_cache(maxsize=4)
def _hashed_numbers(begin: int, count: int, device: torch.device) -> Tensor:
    """The first round of the hash, which is the same for every sample, site and step. int32 (count,)."""
    return prng.mix(torch.arange(begin, begin + count, dtype=torch.int32, device=device))
