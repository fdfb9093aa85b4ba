"""What every quantizer offers, and LlamaGen's: nearest vector, straight-through gradient (paper section 2.2)."""

import math
from typing import ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SEARCH_ELEMENTS = 1 << 22
"""Largest similarity matrix (rows x codes) of one step of the code search: 16 MiB in fp32."""
ENTROPY_TEMPERATURE = 0.01
USED_BUFFER = 65536
SIGNATURE = "quantize.signature"
"""In the weights of every quantizer but LlamaGen's: its name and options as ASCII bytes."""
STATE = tuple(f"quantize.{name}" for name in ("codebook_used", "signature", "levels", "ema_count", "ema_sum"))
"""Tensors of a quantizer that are saved and are no parameters."""


class VQLosses(NamedTuple):
    """Unweighted means, 0-d fp32; None where the quantizer has no such loss.

    vq pulls the codes to the latents, commit the latents to the codes. entropy (the mean entropy of one latent's code
    distribution minus the entropy of the mean distribution) is None unless asked for: for a table of codes it needs a
    tokens x codes matrix with a gradient.
    """

    vq: Tensor | None
    commit: Tensor | None
    entropy: Tensor | None


def alone(mean: Tensor) -> Tensor:
    """The mean over all ranks where there is one rank."""
    return mean


def search(rows: Tensor, codes: Tensor, bias: Tensor | None) -> Tensor:
    """argmax_k (z.e_k + bias_k) of every row: fp32 (N, C), (K, C), (K,) -> int64 (N,).

    The rows go through in pieces, so the N x K matrix never exists whole.
    """
    with torch.autocast(rows.device.type, enabled=False):  # in bf16 near ties go to the wrong code
        piece = max(1, SEARCH_ELEMENTS // len(codes))
        return torch.cat([F.linear(part, codes, bias).argmax(-1) for part in rows.split(piece)])


class Quantizer(nn.Module):
    """What the autoencoder, training, extraction and export know of a quantizer.

    Latents are (B, C, h, w) of any float type, codes int64 (B, h, w) below ``codebook_size``; in between rows are fp32
    (N, C). All of it runs in fp32, under autocast too.

    kind: its name in the config.
    losses: which of VQLosses it has.
    learned: whether its codes are a table of vectors that can be put elsewhere (``replace``).
    signature: ASCII bytes in its weights (SIGNATURE); LlamaGen's has none.
    rank_mean: the mean over all ranks of this rank's mean, with this rank's gradient; set by who knows the ranks.
    pending: what this rank has collected since the last ``absorb``, to be summed over the ranks; None: nothing.
    """

    kind: ClassVar[str]
    losses: ClassVar[tuple[str, ...]] = ()
    learned: ClassVar[bool] = False
    codebook_size: int
    codebook_dim: int
    pending: Tensor | None
    temperature = ENTROPY_TEMPERATURE

    def __init__(self, signature: str = "") -> None:
        super().__init__()
        self.rank_mean = alone
        self.register_buffer("pending", None, persistent=False)
        if signature:
            self.register_buffer("signature", torch.tensor(list(signature.encode("ascii")), dtype=torch.uint8))

    @property
    def bits(self) -> float:
        """Bits of one code at most."""
        return math.log2(self.codebook_size)

    def prepare(self, latents: Tensor) -> Tensor:
        """(B, C, h, w) of any float type -> fp32 (B, h, w, C), as ``nearest`` compares them."""
        return latents.float().permute(0, 2, 3, 1)

    def nearest(self, rows: Tensor) -> Tensor:
        """The code of every row: fp32 (N, C), prepared -> int64 (N,)."""
        raise NotImplementedError

    def lookup(self, codes: Tensor) -> Tensor:
        """int64 (B, h, w) -> fp32 (B, C, h, w)."""
        raise NotImplementedError

    def forward(self, latents: Tensor, entropy: bool = False) -> tuple[Tensor, VQLosses, Tensor]:
        """(B, C, h, w) -> (quantised fp32 (B, C, h, w), losses, codes int64 (B, h, w))."""
        raise NotImplementedError

    @torch.no_grad()
    def neighbours(self, codes: Tensor, count: int) -> Tensor:
        """The ``count`` nearest other codes of each, by distance of the decoder's vectors: int64 (n,) -> (n, count)."""
        every = torch.arange(self.codebook_size, device=codes.device)
        table = self.lookup(every.view(1, -1, 1))[0, :, :, 0].t().contiguous()
        bias, nearest = -0.5 * table.square().sum(-1), [codes.new_empty(0, count)]
        with torch.autocast(table.device.type, enabled=False):
            for part in codes.split(max(1, SEARCH_ELEMENTS // self.codebook_size)):
                near = F.linear(table[part], table, bias).scatter_(1, part[:, None], -math.inf)
                nearest.append(near.topk(count, dim=-1).indices)
        return torch.cat(nearest)

    def absorb(self, total: Tensor) -> None:
        """End of a step: use the sum over all ranks of their ``pending``, which the caller then sets to zero."""

    def replace(self, index: Tensor, vectors: Tensor) -> None:
        """Put the codes int64 (n,) on prepared rows fp32 (n, C)."""
        raise NotImplementedError(f"{self.kind} has no table of codes")

    def health(self, histogram: Tensor) -> dict[str, Tensor]:
        """Measures of how often each code occurred, int64 (K,): 0-d float64 by name.

        usage: the share of codes that occurred. perplexity: exp of the histogram's entropy in nats, the number of codes
        that would do if all were used alike; both 0 where nothing was counted.
        """
        share = histogram.double() / histogram.sum().clamp(min=1)
        perplexity = torch.special.entr(share).sum().exp() * (histogram.sum() > 0)
        return {"usage": (histogram > 0).double().mean(), "perplexity": perplexity}


def mean_difference(p: Tensor, log_p: Tensor, quantizer: Quantizer) -> Tensor:
    """mean_n H(p_n) - H(mean_n p_n), in nats; p: (N, K) and its logarithm. The second mean is over all ranks."""
    mean = quantizer.rank_mean(p.mean(0))
    # p log p from log_softmax, which is finite where p underflows; the mean has no such form, hence 1e-5 (LlamaGen)
    return -(p * log_p).sum(-1).mean() + (mean * (mean + 1e-5).log()).sum()


class VectorQuantizer(Quantizer):
    """Replaces every latent vector by its nearest code.

    With ``l2_norm`` latents and codes are both divided by their length first, so nearest means largest dot
    product. All of it runs in fp32, under autocast too: in bf16 one token in twenty gets another code.
    """

    kind = "vq"
    losses: ClassVar[tuple[str, ...]] = ("vq", "commit", "entropy")
    learned = True
    codebook_used: Tensor

    def __init__(self, codebook_size: int, codebook_dim: int, l2_norm: bool, signature: str = "") -> None:
        super().__init__(signature and signature + (", l2_norm" if l2_norm else ""))
        self.codebook_size, self.codebook_dim, self.l2_norm = codebook_size, codebook_dim, l2_norm
        self.embedding = nn.Embedding(codebook_size, codebook_dim)
        with torch.no_grad():
            weight = torch.empty(codebook_size, codebook_dim).uniform_(-1.0 / codebook_size, 1.0 / codebook_size)
            self.embedding.weight.copy_(F.normalize(weight, dim=-1) if l2_norm else weight)
        # LlamaGen's checkpoints hold this record of the last 65,536 codes. It is kept so that they load
        # strictly and is neither read nor written: code_histogram counts usage exactly, over all ranks.
        if not signature:
            self.register_buffer("codebook_used", torch.zeros(USED_BUFFER))

    def codes_as_vectors(self) -> Tensor:
        """The codebook as it is compared and decoded: fp32 (K, C), unit rows if ``l2_norm``."""
        weight = self.embedding.weight.float()
        return F.normalize(weight, dim=-1) if self.l2_norm else weight

    def prepare(self, latents: Tensor) -> Tensor:
        """(B, C, h, w) of any float type -> fp32 (B, h, w, C), unit vectors if ``l2_norm``."""
        rows = latents.float().permute(0, 2, 3, 1)
        return F.normalize(rows, dim=-1) if self.l2_norm else rows

    @torch.no_grad()
    def nearest(self, rows: Tensor) -> Tensor:
        """Index of the nearest code of every row: fp32 (N, C), prepared -> int64 (N,).

        argmin |z - e|^2 = argmax (z.e - |e|^2 / 2); unit codes need z.e only.
        """
        codes = self.codes_as_vectors()
        return search(rows, codes, None if self.l2_norm else -0.5 * codes.square().sum(-1))

    def lookup(self, codes: Tensor) -> Tensor:
        """int64 (B, h, w) -> fp32 (B, C, h, w)."""
        return F.embedding(codes, self.codes_as_vectors()).permute(0, 3, 1, 2)

    def forward(self, latents: Tensor, entropy: bool = False) -> tuple[Tensor, VQLosses, Tensor]:
        """(B, C, h, w) -> (quantised fp32 (B, C, h, w), losses, codes int64 (B, h, w)).

        The gradient of the quantised latents goes straight through to the (normalised) latents.
        """
        with torch.autocast(latents.device.type, enabled=False):
            z = self.prepare(latents)
            flat = z.reshape(-1, self.codebook_dim)
            index = self.nearest(flat.detach())
            quantised = F.embedding(index, self.codes_as_vectors()).view_as(z)
            losses = VQLosses(
                vq=F.mse_loss(quantised, z.detach()),
                commit=F.mse_loss(z, quantised.detach()),
                entropy=self.entropy(flat) if entropy else None,
            )
            # the value is quantised, to rounding; the gradient is z's alone, since argmin has none
            straight = z + (quantised - z).detach()
            return straight.permute(0, 3, 1, 2), losses, index.view(z.shape[:-1])

    def entropy(self, rows: Tensor) -> Tensor:
        """mean_n H(p_n) - H(mean_n p_n), in nats; p_n = softmax_k(-|z_n - e_k|^2 / temperature).

        rows: fp32 (N, C), prepared. Both means are over one micro-batch, of all ranks.
        """
        codes = self.codes_as_vectors()
        # |z - e|^2 = |z|^2 + |e|^2 - 2 z.e, so that the N x K distances are one matrix product
        distance = rows.square().sum(-1, keepdim=True) + codes.square().sum(-1) - 2 * rows @ codes.t()
        log_p = F.log_softmax(-distance / self.temperature, dim=-1)
        return mean_difference(log_p.exp(), log_p, self)

    @torch.no_grad()
    def replace(self, index: Tensor, vectors: Tensor) -> None:
        self.embedding.weight[index] = vectors


def code_histogram(codes: Tensor, codebook_size: int) -> Tensor:
    """How often each code occurs: int64 (K,). Histograms add up over batches and ranks, so usage is exact."""
    counts = torch.zeros(codebook_size, dtype=torch.int64, device=codes.device)
    # not torch.bincount, for which a GPU's host has to wait; integers add up to the same in any order
    return counts.index_add_(0, codes.reshape(-1), torch.ones_like(codes.reshape(-1)))
