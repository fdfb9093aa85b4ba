"""Quantizers without a table: every channel of a latent is rounded by itself (FSQ, iFSQ, LFQ)."""

from collections.abc import Sequence
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from llamagen_dist.models.quantizer import Quantizer, VQLosses, mean_difference

BOUND = 1e-3
"""How far bounded values stay inside the outermost levels, so that rounding never leaves them (arXiv 2309.15505)."""


class Digits(Quantizer):
    """Codes as numbers of mixed radix: channel c has levels[c] digits, channel 0 is the least significant."""

    levels: Tensor

    def __init__(self, levels: Sequence[int], signature: str) -> None:
        super().__init__(signature)
        self.register_buffer("levels", torch.tensor(levels, dtype=torch.int64))
        self.codebook_size, self.codebook_dim = 1, len(levels)
        for count in levels:
            self.codebook_size *= count

    def to_codes(self, digits: Tensor) -> Tensor:
        """int64 (..., C), each in 0 ... levels[c] - 1 -> int64 (...)."""
        return (digits * (self.levels.cumprod(0) // self.levels)).sum(-1)

    def to_digits(self, codes: Tensor) -> Tensor:
        """int64 (...) -> int64 (..., C)."""
        return codes[..., None] // (self.levels.cumprod(0) // self.levels) % self.levels

    def values(self, digits: Tensor) -> Tensor:
        """The decoder's numbers for digits: int64 (..., C) -> fp32 (..., C) in [-1, 1]."""
        raise NotImplementedError

    def lookup(self, codes: Tensor) -> Tensor:
        return self.values(self.to_digits(codes)).permute(0, 3, 1, 2)

    def health(self, histogram: Tensor) -> dict[str, Tensor]:
        """Also ``narrowest``: the channel whose levels are used least, as perplexity by number of levels, in (0, 1]."""
        digits = self.to_digits(torch.arange(self.codebook_size, device=histogram.device))
        shares = []
        for channel in range(self.codebook_dim):
            counts = torch.zeros(int(self.levels.max()), dtype=torch.float64, device=histogram.device)
            counts.index_add_(0, digits[:, channel], histogram.double())
            perplexity = torch.special.entr(counts / counts.sum().clamp(min=1)).sum().exp()
            shares.append(perplexity / self.levels[channel])
        return {**super().health(histogram), "narrowest": torch.stack(shares).min()}


class FSQ(Digits):
    """Finite scalar quantisation: tanh bounds every channel, rounding picks its level (arXiv 2309.15505).

    y = tanh(slope z + s) h - o, h = (L - 1)(1 - 1e-3) / 2, with o = 1/2 and s = tan(o / h) for even L (else 0), so that
    an even number of levels lies half a step lower and z = 0 stays near 0. The decoder gets round(y) / floor(L / 2).
    The gradient passes the rounding as if it were not there. There are no losses.
    """

    kind = "fsq"
    slope: ClassVar[float] = 1.0

    def __init__(self, levels: Sequence[int]) -> None:
        super().__init__(levels, f"{self.kind} {','.join(map(str, levels))}")

    def bounded(self, rows: Tensor) -> Tensor:
        """fp32 (..., C) -> fp32 (..., C), within half a step of the levels round(y)."""
        half = (self.levels - 1).float() * ((1 - BOUND) / 2)
        offset = 0.5 - 0.5 * (self.levels % 2).float()
        return torch.tanh(self.slope * rows + torch.tan(offset / half)) * half - offset

    @torch.no_grad()
    def nearest(self, rows: Tensor) -> Tensor:
        with torch.autocast(rows.device.type, enabled=False):
            return self.to_codes(self.bounded(rows).round().long() + self.levels // 2)

    def values(self, digits: Tensor) -> Tensor:
        return (digits - self.levels // 2).float() / (self.levels // 2).float()

    def forward(self, latents: Tensor, entropy: bool = False) -> tuple[Tensor, VQLosses, Tensor]:
        with torch.autocast(latents.device.type, enabled=False):
            y = self.bounded(self.prepare(latents))
            level = y.detach().round()
            quantised = (y + (level - y).detach()) / (self.levels // 2).float()
            codes = self.to_codes(level.long() + self.levels // 2)
            return quantised.permute(0, 3, 1, 2), VQLosses(None, None, None), codes


class IFSQ(FSQ):
    """FSQ with 2 sigmoid(1.6 x) - 1 = tanh(0.8 x) for tanh(x): of normal latents it uses all levels more alike."""

    kind = "ifsq"
    slope = 0.8


class LFQ(Digits):
    """Lookup-free quantisation: the sign of every channel is one bit of the code (arXiv 2310.05737, section 3).

    Without its entropy loss the bits tend to collapse. commit = mean((z - sign z)^2).

    groups: the batch entropy is summed over so many groups of bits.
    """

    kind = "lfq"
    losses = ("commit", "entropy")

    def __init__(self, bits: int, groups: int = 1) -> None:
        super().__init__([2] * bits, "lfq")
        self.groups = groups

    @torch.no_grad()
    def nearest(self, rows: Tensor) -> Tensor:
        return self.to_codes((rows >= 0).long())

    def values(self, digits: Tensor) -> Tensor:
        return (2 * digits - 1).float()

    def forward(self, latents: Tensor, entropy: bool = False) -> tuple[Tensor, VQLosses, Tensor]:
        with torch.autocast(latents.device.type, enabled=False):
            z = self.prepare(latents)
            codes = self.nearest(z)
            sign = self.values(self.to_digits(codes))
            losses = VQLosses(
                vq=None,
                commit=F.mse_loss(z, sign),
                entropy=self.entropy(z.reshape(-1, self.codebook_dim)) if entropy else None,
            )
            return (z + (sign - z).detach()).permute(0, 3, 1, 2), losses, codes

    def entropy(self, rows: Tensor) -> Tensor:
        """sum over groups of mean_n H(p_n) - H(mean_n p_n), in nats; p_n = softmax_c(-|z_n - c|^2 / temperature).

        rows: fp32 (N, C). One group is the exact value over all 2^C codes. Since p_n is a product over the bits, the
        first term is the same for any grouping, and a group of g bits needs N x 2^g numbers.
        """
        logits = 4 * rows / self.temperature  # |z + 1|^2 - |z - 1|^2 = 4 z
        total = rows.new_zeros(())
        for group in logits.tensor_split(self.groups, dim=-1):
            log_p = rows.new_zeros(len(rows), 1)
            for bit in group.unbind(-1):
                log_p = torch.cat([log_p + F.logsigmoid(-bit)[:, None], log_p + F.logsigmoid(bit)[:, None]], 1)
            total = total + mean_difference(log_p.exp(), log_p, self)
        return total
