"""The codebook: nearest vector, straight-through gradient, the losses that train it (paper section 2.2)."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SEARCH_ELEMENTS = 1 << 22
"""Largest similarity matrix (rows x codes) of one step of the code search: 16 MiB in fp32."""
ENTROPY_TEMPERATURE = 0.01
USED_BUFFER = 65536


class VQLosses(NamedTuple):
    """Unweighted means, 0-d fp32. vq pulls the codes to the latents, commit the latents to the codes.

    entropy (the mean entropy of one latent's code distribution minus the entropy of the mean distribution) is
    None unless asked for: it is the only one that needs a tokens x codes matrix with a gradient.
    """

    vq: Tensor
    commit: Tensor
    entropy: Tensor | None


class VectorQuantizer(nn.Module):
    """Replaces every latent vector by its nearest code.

    With ``l2_norm`` latents and codes are both divided by their length first, so nearest means largest dot
    product. All of it runs in fp32, under autocast too: in bf16 one token in twenty gets another code.
    """

    codebook_used: Tensor

    def __init__(self, codebook_size: int, codebook_dim: int, l2_norm: bool) -> None:
        super().__init__()
        self.codebook_size, self.codebook_dim, self.l2_norm = codebook_size, codebook_dim, l2_norm
        self.embedding = nn.Embedding(codebook_size, codebook_dim)
        with torch.no_grad():
            weight = torch.empty(codebook_size, codebook_dim).uniform_(-1.0 / codebook_size, 1.0 / codebook_size)
            self.embedding.weight.copy_(F.normalize(weight, dim=-1) if l2_norm else weight)
        # LlamaGen's checkpoints hold this record of the last 65,536 codes. It is kept so that they load
        # strictly and is neither read nor written: code_histogram counts usage exactly, over all ranks.
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

        argmin |z - e|^2 = argmax (z.e - |e|^2 / 2); unit codes need z.e only. The rows go through in pieces,
        so the N x K matrix never exists whole.
        """
        with torch.autocast(rows.device.type, enabled=False):  # in bf16 near ties go to the wrong code
            codes = self.codes_as_vectors()
            bias = None if self.l2_norm else -0.5 * codes.square().sum(-1)
            piece = max(1, SEARCH_ELEMENTS // self.codebook_size)
            return torch.cat([F.linear(part, codes, bias).argmax(-1) for part in rows.split(piece)])

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
        """mean_n H(p_n) - H(mean_n p_n), in nats; p_n = softmax_k(-|z_n - e_k|^2 / 0.01).

        rows: fp32 (N, C), prepared. Both means are over the rows of this call, one micro-batch of one rank.
        """
        codes = self.codes_as_vectors()
        # |z - e|^2 = |z|^2 + |e|^2 - 2 z.e, so that the N x K distances are one matrix product
        distance = rows.square().sum(-1, keepdim=True) + codes.square().sum(-1) - 2 * rows @ codes.t()
        log_p = F.log_softmax(-distance / ENTROPY_TEMPERATURE, dim=-1)
        p = log_p.exp()
        mean = p.mean(0)
        # p log p from log_softmax, which is finite where p underflows; the mean has no such form, hence 1e-5 (LlamaGen)
        return -(p * log_p).sum(-1).mean() + (mean * (mean + 1e-5).log()).sum()


def code_histogram(codes: Tensor, codebook_size: int) -> Tensor:
    """How often each code occurs: int64 (K,). Histograms add up over batches and ranks, so usage is exact."""
    return torch.bincount(codes.reshape(-1), minlength=codebook_size)
