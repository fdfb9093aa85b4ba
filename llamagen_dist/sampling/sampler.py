"""Image tokens from a GPT: classifier-free guidance, top-k, top-p, and noise that belongs to the sample.

The order of operations is LlamaGen's (paper section 2.3 and its released sampler): guidance on fp32 logits, then
temperature, then top-k with ties kept, then top-p, then a draw. The draw is the argmax of logits plus Gumbel noise
hashed from (the sample's seed, token position, code), so a picture does not depend on its position in a batch, on the
number of ranks or on where a run was cut off.
"""

import torch
from torch import Tensor

from llamagen_dist import prng
from llamagen_dist.models.gpt import GPT, Condition

LEAST_TEMPERATURE = 1e-5  # LlamaGen's; an exact 0 is greedy here


@torch.no_grad()
def generate(
    model: GPT,
    condition: Condition,
    *,
    cfg_scale: float = 1.0,
    cfg_interval: int = -1,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seeds: Tensor | None = None,
) -> Tensor:
    """Draw (B, N) int64 image tokens in raster order.

    condition: labels (B,) int64, or (features (B, T, C) left-padded, mask (B, T) bool).
    cfg_scale: guided = null + cfg_scale x (conditional - null), for values above 1; otherwise conditional only.
    cfg_interval: -1 guides every token; k >= 0 guides the first k + 2 (the first one, and decoding steps 0 … k), after
    which the null half is not computed any more. temperature: 0 takes the likeliest code. top_k: 0 keeps all codes.
    top_p: 1 keeps all codes. seeds: (B,) int64, one per sample (default 0 … B-1).
    Raises ValueError for numbers outside these ranges.
    """
    if temperature < 0 or top_k < 0 or not 0 < top_p <= 1 or cfg_interval < -1:
        raise ValueError(f"temperature {temperature}, top_k {top_k}, top_p {top_p}, cfg_interval {cfg_interval}")
    batch = len(condition[0] if isinstance(condition, tuple) else condition)
    device = model.rotary.device
    streams = noise_streams(torch.arange(batch) if seeds is None else seeds).to(device)
    guided = cfg_scale > 1
    logits, cache = model.prefill(_with_null(model, condition) if guided else condition)
    tokens = torch.empty(batch, model.config.image_tokens, dtype=torch.int64, device=device)
    for position in range(model.config.image_tokens):
        if position > 0:
            if guided and 0 <= cfg_interval < position - 1:
                guided = False
                cache.keep(batch)
            last = tokens[:, position - 1]
            logits = model.decode(torch.cat([last, last]) if guided else last, cache)
        scores = logits.float()
        if guided:
            conditional, null = scores.chunk(2)
            scores = null + cfg_scale * (conditional - null)
        tokens[:, position] = draw(scores, streams, position, temperature, top_k, top_p)
    return tokens


def _with_null(model: GPT, condition: Condition) -> Condition:
    """The batch doubled: the condition, then the null class or null caption."""
    null = model.null_condition(condition)
    if isinstance(condition, tuple) and isinstance(null, tuple):
        return torch.cat([condition[0], null[0]]), torch.cat([condition[1], null[1]])
    assert isinstance(condition, Tensor)
    assert isinstance(null, Tensor)
    return torch.cat([condition, null])


def noise_streams(seeds: Tensor) -> Tensor:
    """The int32 key of every sample's noise. seeds: (B,) int64; none collide that differ only in the low 32 bits."""
    return prng.stream(0, "sampling", seeds)


def draw(logits: Tensor, streams: Tensor, position: int, temperature: float, top_k: int, top_p: float) -> Tensor:
    """One code per row, int64 (B,). logits: (B, V) fp32, guided already. streams: from ``noise_streams``."""
    if temperature == 0:
        return logits.argmax(dim=-1)
    kept = filter_logits(logits / max(temperature, LEAST_TEMPERATURE), top_k, top_p)
    vocabulary = logits.shape[-1]
    counters = position * vocabulary + torch.arange(vocabulary, device=logits.device)  # one for every code drawn from
    raw = prng.bits32(streams[:, None], counters).to(torch.int64) & 0xFFFFFFFF
    uniform = (raw.double() + 0.5) * 2.0**-32  # never 0 or 1
    return (kept.double() - torch.log(-torch.log(uniform))).argmax(dim=-1)


def filter_logits(logits: Tensor, top_k: int = 0, top_p: float = 1.0) -> Tensor:
    """(B, V) with -inf where a code is ruled out.

    top_k > 0 keeps every code that is not below the k-th largest (ties stay). Then top_p < 1 keeps the likeliest codes
    up to and including the one at which their total probability exceeds top_p.
    """
    if top_k > 0:
        least = logits.topk(min(top_k, logits.shape[-1]), dim=-1).values[..., -1:]
        logits = logits.masked_fill(logits < least, -torch.inf)
    if top_p < 1.0:
        ordered, codes = logits.sort(dim=-1, descending=True)
        beyond = ordered.softmax(dim=-1).cumsum(dim=-1) > top_p
        # shifted by one, so that the code at which the sum exceeds top_p stays, and always at least one
        beyond = torch.cat([torch.zeros_like(beyond[..., :1]), beyond[..., :-1]], dim=-1)
        logits = logits.masked_fill(torch.zeros_like(beyond).scatter(-1, codes, beyond), -torch.inf)
    return logits
