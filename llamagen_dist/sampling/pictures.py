"""From labels or histograms to pictures: what the evaluation's sets are made of."""

from collections.abc import Iterable
from dataclasses import asdict, dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from llamagen_dist.data.tokens import TokenReader
from llamagen_dist.errors import UserError
from llamagen_dist.models.gpt import GPT, Condition
from llamagen_dist.models.vq import VQModel, to_uint8
from llamagen_dist.sampling.draw import draw, noise_streams
from llamagen_dist.sampling.guidance import Schedule, guidance_scales
from llamagen_dist.sampling.sampler import Steps, generate

BATCH = 32  # pictures at once where no config says it
_BLOCK = 4096  # samples of a token shard counted at once


@dataclass(frozen=True)
class Settings:
    """How codes are drawn: what ``sampler.generate`` takes under these names. Raises ValueError."""

    cfg_scale: float = 1.0
    cfg_interval: int = -1
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    guidance: Schedule = "constant"
    guidance_power: float = 2.75
    guidance_start: float = 0.18
    beta: float | None = None
    window: int = 1
    first_tokens: int | None = None

    def __post_init__(self) -> None:
        guidance_scales(
            1, self.cfg_scale, self.guidance, self.cfg_interval, self.guidance_power, self.guidance_start
        )  # raises ValueError where that is no guidance
        if self.beta is not None and not 0 < self.beta <= 1:
            raise ValueError(f"beta {self.beta}")
        if self.window < 1 or (self.first_tokens or 1) < 1:
            raise ValueError(f"window {self.window}, first_tokens {self.first_tokens}")


def sample_seeds(seed: int | Tensor, numbers: Tensor) -> Tensor:
    """One seed per sample number (int64, below 2^32); no two samples of a run share a noise stream."""
    return (seed << 32) + numbers


def model_tokens(
    model: GPT, condition: Condition, seeds: Tensor, settings: Settings, steps: Steps | None = None
) -> Tensor:
    """(B, N) int64 from the GPT. seeds: (B,) int64. steps: see ``generate``."""
    device = model.rotary.device
    moved = (condition[0].to(device), condition[1].to(device)) if isinstance(condition, tuple) else condition.to(device)
    return generate(model, moved, seeds=seeds, steps=steps, **asdict(settings))


def untrained_tokens(vocab_size: int, image_tokens: int, seeds: Tensor) -> Tensor:
    """(B, N) int64: exactly what ``generate`` draws from a GPT with LlamaGen's initial weights.

    Their head is zero, so every logit is zero whatever the label, the guidance and the codes so far, and the layers
    below it need not be run. (top-p and temperature 0 are left out here: from equally likely codes they would choose
    arbitrary ones. top-k keeps ties, so it would change nothing.)
    """
    return _independent(torch.zeros(len(seeds), vocab_size), image_tokens, seeds)


def unigram_tokens(histogram: Tensor, image_tokens: int, seeds: Tensor) -> Tensor:
    """(B, N) int64, each code drawn for itself from ``histogram`` (int64 [V], counts)."""
    return _independent(histogram.double().log().expand(len(seeds), -1), image_tokens, seeds)


def _independent(logits: Tensor, image_tokens: int, seeds: Tensor) -> Tensor:
    streams = noise_streams(seeds)
    return torch.stack([draw(logits, streams, position, 1.0, 0, 1.0) for position in range(image_tokens)], dim=1)


def code_counts(reader: TokenReader, shards: Iterable[int]) -> Tensor:
    """int64 [V]: how often every code occurs in these shards (by number), over all their crops."""
    counts = np.zeros(reader.vocab_size, np.int64)
    for shard in shards:
        end = int(reader.shards.ends[shard])
        start = end - reader.shards.manifest.shards[shard].samples
        for first in range(start, end, _BLOCK):
            samples = np.arange(first, min(first + _BLOCK, end))
            for crop in range(reader.crops):
                tokens = reader.codes(samples, np.full(len(samples), crop))
                counts += np.bincount(tokens.ravel(), minlength=reader.vocab_size)
    return torch.from_numpy(counts)


def decode_tokens(tokenizer: VQModel, tokens: Tensor, lengths: Tensor | None = None) -> NDArray[np.uint8]:
    """tokens (B, N) int64, in raster order of a square or a prefix -> uint8 [B, S, S, 3], rounded as LlamaGen does.

    lengths: int64 (B,), how many tokens of each prefix are looked at; None: all.
    Raises UserError where the tokenizer gives NaN or infinity, which would look like a black or a white pixel.
    """
    return checked_pixels(*decoded(tokenizer, tokens, lengths))


def decoded(tokenizer: VQModel, tokens: Tensor, lengths: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """As ``decode_tokens``, on the tokenizer's device and without waiting for it: (pixels, all finite: 0-d bool)."""
    codes = tokens.view(-1, *tokenizer.config.arranged(tokens.shape[1])).to(tokenizer.device)
    images = tokenizer.decode(codes, lengths)
    return to_uint8(images).permute(0, 2, 3, 1).contiguous(), torch.isfinite(images).all()


def checked_pixels(pixels: Tensor, finite: Tensor) -> NDArray[np.uint8]:
    """The pixels of ``decoded`` on the host. Raises UserError, see ``decode_tokens``."""
    if not bool(finite):
        raise UserError("the tokenizer decodes to values that are NaN or infinite: its training diverged")
    found: NDArray[np.uint8] = pixels.cpu().numpy()
    return found
