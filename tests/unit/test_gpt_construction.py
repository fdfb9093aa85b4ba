"""Building a GPT: initial weights by name, the meta device, published sizes, refusals."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from llamagen_dist.build import gpt_config
from llamagen_dist.config import GPTModelSection, SampleConfig
from llamagen_dist.config.section import build
from llamagen_dist.errors import UserError
from llamagen_dist.models.gpt import GPT, GPTConfig
from llamagen_dist.models.initial import initial_weight
from llamagen_dist.models.sizes import GPT_SIZES
from tests.unit.test_gpt import PUBLISHED
from tests.unit.test_gpt_training import small


def test_weights_are_functions_of_seed_and_name():
    state = torch.get_rng_state()
    model, again = small(condition="text", prefix_tokens=3, caption_dim=8), None
    with torch.device("meta"):
        again = GPT(model.config)
    again.to_empty(device="cpu")
    again.initialize(1)
    again.output.weight.data.copy_(model.output.weight)
    for (name, one), (_, other) in zip(model.state_dict().items(), again.state_dict().items(), strict=True):
        assert torch.equal(one, other), name
    assert torch.equal(again.rotary, model.rotary)
    assert torch.equal(torch.get_rng_state(), state), "the global generator is left alone"
    other = GPT(model.config).initialize(2)
    assert not torch.equal(other.cls_embedding.uncond_embedding, model.cls_embedding.uncond_embedding)
    wanted = initial_weight(model.config, 1, "layers.2.attention.wo.weight", (64, 64))
    assert torch.equal(wanted, model.layers[2].attention.wo.weight)


@pytest.mark.parametrize("size", GPT_SIZES)
@pytest.mark.parametrize("kind", ["class", "text"])
def test_really_built_models_have_the_published_parameter_counts(size, kind):
    with torch.device("meta"):
        model = GPT(GPTConfig(**GPT_SIZES[size], condition=kind))
    assert sum(p.numel() for p in model.parameters()) == PUBLISHED[size][kind == "text"]
    assert all(p.is_meta for p in model.parameters())


META = """
import time
from pathlib import Path
import torch
from llamagen_dist.models.gpt import GPT, GPTConfig
from llamagen_dist.models.sizes import GPT_SIZES
def build(device, size, layers):
    before, start = resident(), time.process_time()
    with torch.device(device):
        model = GPT(GPTConfig(**{**GPT_SIZES[size], "n_layer": layers}))
    seconds = time.process_time() - start
    return resident() - before, seconds
def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096 / 1e6
print(build("meta", "GPT-B", 1)[1])  # what torch loads at the first use of a device is not the model's
print(*build("meta", "GPT-3B", 24))
print(build("cpu", "GPT-B", 1)[0])
"""


@pytest.mark.long
def test_gpt_3b_is_built_on_meta_at_once_and_takes_no_memory():
    root = Path(__file__).parent.parent.parent
    environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", META]
    out = subprocess.run(command, capture_output=True, text=True, check=True, cwd=root, env=environment)
    first_use, megabytes, seconds, really = map(float, out.stdout.split())
    assert megabytes < 8
    assert first_use + seconds < 10  # CPU seconds, on a busy machine too; drawing its weights takes minutes
    assert really > 100, "sabotage twin: one layer of GPT-B for real is seen"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"n_kv_head": 3}, r"model: n_kv_head 3 does not divide n_head 4; one of 1, 2, 4"),
        ({"n_head": 3}, r"model: dim 64 is not a multiple of n_head 3"),
        ({"n_head": 32}, r"model: head dimension 2 .* must be a multiple of 4"),
    ],
)
def test_impossible_sizes_are_refused(settings, message):
    data = {"kind": "sample", "checkpoint": "c", "tokenizer": "t", "out": "o"}
    with pytest.raises(UserError, match=message):
        build(SampleConfig, {**data, "model": {"n_layer": 1, "n_head": 4, "dim": 64, **settings}}, "file")


def test_every_key_of_the_section_reaches_the_model():
    section = GPTModelSection(
        n_layer=1,
        n_head=4,
        dim=64,
        n_kv_head=2,
        condition="text",
        prefix_tokens=7,
        caption_dim=24,
        prefix_rotation="identity",
        attn_dropout_p=0.2,
        drop_path_rate=0.1,
    )
    config = gpt_config(section, vocab_size=96, image_tokens=16, num_classes=10)
    for key in ("n_kv_head", "condition", "prefix_tokens", "caption_dim", "prefix_rotation", "attn_dropout_p"):
        assert getattr(config, key) == getattr(section, key)
