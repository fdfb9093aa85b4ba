"""Guidance by position: the schedules' formulas, and a sampler that follows them."""

import math
from typing import get_args

import pytest
import torch
from pydantic import TypeAdapter, ValidationError

from llamagen_dist.config import SampleConfig
from llamagen_dist.models.gpt import GPT, GPTConfig
from llamagen_dist.sampling.draw import draw, noise_streams
from llamagen_dist.sampling.guidance import SCHEDULES, guidance_scales
from llamagen_dist.sampling.pictures import Settings
from llamagen_dist.sampling.sampler import generate

TOKENS = 16


def test_the_schedules_at_points_worked_out_by_hand():
    assert guidance_scales(4, 3.0) == [3.0] * 4
    assert guidance_scales(4, 3.0, interval=1) == [3.0, 3.0, 3.0, 1.0]
    assert guidance_scales(4, 3.0, "linear") == [1.0, 1.5, 2.0, 2.5]
    assert guidance_scales(10, 3.0, "step", start=0.18) == [1.0, 1.0, *[3.0] * 8]
    assert guidance_scales(10, 3.0, "step", start=0.2) == [1.0, 1.0, *[3.0] * 8]
    assert guidance_scales(2, 3.0, "power-cosine", power=1.0) == pytest.approx([1.0, 2.0])
    found = guidance_scales(256, 16.0, "power-cosine", power=2.75)  # RAR-B's
    assert found[128] == pytest.approx(1 + 15 * (1 - math.cos(math.pi * 0.5**2.75)) / 2)
    assert found[0] == 1.0
    assert found == sorted(found)


def test_the_config_knows_the_same_schedules():
    assert get_args(SampleConfig.model_fields["guidance"].annotation) == SCHEDULES


@pytest.mark.parametrize("bad", [{"guidance": "cosine"}, {"guidance": "step", "cfg_interval": 2}, {"window": 0}])
def test_settings_that_make_no_sense_are_never_made(bad):
    with pytest.raises(ValueError, match=r"schedule|window"):
        Settings(**bad)
    with pytest.raises(ValidationError):  # as they are read from a picture
        TypeAdapter(Settings).validate_python(bad)


@pytest.mark.parametrize("schedule", ["constant", "linear", "power-cosine", "step"])
def test_a_scale_of_one_or_less_guides_nothing(schedule):
    assert guidance_scales(9, 1.0, schedule) == guidance_scales(9, 0.5, schedule) == [1.0] * 9


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"scale": -1.0}, "scale -1"),
        ({"schedule": "cosine"}, "none of constant, linear, power-cosine, step"),
        ({"interval": -2}, "interval -2"),
        ({"power": 0.0}, "power 0"),
        ({"start": 1.5}, r"start 1\.5"),
        ({"schedule": "linear", "interval": 3}, "belongs to the constant schedule"),
    ],
)
def test_what_is_no_schedule_is_refused(bad, message):
    with pytest.raises(ValueError, match=message):
        guidance_scales(**{"tokens": 9, "scale": 2.0, **bad})


def tiny(seed: int = 0) -> GPT:
    config = GPTConfig(2, 2, 32, vocab_size=24, image_tokens=TOKENS, num_classes=3, multiple_of=16)
    model = GPT(config).initialize(seed).eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.normal_(std=0.3, generator=torch.Generator().manual_seed(weight.numel()))
    return model


@torch.no_grad()
def whole_sequences(model, labels, scales):
    """Without a cache, both halves computed to the end."""
    streams, tokens = noise_streams(torch.arange(len(labels))), torch.zeros(len(labels), TOKENS, dtype=torch.int64)
    for position, scale in enumerate(scales):
        logits = model(tokens, labels)[:, position]
        null = model(tokens, torch.full_like(labels, 3))[:, position]
        tokens[:, position] = draw(null + scale * (logits - null), streams, position, 1.0, 0, 1.0)
    return tokens


@pytest.mark.parametrize(
    "options",
    [{"guidance": "linear"}, {"guidance": "power-cosine", "guidance_power": 1.5}, {"guidance": "step"}, {}],
    ids=str,
)
def test_images_are_drawn_under_the_schedule(options):
    model, labels = tiny(), torch.arange(8) % 3
    found = generate(model, labels, cfg_scale=5.0, **options)
    keys = {"guidance": "schedule", "guidance_power": "power"}
    scales = guidance_scales(TOKENS, 5.0, **{keys[name]: value for name, value in options.items()})
    assert torch.equal(found, whole_sequences(model, labels, scales))
    late = [*scales[1:], scales[-1] + 1]  # sabotage twin: the schedule one token early
    assert not torch.equal(found, whole_sequences(model, labels, late))
