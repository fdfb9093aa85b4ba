"""planning/memory.py's activations against the bytes that autograd really keeps."""

from dataclasses import replace

import pytest

from llamagen_dist.models import loss as loss_module
from llamagen_dist.models.cost import total_parameters
from llamagen_dist.models.gpt import GPT
from llamagen_dist.models.sizes import GPTConfig
from llamagen_dist.planning import memory
from llamagen_dist.planning.memory import Layout, activations
from tests.live_bytes import kept_for_backward, peak_of_a_pass

SMALL = GPTConfig(n_layer=4, n_head=4, dim=64, vocab_size=512, image_tokens=64, num_classes=10, multiple_of=32)
TEXT = replace(SMALL, condition="text", prefix_tokens=24, caption_dim=48)
QUIET = {"token_dropout_p": 0.0, "resid_dropout_p": 0.0, "ffn_dropout_p": 0.0}
CASES = {
    "class": SMALL,
    "class, no dropout": replace(SMALL, **QUIET),
    "text": TEXT,
    "text, no dropout": replace(TEXT, **QUIET),
    "grouped heads": replace(SMALL, n_kv_head=2),
    "drop-path": replace(SMALL, drop_path_rate=0.1),
    "attention dropout": replace(SMALL, attn_dropout_p=0.1),
    "guidance-free": replace(SMALL, guidance="free"),
    "random order": replace(SMALL, order="rar"),
    "random order, guidance-free, text": replace(TEXT, order="rar", guidance="free"),
    "QK-norm": replace(SMALL, qk_norm=True),
    "QK-norm, grouped heads": replace(SMALL, qk_norm=True, n_kv_head=2),
    "QK-norm, attention dropout": replace(SMALL, qk_norm=True, attn_dropout_p=0.1),
}


def ready(config: GPTConfig, layout: Layout) -> GPT:
    model = GPT(config).initialize(0).train()
    if layout.precision == "bf16":
        model.bfloat16()
    model.recompute_every = layout.recompute_every
    return model


def kept_bytes(config: GPTConfig, layout: Layout) -> int:
    return kept_for_backward(ready(config, layout), layout.micro)


def counted(config: GPTConfig, layout: Layout) -> int:
    parts = activations(config, layout)
    return parts["blocks"] + parts["ends"] + parts["logits"]  # "recomputed" comes only with the backward pass


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("config", CASES.values(), ids=CASES.keys())
def test_activations_are_what_autograd_keeps(config, precision):
    layout = Layout(precision=precision, micro=3)
    assert counted(config, layout) == pytest.approx(kept_bytes(config, layout), rel=0.05)


@pytest.mark.parametrize("every", [1, 2, 3])
@pytest.mark.parametrize("config", [SMALL, TEXT], ids=["class", "text"])
def test_recomputed_blocks_keep_their_input_only(config, every):
    layout = Layout(precision="bf16", micro=3, recompute_every=every)
    assert counted(config, layout) == pytest.approx(kept_bytes(config, layout), rel=0.05)
    assert counted(config, layout) < 0.9 * counted(config, replace(layout, recompute_every=0))


def test_a_wrong_count_is_noticed():
    """Sabotage twin: another precision, another policy or one more dropout is not within 5 %."""
    layout = Layout(precision="bf16", micro=3)
    measured = kept_bytes(SMALL, layout)
    for config, other in (
        (SMALL, replace(layout, precision="fp32")),
        (SMALL, replace(layout, recompute_every=3)),
        (SMALL, replace(layout, micro=4)),
        (replace(SMALL, n_layer=5), layout),
        (replace(SMALL, qk_norm=True), layout),
    ):
        assert counted(config, other) != pytest.approx(measured, rel=0.05), (config, other)


@pytest.mark.parametrize("every", [0, 1])
@pytest.mark.parametrize("precision", ["fp32", pytest.param("bf16", marks=pytest.mark.long)])
def test_the_sum_of_the_parts_is_not_below_the_real_peak(precision, every):
    """Of forward and backward pass: gradients grow while activations go, so the sum is an upper bound, not far off."""
    config = replace(SMALL, n_layer=6, dim=128, vocab_size=1024, image_tokens=256)
    layout = Layout(precision=precision, micro=4, recompute_every=every)
    kept = sum(activations(config, layout).values()) + memory.working(config, layout)
    found = peak_of_a_pass(ready(config, layout), layout.micro)
    assert 0.6 * kept < found < kept + total_parameters(config) * layout.bytes


def test_the_constants_are_those_of_the_code():
    from llamagen_dist.parallel import deepspeed_engine

    assert memory.LOSS_CHUNK == loss_module.LOSS_CHUNK
    assert memory.LARGEST_BUCKET == deepspeed_engine.LARGEST_BUCKET
