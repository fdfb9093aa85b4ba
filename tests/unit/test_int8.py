"""Weights of eight bits: what they are, what they compute, what they take."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from llamagen_dist.models.gpt import GPT, GPTConfig
from llamagen_dist.sampling import int8
from llamagen_dist.sampling.int8 import Int8Linear, quantize
from tests.bench.int8 import weight_bytes
from tests.unit.test_gpt import tiny
from tests.unit.test_sampler import GOLDEN

ROWS = torch.tensor([0.001, 1.0, 300.0, 0.0])[:, None]  # channels of very different size, and one without weights


def rounded(weight: np.ndarray) -> np.ndarray:
    """The definition, channel by channel in float64."""
    out = np.zeros_like(weight, np.float64)
    for number, row in enumerate(weight.astype(np.float64)):
        if largest := np.abs(row).max():
            out[number] = np.round(row / (largest / 127)) * (largest / 127)
    return out


def test_every_output_channel_is_rounded_by_a_scale_of_its_own():
    weight = torch.randn(4, 64, generator=torch.Generator().manual_seed(0)) * ROWS
    layer = Int8Linear(weight)
    assert (layer.weight.dtype, layer.scale.dtype) == (torch.int8, torch.float32)
    assert int(layer.weight.abs().max()) == 127
    found = layer.weight.double() * layer.scale.double()[:, None]
    assert torch.allclose(found, torch.from_numpy(rounded(weight.numpy())), rtol=1e-6)
    error = (found - weight).abs().amax(dim=1)
    assert (error <= layer.scale * 0.5000001).all()
    coarse = weight.abs().max() / 127  # sabotage twin: one scale for all channels
    assert (((weight / coarse).round() * coarse - weight).abs().amax(dim=1) > layer.scale)[:2].all()


@pytest.mark.parametrize("rows", [1, 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_computes_with_the_rounded_weights_and_scales_in_fp32(dtype, rows):
    weight, x = torch.randn(48, 64) * 0.1, torch.randn(3, rows, 64).to(dtype)
    layer = Int8Linear(weight).to(dtype)
    assert (layer.weight.dtype, layer.scale.dtype) == (torch.int8, torch.float32), "a scale in bf16 would have 8 bits"
    out = layer(x)
    assert (out.dtype, out.shape) == (dtype, (3, rows, 48))
    exact = x.double() @ torch.from_numpy(rounded(weight.numpy())).T
    assert torch.allclose(out.double(), exact, rtol=2e-2 if dtype == torch.bfloat16 else 1e-4, atol=1e-2)
    layer.scale = layer.scale.roll(1)  # sabotage twin
    assert not torch.allclose(layer(x).double(), exact, rtol=2e-2, atol=1e-2)


def test_blocks_and_head_are_rounded_and_memory_is_a_quarter():
    config = GPTConfig(2, 4, 64, vocab_size=96, image_tokens=16, num_classes=3, multiple_of=16, n_kv_head=2)
    model = GPT(config).initialize(0)
    linear = sum(p.numel() for n, p in model.named_parameters() if n.startswith(("layers.", "output")) and p.dim() == 2)
    outputs = 2 * (2 * 64 + 64 + 2 * config.ffn_dim + 64) + 96  # [q | k | v] with half the key heads, wo, w1, w3, w2
    before = weight_bytes(model)
    assert linear == 2 * (64 * 128 + 64 * 64 + 3 * 64 * config.ffn_dim) + 96 * 64
    after = weight_bytes(quantize(model))
    assert before - after == 3 * linear - 4 * outputs
    names = {name for name, module in model.named_modules() if isinstance(module, Int8Linear)}
    assert len(names) == 2 * 5 + 1
    assert "output" in names
    assert {name.rpartition(".")[2] for name in names} == {"wqkv", "wo", "w1", "w2", "w3", "output"}


@torch.no_grad()
@pytest.mark.parametrize("kind", ["class", "text"])
def test_logits_stay_near_the_references(kind, monkeypatch):
    """Against logits of the reference system, as KL divergence per token; the twin has four bits."""
    golden = np.load(GOLDEN / ("gpt_c2i.npz" if kind == "class" else "gpt_t2i.npz"))
    condition = torch.from_numpy(golden["labels"]) if kind == "class" else caption(golden)
    tokens, expected = torch.from_numpy(golden["tokens"]), torch.from_numpy(golden["logits"]).double()

    def divergence() -> float:
        logits = quantize(tiny(kind, golden).eval())(tokens, condition).double()
        return float(
            F.kl_div(logits.log_softmax(-1), expected.log_softmax(-1), log_target=True, reduction="none").sum(-1).mean()
        )

    assert 0 < divergence() < 1e-3
    monkeypatch.setattr(int8, "LARGEST", 7)
    assert divergence() > 2e-2


def caption(golden) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.from_numpy(golden["caption"]), torch.from_numpy(golden["emb_mask"]).bool()
