"""The codebook while it is trained: where its codes start, which are in use, what becomes of those that are not."""

from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from llamagen_dist import prng
from llamagen_dist.config import TokenizerConfigFile
from llamagen_dist.models.fixed_codebooks import Digits
from llamagen_dist.models.learned_codebooks import fixed_sums
from llamagen_dist.models.quantizer import Quantizer, VectorQuantizer, code_histogram
from llamagen_dist.parallel.entries import TensorEntry, replicated
from llamagen_dist.parallel.topology import Topology

KMEANS_ROUNDS = 10


@torch.no_grad()
def kmeans(quantizer: VectorQuantizer, rows: Tensor) -> None:
    """Lloyd's rounds from the codes as they are: each goes to the mean of the rows that choose it, if there are any.

    rows: fp32 (N, C), prepared, the same on all ranks. Sums are exact, so the result does not depend on their order.
    """
    every = torch.arange(quantizer.codebook_size, device=rows.device)
    for _ in range(KMEANS_ROUNDS):
        sums, counts = fixed_sums(rows, quantizer.nearest(rows), len(every))
        centres = (sums / counts.clamp(min=1)[:, None]).float()
        if quantizer.l2_norm:
            centres = F.normalize(centres, dim=-1)
        quantizer.replace(every, torch.where(counts[:, None] > 0, centres, quantizer.codes_as_vectors()))


def perturbation(config: TokenizerConfigFile, quantizer: Quantizer, first: int) -> Callable[[Tensor], Tensor] | None:
    """Codes int64 (B, h, w) -> those with near ones in the place of some; None where that is off.

    first: position of the batch's first image in the run. What is exchanged, and for which neighbour, follows from the
    seed and the positions of image and token alone.
    """
    section, seed = config.codebook, config.train.seed
    if not section.perturb_share:
        return None

    def exchange(codes: Tensor) -> Tensor:
        image, token = torch.arange(first, first + len(codes))[:, None], torch.arange(codes[0].numel())
        chosen = prng.uniform(seed, "perturbed token", image, token) < section.perturb_tokens
        chosen &= prng.uniform(seed, "perturbed image", image) < section.perturb_share
        which = prng.integers(seed, "perturbation", image, section.perturb_neighbours, token)[chosen]
        where = chosen.flatten().nonzero().flatten().to(codes.device)  # on the host, which need not wait for a GPU
        flat = codes.flatten().clone()
        near = quantizer.neighbours(flat[where], section.perturb_neighbours)
        flat[where] = near.gather(1, which[:, None].to(codes.device)).squeeze(1)
        return flat.view_as(codes)

    return exchange


def flat_map(vectors: NDArray[np.float32]) -> tuple[NDArray[np.float32], NDArray[np.float64]]:
    """The two directions in which vectors [K, C] vary most: positions [K, 2], and the share of the variance of each.

    ValueError for vectors that are not finite.
    """
    if not np.isfinite(vectors).all():
        raise ValueError("vectors are not finite")
    centred = vectors.astype(np.float64) - vectors.mean(0, dtype=np.float64)
    variances, axes = np.linalg.eigh(centred.T @ centred / len(vectors))
    axes, variances = axes[:, ::-1][:, :2], variances[::-1].clip(0)
    # an axis and its opposite are the same one: its largest number is positive
    axes = axes * np.where(np.take_along_axis(axes, np.abs(axes).argmax(0)[None], 0) < 0, -1.0, 1.0)
    flat, shares = centred @ axes, variances[:2] / max(variances.sum(), np.finfo(np.float64).tiny)
    missing = 2 - flat.shape[1]  # of a codebook of one channel
    return np.pad(flat, ((0, 0), (0, missing))).astype(np.float32), np.pad(shares, (0, missing))


class CodebookHealth:
    """Exact counts of the codes that all ranks used, with an all-reduce only where they are looked at.

    They are in checkpoints, so a resumed run logs and revives what the uninterrupted one would. Without
    ``codebook.statistics`` and ``revive_after_steps`` nothing is counted or saved.

    say: prints a line once, on rank 0.
    """

    def __init__(
        self, config: TokenizerConfigFile, topology: Topology, quantizer: Quantizer, say: Callable[[str], None]
    ) -> None:
        self.section, self.seed, self.topology = config.codebook, config.train.seed, topology
        self.quantizer, self.say = quantizer, say
        self.on = self.section.statistics or self.section.revive_after_steps > 0
        self.warned = False
        self.looked: dict[str, NDArray[Any]] = {}
        """For the report, of the last validation, on rank 0: ``counts`` int64 [K] of the held-out images' codes. Of a
        table of codes ``map`` float32 [K, 2] and ``explained`` float64 [2], see ``flat_map``; of others ``levels``
        int64 [C], how many each channel has (code = sum_c digit_c x the product of the levels before c)."""
        zeros = torch.zeros(quantizer.codebook_size, dtype=torch.int64, device=topology.device)
        self.mine = zeros  # this rank's since they were last added up; the others are equal on all ranks
        self.since_line, self.since_revival = zeros.clone(), zeros.clone()
        self.revived = torch.zeros(1, dtype=torch.int64, device=topology.device)

    def count(self, codes: Tensor) -> None:
        """This rank's codes of one micro-batch."""
        if self.on:
            self.mine += code_histogram(codes, len(self.mine))

    def tensors(self) -> list[Tensor]:
        return [self.mine, self.since_line, self.since_revival, self.revived]

    def entries(self) -> list[TensorEntry]:
        """For a checkpoint (collective)."""
        if not self.on:
            return []
        self._add_up()
        return [replicated("codebook", n, getattr(self, n)) for n in ("since_line", "since_revival", "revived")]

    def _add_up(self) -> None:
        total = self.topology.sum(self.mine)
        self.since_line += total
        self.since_revival += total
        self.mine.zero_()

    @torch.no_grad()
    def revive(self, step: int, rows: Callable[[], Tensor]) -> Tensor | None:
        """At every ``revive_after_steps``-th step, put codes that none of them used on latents (collective).

        rows: fp32 (N, C), those of the global batch, prepared. Which ones follows from their positions in it and the
        step. Returns the codes that moved, int64; None elsewhere.
        """
        if not self.section.revive_after_steps or step % self.section.revive_after_steps:
            return None
        self._add_up()
        unused = (self.since_revival == 0).nonzero().flatten()
        self.since_revival.zero_()
        if not len(unused):
            return None
        latents = rows()
        order = prng.uniform(self.seed, "codebook revival", torch.arange(len(latents)), step).argsort(stable=True)
        moved = unused[: len(latents)]  # of more codes than latents the rest waits for the next time
        self.quantizer.replace(moved, latents[order[: len(moved)].to(latents.device)])
        self.revived += len(moved)
        return moved

    def line(self, step: int) -> Mapping[str, Tensor]:
        """What the training line of this step says, of the steps since the last (collective); empty when off."""
        if not self.section.statistics:
            return {}
        self._add_up()
        measures = self.quantizer.health(self.since_line)
        self._warn(step, float(measures["usage"]), float(measures["perplexity"]), int(self.since_line.sum()))
        line = {f"train_{name}": value for name, value in measures.items()}
        if self.section.revive_after_steps:
            line["revived"] = self.revived[0].clone()
        self.since_line.zero_()
        self.revived.zero_()
        return line

    def look(self, counts: Tensor) -> None:
        """Fill ``looked``. counts: int64 (K,), of all ranks."""
        if self.topology.rank:
            return
        self.looked = {"counts": counts.cpu().numpy()}
        if isinstance(self.quantizer, Digits):
            self.looked["levels"] = self.quantizer.levels.cpu().numpy()
        elif isinstance(self.quantizer, VectorQuantizer):
            vectors = self.quantizer.codes_as_vectors().detach().cpu().numpy()
            with suppress(ValueError):  # validation has said more of such weights
                self.looked["map"], self.looked["explained"] = flat_map(vectors)

    def _warn(self, step: int, usage: float, perplexity: float, tokens: int) -> None:
        """Once per collapse: not again before both are above their limits."""
        codes, section = len(self.mine), self.section
        most = min(codes, tokens)  # so few tokens cannot use more
        low = usage * codes < section.warn_below_usage * most or perplexity < section.warn_below_perplexity * most
        if low and not self.warned:
            self.say(
                f"tokenizer: step {step}: the codebook collapses: the last {tokens:,} tokens used {usage:.1%} of "
                f"{codes:,} codes, as evenly as {perplexity:,.0f} would be; tokenizer_training/README.md: what helps"
            )
        self.warned = low
