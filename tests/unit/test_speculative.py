"""Speculative decoding draws what plain decoding draws: the same tokens, so the same distribution."""

import pytest
import torch

from llamagen_dist.models.gpt import GPT, GPTConfig
from llamagen_dist.sampling import sampler
from llamagen_dist.sampling.sampler import confirmed, generate
from tests.unit.test_gpt_text import LENGTHS, batch, text_model
from tests.unit.test_guidance import tiny

KINDS = [
    {},
    {"cfg_scale": 3.0, "top_k": 12},
    {"cfg_scale": 3.0, "cfg_interval": 5, "top_p": 0.9},
    {"cfg_scale": 3.0, "guidance": "step", "guidance_start": 0.4},
    {"cfg_scale": 3.0, "guidance": "linear", "temperature": 0.0},
]


@pytest.mark.parametrize("options", KINDS, ids=str)
@pytest.mark.parametrize("window", [2, 5, 16, 20])
def test_the_tokens_are_those_of_plain_decoding(options, window):
    model, labels, seeds = tiny(), torch.arange(40) % 3, torch.arange(40) + (1 << 32)
    plain = generate(model, labels, seeds=seeds, **options)
    assert torch.equal(generate(model, labels, seeds=seeds, window=window, **options), plain)


@pytest.mark.parametrize("options", [{}, {"n_kv_head": 2}, {"prefix_rotation": "identity"}], ids=str)
def test_the_tokens_are_those_of_plain_decoding_with_captions(options):
    model, (_, caption) = text_model(**options).eval(), batch()
    plain = generate(model, caption, cfg_scale=2.0)
    assert len(plain) == len(LENGTHS)
    for window in (3, 16):
        assert torch.equal(generate(model, caption, cfg_scale=2.0, window=window), plain)


def accept_everything(fed, found):
    return torch.full_like(fed[:, 0], fed.shape[1])


def accept_one_more(fed, found):
    """An approximate rule: a first wrong guess is not seen."""
    return (confirmed(fed, found) + 1).clamp(max=fed.shape[1])


@pytest.mark.parametrize("rule", [accept_everything, accept_one_more])
def test_an_approximate_rule_draws_other_tokens(monkeypatch, rule):
    model, labels = tiny(), torch.arange(40) % 3
    plain = generate(model, labels)
    monkeypatch.setattr(sampler, "confirmed", rule)
    assert not torch.equal(generate(model, labels, window=4), plain)


def test_right_guesses_save_passes(monkeypatch):
    """A greedy model that repeats a token is guessed right from the start: N - 1 tokens in ceil((N - 1) / W) passes."""
    model = tiny()
    with torch.no_grad():
        model.output.weight.zero_()
    passes = []
    decode = GPT.decode_window
    monkeypatch.setattr(GPT, "decode_window", lambda *given: passes.append(1) or decode(*given))
    generate(model, torch.zeros(3, dtype=torch.int64), temperature=0.0, window=5)
    assert len(passes) == 3


CODES, COUNT = 5, 4
SAMPLES = 2000
OPTIONS = {"cfg_scale": 1.5, "top_k": 4}


def small() -> GPT:
    """Few enough codes that every pair of positions can be counted, each strongly dependent on those before."""
    model = GPT(GPTConfig(2, 2, 32, vocab_size=CODES, image_tokens=COUNT, num_classes=1, multiple_of=16))
    model.initialize(0).eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.normal_(std=0.5, generator=torch.Generator().manual_seed(weight.numel()))
    return model


def counts(tokens: torch.Tensor) -> list[torch.Tensor]:
    """How often each code comes at each position, and each pair of codes at each pair of positions."""
    singles = [torch.bincount(tokens[:, i], minlength=CODES) for i in range(COUNT)]
    pairs = [(i, j) for i in range(COUNT) for j in range(i + 1, COUNT)]
    return singles + [torch.bincount(tokens[:, i] * CODES + tokens[:, j], minlength=CODES**2) for i, j in pairs]


def worst(first: torch.Tensor, second: torch.Tensor) -> float:
    """The largest chi-square of two samples of equal size over all tables, in standard deviations of its own
    distribution (Wilson and Hilferty's cube root, which is near normal)."""
    found = []
    for one, other in zip(counts(first), counts(second), strict=True):
        seen = one + other > 10
        one, other = one[seen].double(), other[seen].double()
        freedom = max(len(one) - 1, 1)
        square = ((one - other) ** 2 / (one + other)).sum().item()
        spread = 2 / (9 * freedom)
        found.append(((square / freedom) ** (1 / 3) - (1 - spread)) / spread**0.5)
    return max(found)


def sampled(first_seed: int, window: int) -> torch.Tensor:
    labels = torch.zeros(SAMPLES, dtype=torch.int64)
    return generate(small(), labels, seeds=torch.arange(SAMPLES) + first_seed, window=window, **OPTIONS)


def test_the_distribution_is_that_of_plain_sampling(monkeypatch):
    """With noise of its own: chi-square at every position and for every pair, 10 tables, below 4 deviations."""
    plain = sampled(0, 1)
    assert worst(plain, sampled(1 << 40, 3)) < 4
    monkeypatch.setattr(sampler, "confirmed", accept_one_more)  # sabotage twin: an approximate rule
    assert worst(plain, sampled(1 << 40, 3)) > 8
