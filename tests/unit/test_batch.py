"""batch: auto: what one picture takes, against real tensors, and what is made of it."""

from dataclasses import replace
from itertools import accumulate

import pytest
import torch

from llamagen_dist.checkpoint.checkpoint import ALONE
from llamagen_dist.errors import UserError
from llamagen_dist.models.gpt import GPT, GPTConfig
from llamagen_dist.models.vq import VQConfig, VQModel
from llamagen_dist.planning.memory import Layout, drawn_picture
from llamagen_dist.sampling import batch
from llamagen_dist.sampling.batch import largest_batch
from llamagen_dist.sampling.pictures import Settings, model_tokens

CLASS = GPTConfig(3, 4, 64, vocab_size=2048, image_tokens=64, num_classes=10, multiple_of=32, n_kv_head=2)
TEXT = replace(CLASS, condition="text", prefix_tokens=24, caption_dim=48)
VQ = VQConfig(32, (1, 2, 2, 4), res_blocks=1, z_channels=32, codebook_size=64, codebook_dim=8)


def condition(config: GPTConfig, count: int):
    if config.condition == "class":
        return torch.arange(count) % config.num_classes
    return torch.ones(count, config.prefix, config.caption_dim), torch.ones(count, config.prefix, dtype=torch.bool)


def count(config: GPTConfig, vq: VQConfig, how: Settings, precision: str = "fp32") -> dict[str, int]:
    return drawn_picture(config, Layout(precision=precision), vq, 64, how.cfg_scale > 1, how.window)


@pytest.mark.parametrize("how", [Settings(), Settings(cfg_scale=2.0), Settings(cfg_scale=2.0, window=5)])
@pytest.mark.parametrize("config", [CLASS, TEXT, replace(TEXT, prefix_rotation="identity")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_cache_is_what_a_picture_really_has(config, how, dtype):
    model = GPT(config).initialize(0).eval().to(dtype)
    rows = 2 if how.cfg_scale > 1 else 1
    with torch.no_grad():
        _, cache = model.prefill(condition(config, 3 * rows), spare=how.window - 1)
    real = sum(part.numel() * part.element_size() for layer in cache.layers for part in layer.held())
    assert count(config, VQ, how, "bf16" if dtype == torch.bfloat16 else "fp32")["cache"] * 3 == real


def peak(run) -> int:
    """The most bytes allocated at a time, by torch's profiler."""
    run()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        run()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    return max(accumulate(e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())))


def of_one_more(run) -> float:
    """Bytes that each picture adds, whatever a batch takes at all."""
    return (peak(lambda: run(8)) - peak(lambda: run(4))) / 4


@pytest.mark.parametrize("multipliers", [(1, 2, 2, 4), (1, 1, 2, 2, 4)])
def test_the_decoder_is_counted_as_it_allocates(multipliers):
    config = replace(VQ, channel_multipliers=multipliers)
    model, side = VQModel(config).eval(), 64 // config.downsampling
    real = of_one_more(lambda count: model.decode(torch.zeros(count, side, side, dtype=torch.int64)))
    assert count(CLASS, config, Settings())["decoder"] == pytest.approx(real, rel=0.1)
    other = replace(config, channel_multipliers=(2, *multipliers[1:]))  # sabotage twin
    assert count(CLASS, other, Settings())["decoder"] != pytest.approx(real, rel=0.1)


@pytest.mark.parametrize("config", [CLASS, TEXT])
def test_the_count_is_not_below_a_real_peak(config):
    model, how = GPT(config).initialize(0).eval(), Settings(cfg_scale=2.0)
    real = of_one_more(lambda count: model_tokens(model, condition(config, count), torch.arange(count), how))
    parts = count(config, VQ, how)
    assert 0.5 < real / (parts["cache"] + parts["logits and noise"]) <= 1


def test_the_batch_is_what_fits_and_never_nothing(monkeypatch):
    parts = {"cache": 60_000_000, "decoder": 40_000_000}
    for free, images, expected in (
        (1_000_000_000, 500, 8),
        (2_500_000_000, 500, 16),  # 20 fit
        (900_000_000, 500, 7),
        (126_000_000, 500, 1),
        (1e15, 50_000, batch.MOST["cpu"]),
        (1e15, 30, 30),
        (3_500_000_000, 30, 24),
        (1e15, 3, 3),
    ):
        monkeypatch.setattr(batch, "free_bytes", lambda topology, free=free: int(free))
        assert largest_batch(parts, images, ALONE) == expected
    monkeypatch.setattr(batch, "free_bytes", lambda topology: 124_000_000)
    with pytest.raises(UserError, match=r"not even one picture fits: it takes 100 MB \(cache 60 MB, decoder 40 MB\)"):
        largest_batch(parts, 500, ALONE)


def test_ranks_of_one_host_share_its_memory():
    class Crowd:
        device = torch.device("cpu")

        def gather(self, value):
            return [value, value, value, "elsewhere"]

    assert batch.free_bytes(Crowd()) == pytest.approx(batch.free_bytes(ALONE) / 3, rel=0.1)
