"""Two other ways to train a table of codes: moving averages (VQ-VAE-2), and a gradient through the choice (IBQ)."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from llamagen_dist.models.quantizer import SEARCH_ELEMENTS, VectorQuantizer, VQLosses, search

FIXED_POINT = float(1 << 32)
"""Latents are summed as integers of this fraction: exactly, so in any order, batch and number of ranks alike."""
SMOOTHING = 1e-5
IBQ_BETA = 0.25


def fixed_point(rows: Tensor, codes: Tensor, into: Tensor) -> None:
    """Add each row, and 1 for it, to its code's sum: fp32 (N, C), int64 (N,), int64 (K, C + 1) in FIXED_POINT."""
    into.index_add_(0, codes, (F.pad(rows, (0, 1), value=1.0).double() * FIXED_POINT).round().long())


def fixed_sums(rows: Tensor, codes: Tensor, codebook_size: int) -> tuple[Tensor, Tensor]:
    """(sums float64 (K, C), counts float64 (K,)) of the rows of every code."""
    total = torch.zeros(codebook_size, rows.shape[-1] + 1, dtype=torch.int64, device=rows.device)
    fixed_point(rows, codes, total)
    return total[:, :-1].double() / FIXED_POINT, total[:, -1].double() / FIXED_POINT


class EMAQuantizer(VectorQuantizer):
    """Every code is the moving average of the latents that chose it (arXiv 1906.00446, appendix A.1).

    count_k <- d count_k + (1 - d) n_k, sum_k <- d sum_k + (1 - d) (sum of the n_k latents), code_k = sum_k / count_k,
    the counts smoothed after Laplace: (count + 1e-5) / (total + K 1e-5) x total. n and the sums are a whole step's,
    over all micro-batches and ranks (``pending``, ``absorb``). A new code weighs as one latent.
    """

    kind = "ema"
    losses = ("commit", "entropy")
    ema_count: Tensor
    ema_sum: Tensor

    def __init__(self, codebook_size: int, codebook_dim: int, l2_norm: bool, decay: float) -> None:
        super().__init__(codebook_size, codebook_dim, l2_norm, signature="ema")
        self.decay = decay
        self.embedding.requires_grad_(False)
        self.register_buffer("ema_count", torch.ones(codebook_size))
        self.register_buffer("ema_sum", self.embedding.weight.detach().clone())
        pending = torch.zeros(codebook_size, codebook_dim + 1, dtype=torch.int64)
        self.register_buffer("pending", pending, persistent=False)

    def forward(self, latents: Tensor, entropy: bool = False) -> tuple[Tensor, VQLosses, Tensor]:
        quantised, losses, codes = super().forward(latents, entropy)
        if self.training and self.pending is not None:
            rows = self.prepare(latents.detach()).reshape(-1, self.codebook_dim)
            fixed_point(rows, codes.flatten(), self.pending)
        return quantised, losses._replace(vq=None), codes

    @torch.no_grad()
    def absorb(self, total: Tensor) -> None:
        values = total.double() / FIXED_POINT
        self.ema_sum.mul_(self.decay).add_(((1 - self.decay) * values[:, :-1]).float())
        self.ema_count.mul_(self.decay).add_(((1 - self.decay) * values[:, -1]).float())
        n = self.ema_count.sum()
        count = (self.ema_count + SMOOTHING) / (n + self.codebook_size * SMOOTHING) * n
        codes = self.ema_sum / count[:, None]
        self.embedding.weight.copy_(F.normalize(codes, dim=-1) if self.l2_norm else codes)

    @torch.no_grad()
    def replace(self, index: Tensor, vectors: Tensor) -> None:
        super().replace(index, vectors)
        self.ema_sum[index], self.ema_count[index] = vectors, 1.0

    def health(self, histogram: Tensor) -> dict[str, Tensor]:
        """Also ``starved``: the share of codes whose moving count is below a hundredth of the average."""
        starved = self.ema_count < 0.01 * self.ema_count.mean()
        return {**super().health(histogram), "starved": starved.double().mean()}


class _Choose(torch.autograd.Function):
    """The chosen code of every row, with the gradient of the softmax over all codes in place of the choice's.

    quantised = (onehot + p - sg p) E, p = softmax(z E^T). The backward pass forms p again, in pieces, so that no
    rows x codes matrix is kept.
    """

    @staticmethod
    def forward(ctx: Any, rows: Tensor, codes: Tensor, index: Tensor) -> Tensor:
        ctx.save_for_backward(rows, codes, index)
        return codes[index]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
        rows, codes, index = ctx.saved_tensors
        of_codes = torch.zeros_like(codes).index_add_(0, index, gradient)
        of_rows = []
        piece = max(1, SEARCH_ELEMENTS // len(codes))
        for z, g in zip(rows.split(piece), gradient.split(piece), strict=True):
            p = (z @ codes.t()).softmax(-1)
            through = g @ codes.t()  # dL/dp; then through the softmax: p (dL/dp - sum_k p_k dL/dp_k)
            of_logits = through.sub_((p * through).sum(-1, keepdim=True)).mul_(p)
            of_rows.append(of_logits @ codes)
            # the soft one-hot's own share, p^T g - sg(p)^T g, is zero
            of_codes.addmm_(of_logits.t(), z)
        return torch.cat(of_rows), of_codes, None


class IndexBackpropagationQuantizer(VectorQuantizer):
    """The code of the largest dot product; the gradient goes through a softmax over all codes (arXiv 2412.02692).

    vq = mean((q - z)^2) + 0.25 mean((E[k] - sg z)^2), where q carries that gradient; commit = mean((sg E[k] - z)^2).
    The paper's loss is their sum: ``loss.codebook_weight: 1`` and ``commitment_weight: 1``, with an entropy loss.
    """

    kind = "ibq"

    def __init__(self, codebook_size: int, codebook_dim: int, l2_norm: bool) -> None:
        super().__init__(codebook_size, codebook_dim, l2_norm, signature="ibq")

    @torch.no_grad()
    def nearest(self, rows: Tensor) -> Tensor:
        return search(rows, self.codes_as_vectors(), None)

    def forward(self, latents: Tensor, entropy: bool = False) -> tuple[Tensor, VQLosses, Tensor]:
        with torch.autocast(latents.device.type, enabled=False):
            z = self.prepare(latents)
            flat, codes = z.reshape(-1, self.codebook_dim), self.codes_as_vectors()
            index = self.nearest(flat.detach())
            hard = F.embedding(index, codes)
            quantised: Tensor = _Choose.apply(flat, codes, index)
            losses = VQLosses(
                vq=F.mse_loss(quantised, flat) + IBQ_BETA * F.mse_loss(hard, flat.detach()),
                commit=F.mse_loss(flat, hard.detach()),
                entropy=self.entropy(flat) if entropy else None,
            )
            return quantised.view_as(z).permute(0, 3, 1, 2), losses, index.view(z.shape[:-1])
