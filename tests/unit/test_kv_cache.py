"""Attention over the keys and values of a cache."""

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from llamagen_dist.models import cache


@pytest.mark.parametrize("masked", [False, True])
def test_one_bf16_query_on_a_cpu_is_attended_in_fp32_some_samples_at_a_time(masked, monkeypatch):
    generator = torch.Generator().manual_seed(0)
    queries = torch.randn(5, 6, 1, 8, generator=generator).bfloat16()
    # views of a larger memory, as the cache gives them; three query heads share a key head
    keys, values = (torch.randn(5, 2, 12, 8, generator=generator).bfloat16()[:, :, :9] for _ in range(2))
    mask = torch.zeros(5, 1, 1, 9)
    if masked:
        mask.masked_fill_(torch.rand(5, 1, 1, 9, generator=generator) < 0.4, -torch.inf)[..., -1] = 0
    spread = (k.double().repeat_interleave(3, dim=1) for k in (keys, values))
    expected = scaled_dot_product_attention(queries.double(), *spread, attn_mask=mask.double())
    for samples in (1, 2, 100):  # five in parts of one, of two and one, whole
        monkeypatch.setattr(cache, "CPU_CHUNK_BYTES", samples * 2 * 2 * 9 * 8 * 4)
        out = cache.attend_in_fp32(queries, keys, values, mask if masked else None)
        assert out.dtype == torch.bfloat16
        assert (out - expected).abs().max() < 2**-7  # half a unit in the last place of bf16, up to 4
        if masked:
            without = cache.attend_in_fp32(queries, keys, values, None)
            assert (without - expected).abs().max() > 0.1, "the twin: a forgotten mask"
