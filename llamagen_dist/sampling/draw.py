"""One code per row of logits: temperature, top-k, top-p, and noise that belongs to the sample.

A draw is the argmax of logits plus Gumbel noise hashed from (the sample's seed, token position, code), so a picture
does not depend on its position in a batch, on the number of ranks or on where a run was cut off. Only the codes that
may be drawn get noise: it is a function of the code, so leaving the others out changes nothing.
"""

import torch
from torch import Tensor

from llamagen_dist import prng

LEAST_TEMPERATURE = 1e-5  # LlamaGen's; an exact 0 is greedy here


def noise_streams(seeds: Tensor) -> Tensor:
    """The int32 key of every sample's noise. seeds: (B,) int64; none collide that differ only in the low 32 bits."""
    return prng.stream(0, "sampling", seeds)


def draw(
    logits: Tensor, streams: Tensor, position: int | Tensor, temperature: float, top_k: int, top_p: float
) -> Tensor:
    """One code per row, int64 (B,).

    logits: (B, V) fp32, guided already.
    streams: (B,), from ``noise_streams``.
    position: of the token in its image, the same for all rows or (B,) int64.
    temperature: 0 takes the likeliest code.
    top_k, top_p: see ``candidates``.
    """
    if temperature == 0:
        return logits.argmax(dim=-1)
    scores, codes = candidates(logits / max(temperature, LEAST_TEMPERATURE), top_k, top_p)
    # a number stays one: made a tensor on a GPU, it would have to be copied there at every step
    row = position if isinstance(position, int) else position[:, None]
    raw = prng.bits32(streams[:, None], row * logits.shape[-1] + codes).to(torch.int64) & 0xFFFFFFFF
    uniform = (raw.double() + 0.5) * 2.0**-32  # never 0 or 1
    best = (scores.double() - torch.log(-torch.log(uniform))).argmax(dim=-1, keepdim=True)
    return codes.expand(len(logits), -1).gather(-1, best)[:, 0]


def candidates(logits: Tensor, top_k: int = 0, top_p: float = 1.0) -> tuple[Tensor, Tensor]:
    """(logits (B, n), codes (B or 1, n) int64): what may be drawn; -inf where a code among them may not.

    top_k > 0 keeps every code that is not below the k-th largest (ties stay). Then top_p < 1 keeps the likeliest codes
    up to and including the one at which their total probability exceeds top_p.
    """
    vocabulary = logits.shape[-1]
    codes = torch.arange(vocabulary, device=logits.device)[None]
    if 0 < top_k < vocabulary:
        largest = logits.topk(top_k, dim=-1, sorted=False)
        hidden = logits < largest.values.amin(dim=-1, keepdim=True)
        # On a GPU the count would make the host wait for every step, and noise for the whole row costs nothing there
        no_ties = logits.device.type == "cpu" and int(hidden.sum()) == len(logits) * (vocabulary - top_k)
        if no_ties and top_p == 1.0:
            return largest.values, largest.indices
        logits = logits.masked_fill(hidden, -torch.inf)
    if top_p < 1.0:
        logits, codes = logits.sort(dim=-1, descending=True)
        beyond = logits.softmax(dim=-1).cumsum(dim=-1) > top_p
        # shifted by one, so that the code at which the sum exceeds top_p stays, and always at least one
        beyond = torch.cat([torch.zeros_like(beyond[..., :1]), beyond[..., :-1]], dim=-1)
        logits = logits.masked_fill(beyond, -torch.inf)
    return logits, codes
