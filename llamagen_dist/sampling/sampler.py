"""Image tokens from a GPT: classifier-free guidance, top-k, top-p, and noise that belongs to the sample.

The order of operations is LlamaGen's (paper section 2.3 and its released sampler): guidance on fp32 logits, then
temperature, then top-k with ties kept, then top-p, then a draw (sampling/draw.py).

Two loops draw the same tokens. The plain one draws a token per forward pass. Speculative decoding draws up to a window
of them: with the noise of every position fixed by the sample's seed, an image is a function of its condition, and a
token is right as soon as those before it are. One pass over a window of guesses gives what follows each of them; the
tokens up to the first guess that was wrong, and the one in its stead, are those of the plain loop, and what was drawn
behind is the next guess (a fixed-point, or Jacobi, iteration). Nothing is accepted that the plain loop would not have
drawn, so the distribution is the same too, guidance, top-k and top-p included. As with another batch shape, matrix
products of another shape round differently, which can tip a draw between two codes that are all but equal.

All images have the same length, so a batch of the plain loop ends together: there is nothing to refill before that,
and a picture depends on its seed and the shape of its batch alone.
"""

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from llamagen_dist.models.cache import Cache
from llamagen_dist.models.gpt import GPT, Condition
from llamagen_dist.sampling.draw import draw, noise_streams
from llamagen_dist.sampling.guidance import guidance_scales, misguided


class Steps(Protocol):
    """A GPT's forward passes; see ``GPT``, and ``compiled.CompiledSteps``."""

    def prefill(self, condition: Condition, spare: int = 0, *, beta: Tensor | None = None) -> tuple[Tensor, Cache]: ...
    def decode(self, tokens: Tensor, cache: Cache) -> Tensor: ...
    def decode_window(self, tokens: Tensor, first: Tensor, end: int, cache: Cache) -> Tensor: ...


Draw = Callable[[Tensor, Tensor, int | Tensor], Tensor]  # (logits (B, V), streams (B,), position) -> codes (B,)


@torch.no_grad()
def generate(
    model: GPT,
    condition: Condition,
    *,
    cfg_scale: float = 1.0,
    cfg_interval: int = -1,
    guidance: str = "constant",
    guidance_power: float = 2.75,
    guidance_start: float = 0.18,
    beta: float | None = None,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    window: int = 1,
    first_tokens: int | None = None,
    seeds: Tensor | None = None,
    steps: Steps | None = None,
) -> Tensor:
    """Draw (B, N) int64 image tokens in raster order, or (B, first_tokens).

    condition: labels (B,) int64, or (features (B, T, C) left-padded, mask (B, T) bool).
    cfg_scale: guided = null + cfg_scale x (conditional - null), for values above 1; otherwise conditional only.
    cfg_interval, guidance, guidance_power, guidance_start: how that scale changes along the image; see
        ``guidance_scales``. The null half is not computed any more once all that follows is conditional only.
    beta: of a model with ``guidance: free``, in (0, 1]: guidance with scale 1 / beta in one pass; None: 1.
    temperature: 0 takes the likeliest code.
    top_k: 0 keeps all codes.
    top_p: 1 keeps all codes.
    window: tokens per forward pass at most; above 1, speculative decoding.
    first_tokens: stop after so many, of prefix tokens; they are those that an image of all N begins with.
    seeds: (B,) int64, one per sample (default 0 … B-1).
    steps: how the model computes; None: eagerly, by itself.

    Raises ValueError for numbers outside these ranges, and for a guidance that is not the model's (``misguided``).
    """
    if temperature < 0 or top_k < 0 or not 0 < top_p <= 1 or window < 1:
        raise ValueError(f"temperature {temperature}, top_k {top_k}, top_p {top_p}, window {window}")
    if (reason := misguided(model.config, cfg_scale, beta)) is not None:
        raise ValueError(reason)
    count = model.config.image_tokens
    if first_tokens is not None and not 1 <= first_tokens <= count:
        raise ValueError(f"first_tokens {first_tokens}: an image has {count}")
    scales = guidance_scales(count, cfg_scale, guidance, cfg_interval, guidance_power, guidance_start)[:first_tokens]
    batch = len(condition[0] if isinstance(condition, tuple) else condition)
    streams = noise_streams(torch.arange(batch) if seeds is None else seeds).to(model.rotary.device)

    def drawn(logits: Tensor, streams: Tensor, position: int | Tensor) -> Tensor:
        return draw(logits, streams, position, temperature, top_k, top_p)

    guided = any(scale > 1 for scale in scales)
    steps = model if steps is None else steps
    betas = None if beta is None else torch.full((batch,), beta, device=model.rotary.device)
    conditions = _with_null(model, condition) if guided else condition
    logits, cache = steps.prefill(conditions, spare=window - 1, beta=betas)
    first = drawn(_guide(logits, batch, scales[0]), streams, 0)
    loop = _one_by_one if window == 1 else _in_windows
    return loop(steps, cache, first, scales, streams, drawn, window)


def _one_by_one(
    model: Steps, cache: Cache, first: Tensor, scales: list[float], streams: Tensor, drawn: Draw, window: int
) -> Tensor:
    """The plain loop. first: (B,), the first tokens."""
    batch, guided_until = len(first), _guided_until(scales)
    tokens = first.new_empty(batch, len(scales))
    tokens[:, 0] = first
    for position in range(1, len(scales)):
        if position == guided_until:
            cache.keep(batch)
        last = tokens[:, position - 1]
        logits = model.decode(torch.cat([last, last]) if position < guided_until else last, cache)
        tokens[:, position] = drawn(_guide(logits, batch, scales[position]), streams, position)
    return tokens


def _in_windows(
    model: Steps, cache: Cache, first: Tensor, scales: list[float], streams: Tensor, drawn: Draw, window: int
) -> Tensor:
    """Speculative decoding. first: (B,), the first tokens."""
    batch, count, guided_until = len(first), len(scales), _guided_until(scales)
    # Windows reach behind the image's end at last; what is drawn there is cut off. A guess to begin with: the token
    # before it.
    tokens = first[:, None].repeat(1, count + window)
    scale_at = torch.tensor(scales + scales[-1:] * window, device=first.device)
    right = torch.ones_like(first)  # tokens of each sample that are those of the plain loop
    guided = guided_until > 0
    while (least := int(right.min())) < count:
        if guided and least >= guided_until:
            guided = False
            cache.keep(batch)
        # the newest right token, and guesses; a sample that is complete computes its last window again
        start = right.clamp(max=count - 1) - 1
        at = start[:, None] + torch.arange(window, device=first.device)
        fed = tokens.gather(1, at)
        both = (torch.cat([fed, fed]), torch.cat([start, start])) if guided else (fed, start)
        logits = model.decode_window(*both, int(start.max()) + window, cache)
        scores = _guide(logits, batch, scale_at[at + 1][..., None])
        found = drawn(
            scores.flatten(0, 1), streams.repeat_interleave(window), (at + 1).clamp(max=count - 1).flatten()
        ).view(batch, window)
        tokens.scatter_(1, at + 1, found)
        right = start + 1 + confirmed(fed, found)
        beyond = torch.arange(tokens.shape[1], device=first.device) > start[:, None] + window
        tokens = torch.where(beyond, found[:, -1:], tokens)
        right = right.clamp(max=count)
    return tokens[:, :count]


def confirmed(fed: Tensor, found: Tensor) -> Tensor:
    """(B,): how many of a window's draws are right.

    fed: (B, W), a right token and guesses.
    found: (B, W), the draws behind each. The first is right; each further one is if all guesses before it were.
    """
    return 1 + (fed[:, 1:] == found[:, :-1]).long().cumprod(dim=1).sum(dim=1)


def _guided_until(scales: list[float]) -> int:
    """The first position from which on all are conditional only."""
    return max((position + 1 for position, scale in enumerate(scales) if scale > 1), default=0)


def _guide(logits: Tensor, batch: int, scale: float | Tensor) -> Tensor:
    """(B, …, V) fp32 from the conditional half and, where there is one, the null half."""
    scores = logits.float()
    if len(scores) == batch:
        return scores
    conditional, null = scores.chunk(2)
    if isinstance(scale, float):  # 1 is exactly the conditional logits
        return null + scale * (conditional - null) if scale > 1 else conditional
    return torch.where(scale > 1, null + scale * (conditional - null), conditional)


def _with_null(model: GPT, condition: Condition) -> Condition:
    """The batch doubled: the condition, then the null class or null caption."""
    null = model.null_condition(condition)
    if isinstance(condition, tuple) and isinstance(null, tuple):
        return torch.cat([condition[0], null[0]]), torch.cat([condition[1], null[1]])
    assert isinstance(condition, Tensor)
    assert isinstance(null, Tensor)
    return torch.cat([condition, null])
