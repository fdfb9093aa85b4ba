"""The sampler against tokens made by the reference system (tests/golden), and noise that belongs to the sample."""

import gc
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llamagen_dist import prng
from llamagen_dist.errors import UserError
from llamagen_dist.models.cache import LayerCache
from llamagen_dist.models.gpt import GPT, GPTConfig
from llamagen_dist.models.sizes import GPT_SIZES
from llamagen_dist.sampling import pictures, sampler
from llamagen_dist.sampling.draw import candidates, draw, noise_streams
from llamagen_dist.sampling.grid import class_grid, tile_side
from llamagen_dist.sampling.load import class_number
from llamagen_dist.sampling.sampler import generate
from tests.unit.test_gpt import NO_DROPOUT, recipe, tiny

GOLDEN = Path(__file__).parent.parent / "golden"


@pytest.fixture(scope="module")
def c2i():
    golden = np.load(GOLDEN / "gpt_c2i.npz")
    return tiny("class", golden).eval(), golden


@pytest.fixture(scope="module")
def t2i():
    golden = np.load(GOLDEN / "gpt_t2i.npz")
    caption = torch.from_numpy(golden["caption"]), torch.from_numpy(golden["emb_mask"]).bool()
    return tiny("text", golden).eval(), golden, caption


def filter_logits(logits, top_k=0, top_p=1.0):
    """(B, V): -inf where a code may not be drawn."""
    scores, codes = candidates(logits, top_k, top_p)
    return torch.full_like(logits, -torch.inf).scatter(-1, codes.expand(len(logits), -1), scores)


GREEDY = [
    ("greedy_nocfg", {}),
    ("greedy_cfg2", {"cfg_scale": 2.0}),
    ("greedy_cfg2_interval5", {"cfg_scale": 2.0, "cfg_interval": 5}),
]


@pytest.mark.parametrize(("key", "options"), GREEDY)
def test_greedy_tokens_equal_the_reference(c2i, key, options):
    model, golden = c2i
    found = generate(model, torch.from_numpy(golden["labels"]), temperature=0.0, **options)
    assert found.dtype == torch.int64
    assert torch.equal(found, torch.from_numpy(golden[key]).long())


def test_the_golden_tokens_tell_the_options_apart(c2i):
    """Sabotage twin: the interval one off, guidance left out, or the null half dropped at the wrong place is seen."""
    model, golden = c2i
    labels = torch.from_numpy(golden["labels"])
    expected = torch.from_numpy(golden["greedy_cfg2_interval5"]).long()
    for interval in (-1, 0, 4):
        assert not torch.equal(
            generate(model, labels, cfg_scale=2.0, cfg_interval=interval, temperature=0.0), expected
        ), interval
    assert not torch.equal(generate(model, labels, temperature=0.0), torch.from_numpy(golden["greedy_cfg2"]).long())


def test_captions_with_padding_equal_the_reference(t2i):
    model, golden, (features, present) = t2i
    expected = torch.from_numpy(golden["greedy_cfg3"]).long()
    assert not present.all(), "the golden captions are padded"
    assert torch.equal(generate(model, (features, present), cfg_scale=3.0, temperature=0.0), expected)
    blind = (features, torch.ones_like(present))
    assert not torch.equal(generate(model, blind, cfg_scale=3.0, temperature=0.0), expected)


@pytest.mark.long
def test_gpt_b_at_full_size_equals_the_reference():
    golden = np.load(GOLDEN / "gptb_recipe.npz")
    model = GPT(GPTConfig(**GPT_SIZES["GPT-B"], **NO_DROPOUT)).eval()
    with torch.no_grad():
        recipe(model)
    expected = torch.from_numpy(golden["greedy_cfg2"]).long()
    first = 64
    model.config = replace(
        model.config, image_tokens=first
    )  # draw only so many; the rotary table stays that of 16 x 16
    found = generate(model, torch.from_numpy(golden["labels"]), cfg_scale=2.0, temperature=0.0)
    assert torch.equal(found, expected[:, :first])


def cached_logits(model, tokens, condition):
    logits, cache = model.prefill(condition)
    found = [logits]
    for position in range(tokens.shape[1] - 1):
        found.append(model.decode(tokens[:, position], cache))
    return torch.stack(found, dim=1)


@torch.no_grad()
def test_cached_logits_are_those_of_the_whole_sequence(c2i, t2i):
    model, golden = c2i
    tokens, labels = torch.from_numpy(golden["tokens"]), torch.from_numpy(golden["labels"])
    assert torch.allclose(cached_logits(model, tokens, labels), torch.from_numpy(golden["logits"]), atol=1e-4)
    model, golden, caption = t2i
    tokens = torch.from_numpy(golden["tokens"])
    assert torch.allclose(cached_logits(model, tokens, caption), torch.from_numpy(golden["logits"]), atol=1e-4)


@torch.no_grad()
def test_a_cache_that_is_one_position_off_is_noticed(c2i, monkeypatch):
    """Sabotage twin: keys written a slot too far, or a forgotten position."""
    model, golden = c2i
    tokens, labels = torch.from_numpy(golden["tokens"]), torch.from_numpy(golden["labels"])
    extend = LayerCache.extend

    def shifted(self, keys, values):
        if self.filled == 5:
            self.filled = 4  # the fifth position is written over
        return extend(self, keys, values)

    monkeypatch.setattr(LayerCache, "extend", shifted)
    assert (cached_logits(model, tokens, labels) - torch.from_numpy(golden["logits"])).abs().max() > 1e-2


@torch.no_grad()
def test_the_cache_is_made_once_in_the_compute_type_and_refuses_to_overflow(c2i):
    model = tiny("class", c2i[1]).eval().to(torch.bfloat16)
    tokens, labels = torch.from_numpy(c2i[1]["tokens"]), torch.from_numpy(c2i[1]["labels"])
    _, cache = model.prefill(labels)
    memory = cache.layers[0]._keys
    for position in range(tokens.shape[1] - 1):
        model.decode(tokens[:, position], cache)
    assert memory is cache.layers[0]._keys
    assert memory.dtype == torch.bfloat16
    assert memory.shape == (3, 4, 16, 16)  # batch, heads, 1 class + 16 tokens - the last one, head dimension
    with pytest.raises(ValueError, match="position 17 of a cache for 16"):
        model.decode(tokens[:, -1], cache)


def live_bytes():
    gc.collect()
    return sum(x.untyped_storage().nbytes() for x in gc.get_objects() if type(x) is torch.Tensor)


@pytest.mark.parametrize("window", [1, pytest.param(4, marks=pytest.mark.long)])
def test_batch_after_batch_nothing_is_kept(c2i, window, monkeypatch):
    model, labels = c2i[0], torch.arange(6) % 3

    def kept(batches):
        before = live_bytes()
        for number in range(batches):
            generate(model, labels, seeds=labels + number, window=window, **OPTIONS)
        return live_bytes() - before

    kept(1)
    assert kept(5) == 0
    memory, plain = [], sampler.draw  # sabotage twin: the scores of every step, as LlamaGen keeps its probabilities
    monkeypatch.setattr(sampler, "draw", lambda scores, *given: memory.append(scores) or plain(scores, *given))
    assert kept(5) > 0


@pytest.mark.parametrize(("key", "options"), [("k7", (7, 1.0)), ("p8", (0, 0.8)), ("k20p5", (20, 0.5))])
def test_filters_equal_the_reference(key, options):
    golden = np.load(GOLDEN / "filter.npz")
    logits = torch.from_numpy(golden["logits"])
    assert np.array_equal(filter_logits(logits, *options).numpy(), golden[key])
    assert not np.array_equal(filter_logits(logits, options[0] + 1, options[1] - 0.2).numpy(), golden[key])


def test_ties_at_the_kth_place_are_kept():
    kept = filter_logits(torch.tensor([[3.0, 1.0, 1.0, 1.0, 0.0]]), top_k=2)
    assert torch.isfinite(kept).tolist() == [[True, True, True, True, False]]
    kept = filter_logits(torch.tensor([[0.6, 0.3, 0.1]]).log(), top_p=0.5)
    assert torch.isfinite(kept).tolist() == [[True, False, False]]


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 2**31 - 1), st.integers(0, 60), st.floats(0.05, 1.0))
def test_filters_keep_the_likeliest_and_never_nothing(seed, top_k, top_p):
    logits = torch.randn(3, 50, generator=torch.Generator().manual_seed(seed))
    kept = torch.isfinite(filter_logits(logits, top_k, top_p))
    assert kept.any(dim=-1).all()
    lowest = logits.masked_fill(~kept, torch.inf).min(dim=-1).values
    highest = logits.masked_fill(kept, -torch.inf).max(dim=-1).values
    assert (lowest > highest).all()
    if top_k:
        assert (kept.sum(dim=-1) <= top_k).all()


OPTIONS = {"cfg_scale": 2.0, "temperature": 1.0, "top_k": 60, "top_p": 0.95}


def test_a_picture_belongs_to_its_seed_not_to_its_place(c2i):
    model, _ = c2i
    labels, seeds = torch.arange(6) % 3, torch.arange(6) + (7 << 32)
    together = generate(model, labels, seeds=seeds, **OPTIONS)
    order = torch.tensor([4, 0, 5])
    assert torch.equal(generate(model, labels[order], seeds=seeds[order], **OPTIONS), together[order])
    assert torch.equal(generate(model, labels[3:4], seeds=seeds[3:4], **OPTIONS), together[3:4])
    assert len({tuple(row) for row in together.tolist()}) == 6
    shifted = generate(model, labels, seeds=seeds + 1, **OPTIONS)  # sabotage twin
    assert not any(torch.equal(a, b) for a, b in zip(shifted, together, strict=True))
    other = generate(model, labels, seeds=seeds + (1 << 32), **OPTIONS)
    assert not any(torch.equal(a, b) for a, b in zip(other, together, strict=True))


def test_dropping_the_null_half_changes_nothing(c2i, monkeypatch):
    model, _ = c2i
    labels = torch.arange(6) % 3
    wide = []
    decode = GPT.decode

    def watched(self, tokens, cache):
        wide.append(len(tokens))
        return decode(self, tokens, cache)

    monkeypatch.setattr(GPT, "decode", watched)
    found = generate(model, labels, cfg_interval=3, **OPTIONS)
    assert wide == [12] * 4 + [6] * 11
    assert torch.equal(found, kept_null_half(model, labels, 3))
    assert not torch.equal(found, kept_null_half(model, labels, 1))


@torch.no_grad()
def kept_null_half(model, labels, interval):
    """The same by whole sequences and without a cache: both halves are computed to the end."""
    streams = noise_streams(torch.arange(len(labels)))
    tokens = torch.zeros(len(labels), model.config.image_tokens, dtype=torch.int64)
    for position in range(model.config.image_tokens):
        logits = model(tokens, labels)[:, position]
        if position <= interval + 1:
            null = model(tokens, torch.full_like(labels, model.config.num_classes))[:, position]
            logits = null + 2.0 * (logits - null)
        tokens[:, position] = draw(logits, streams, position, 1.0, OPTIONS["top_k"], OPTIONS["top_p"])
    return tokens


def test_codes_come_as_often_as_their_probability():
    """20,000 draws against the softmax: chi-square with 7 degrees of freedom below its 99.9 % point."""
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0, 0.5, 0.5, -3.0, 1.5])
    n = 20_000
    drawn = draw(logits.expand(n, -1), noise_streams(torch.arange(n)), 3, 1.0, 0, 1.0)
    expected = n * logits.softmax(0).double()

    def chi_square(codes):
        return float(((torch.bincount(codes, minlength=8) - expected) ** 2 / expected).sum())

    assert chi_square(drawn) < 24.3
    hot = draw(logits.expand(n, -1), noise_streams(torch.arange(n)), 3, 1.1, 0, 1.0)  # sabotage twin
    assert chi_square(hot) > 24.3


def test_positions_have_noise_of_their_own():
    n = 4000
    streams, logits = noise_streams(torch.arange(n)), torch.zeros(n, 16)
    first, second = (draw(logits, streams, position, 1.0, 0, 1.0) for position in (0, 1))
    agree = (first == second).double().mean()
    assert abs(agree - 1 / 16) < 5 * (1 / 16 * 15 / 16 / n) ** 0.5
    assert torch.equal(first, draw(logits, streams, 0, 1.0, 0, 1.0))


def test_seeds_of_one_run_never_share_a_stream():
    numbers = torch.arange(200_000)
    keys = torch.cat([noise_streams(pictures.sample_seeds(3, block)) for block in numbers.split(50_000)])
    assert len(keys.unique()) == len(numbers)
    assert len(prng.stream(0, "sampling", numbers % 100_000).unique()) == 100_000  # what a repeat would look like


@pytest.mark.parametrize(
    "bad",
    [
        {"temperature": -1.0},
        {"top_k": -1},
        {"top_p": 0.0},
        {"top_p": 1.5},
        {"cfg_interval": -2},
        {"cfg_scale": -1.0},
        {"window": 0},
    ],
)
def test_numbers_out_of_range_are_refused(c2i, bad):
    with pytest.raises(ValueError, match=r"temperature|interval"):
        generate(c2i[0], torch.tensor([0]), **bad)


@pytest.mark.parametrize("options", [{}, {"top_k": 5}, {"temperature": 0.7, "top_k": 9}])
def test_the_untrained_baseline_is_what_an_untrained_gpt_draws(options):
    model = GPT(GPTConfig(2, 2, 32, vocab_size=48, image_tokens=16, num_classes=3, multiple_of=16)).initialize(4).eval()
    seeds = pictures.sample_seeds(1, torch.arange(20))
    how = pictures.Settings(cfg_scale=2.0, **options)
    expected = pictures.model_tokens(model, torch.arange(20) % 3, seeds, how)
    assert torch.equal(pictures.untrained_tokens(48, 16, seeds), expected)
    with torch.no_grad():
        model.output.weight.normal_()
    assert not torch.equal(pictures.model_tokens(model, torch.arange(20) % 3, seeds, how), expected)


def test_the_unigram_baseline_has_the_histogram():
    histogram = torch.tensor([0, 10, 30, 60])
    tokens = pictures.unigram_tokens(histogram, 64, pictures.sample_seeds(0, torch.arange(500)))
    share = torch.bincount(tokens.flatten(), minlength=4).double() / tokens.numel()
    assert share[0] == 0
    assert torch.allclose(share, histogram.double() / 100, atol=5 * (0.25 / tokens.numel()) ** 0.5)


def test_class_names_and_numbers():
    classes = ["T-shirt/top", "Trouser", "Bag", "7"]
    assert [class_number(name, classes) for name in ("bag", "Trouser", "0", "7")] == [2, 1, 0, 3]
    with pytest.raises(UserError, match=r"class 'trousers' is unknown; did you mean 'Trouser'\? \(one of T-shirt"):
        class_number("trousers", classes)
    with pytest.raises(UserError, match="class 4: there are 4 classes, 0 to 3"):
        class_number("4", classes)


def test_the_exact_name_comes_first_and_a_name_of_several_classes_is_refused_with_their_numbers():
    classes = ["Turkey", "crane", "turkey", "CRANE", "crane", "Bag"]
    assert [class_number(name, classes) for name in ("Turkey", "turkey", "CRANE", "bag", "4")] == [0, 2, 3, 5, 4]
    for name, numbers in (
        ("crane", r"2 classes: 1 \(crane\), 4 \(crane\)"),
        ("TURKEY", r"2 classes: 0 \(Turkey\), 2 \(turkey\)"),
        ("Crane", r"3 classes: 1 \(crane\), 3 \(CRANE\), 4 \(crane\)"),
    ):
        with pytest.raises(UserError, match=rf"class '{name}' is the name of {numbers}; give the number"):
            class_number(name, classes)


def test_the_grid_shows_each_class_in_its_row():
    images = np.zeros((6, 8, 8, 3), np.uint8)
    images[:] = (np.arange(6) * 40)[:, None, None, None]
    grid = np.asarray(class_grid(images, np.array([0, 1, 0, 1, 0, 1]), ["left <b>", "right"].__getitem__, per_class=3))
    tile = tile_side(8)
    assert tile == 72
    found = [[int(value) for value in np.unique(grid[row, -3 * (tile + 4) :])] for row in (40, 40 + tile + 4)]
    assert found == [[0, 80, 160, 255], [40, 120, 200, 255]]
    assert tile_side(32) == 96
    assert tile_side(256) == tile_side(1024) == 256
