"""Draws are those of the plain formula over the whole vocabulary, whichever codes are left out of it."""

import pytest
import torch

from llamagen_dist import prng
from llamagen_dist.sampling import draw as draw_module
from llamagen_dist.sampling.draw import draw, noise_streams

VOCABULARY = 300


def plain_draw(logits, streams, position, temperature, top_k, top_p):
    """Noise for every code, filters as masks over the vocabulary: pictures drawn so far came from this."""
    kept = logits / max(temperature, 1e-5)
    if top_k > 0:
        least = kept.topk(min(top_k, logits.shape[-1]), dim=-1).values[..., -1:]
        kept = kept.masked_fill(kept < least, -torch.inf)
    if top_p < 1.0:
        ordered, codes = kept.sort(dim=-1, descending=True)
        beyond = ordered.softmax(dim=-1).cumsum(dim=-1) > top_p
        beyond = torch.cat([torch.zeros_like(beyond[..., :1]), beyond[..., :-1]], dim=-1)
        kept = kept.masked_fill(torch.zeros_like(beyond).scatter(-1, codes, beyond), -torch.inf)
    counters = position * logits.shape[-1] + torch.arange(logits.shape[-1])
    raw = prng.bits32(streams[:, None], counters).to(torch.int64) & 0xFFFFFFFF
    return (kept.double() - torch.log(-torch.log((raw.double() + 0.5) * 2.0**-32))).argmax(dim=-1)


def rows(kind, count=2000):
    logits = 3 * torch.randn(count, VOCABULARY, generator=torch.Generator().manual_seed(5))
    # bf16 models give logits with many ties, also at the k-th place; untrained ones nothing but ties
    return {"fp32": logits, "bf16": logits.bfloat16().float(), "ties": logits.round(), "zero": 0 * logits}[kind]


@pytest.mark.parametrize("kind", ["fp32", "bf16", "ties", "zero"])
@pytest.mark.parametrize("options", [(1.0, 0, 1.0), (1.0, 40, 1.0), (0.8, 7, 0.9), (1.3, 0, 0.7), (1.0, 1000, 1.0)])
def test_draws_are_those_of_the_plain_formula(kind, options):
    logits, streams = rows(kind), noise_streams(torch.arange(2000) + (3 << 32))
    assert torch.equal(draw(logits, streams, 17, *options), plain_draw(logits, streams, 17, *options))
    assert not torch.equal(draw(logits, streams, 18, *options), plain_draw(logits, streams, 17, *options))


def test_each_row_may_have_a_position_of_its_own():
    logits, streams = rows("fp32", 6), noise_streams(torch.arange(6))
    positions = torch.tensor([0, 4, 4, 255, 1, 0])
    alone = [draw(logits[i : i + 1], streams[i : i + 1], int(p), 1.0, 9, 1.0) for i, p in enumerate(positions)]
    assert torch.equal(draw(logits, streams, positions, 1.0, 9, 1.0), torch.cat(alone))


def test_only_codes_that_may_be_drawn_get_noise(monkeypatch):
    counted = []
    bits32 = prng.bits32

    def watched(keys, counters):
        counted.append(counters.numel())
        return bits32(keys, counters)

    monkeypatch.setattr(draw_module.prng, "bits32", watched)
    draw(rows("fp32", 4), noise_streams(torch.arange(4)), 0, 1.0, 20, 1.0)
    assert counted == [80]
    draw(rows("zero", 4), noise_streams(torch.arange(4)), 0, 1.0, 20, 1.0)  # ties: all codes survive
    assert counted == [80, VOCABULARY]  # the same codes for all rows
