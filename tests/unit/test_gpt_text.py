"""Captions: padding moved behind the image, and one cache slot for a whole caption, against a mask per sample."""

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from llamagen_dist.models import gpt as gpt_module
from llamagen_dist.models.cache import Cache
from llamagen_dist.models.gpt import GPT, GPTConfig, rotary_table, sequence_order
from llamagen_dist.models.sizes import GPT_SIZES
from llamagen_dist.sampling.sampler import generate
from tests.plain_gpt import PlainGPT
from tests.unit.test_gpt import NO_DROPOUT, recipe

GOLDEN = Path(__file__).parent.parent / "golden"
LENGTHS = (6, 3, 1, 4)  # of the captions, in 6 places
KINDS = [
    {},
    {"n_kv_head": 2},
    {"prefix_rotation": "identity"},
    {"prefix_rotation": "identity", "n_kv_head": 1},
]


def text_model(**options) -> GPT:
    config = GPTConfig(
        n_layer=3,
        n_head=4,
        dim=64,
        vocab_size=96,
        image_tokens=16,
        condition="text",
        prefix_tokens=6,
        caption_dim=32,
        multiple_of=32,
        initializer_range=0.3,  # attention that is far from uniform
        **NO_DROPOUT,
        **options,
    )
    model = GPT(config).initialize(1)
    torch.nn.init.normal_(model.output.weight, std=0.3, generator=torch.Generator().manual_seed(2))
    return model


def batch() -> tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor]]:
    draw = torch.Generator().manual_seed(3)
    present = torch.arange(6) >= 6 - torch.tensor(LENGTHS)[:, None]
    features = torch.randn(len(LENGTHS), 6, 32, generator=draw)  # what lies in the padding must not matter
    return torch.randint(96, (len(LENGTHS), 16), generator=draw), (features, present)


def gradients(model: torch.nn.Module, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    found = torch.autograd.grad(loss, list(model.parameters()))
    return dict(zip((name for name, _ in model.named_parameters()), found, strict=True))


def distance(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    """Largest difference of a gradient over its largest entry."""
    return max(float((one[name] - other[name]).abs().max() / other[name].abs().max()) for name in other)


def plain_of(model: GPT) -> PlainGPT:
    plain = PlainGPT(model.config)
    plain.load_state_dict(model.state_dict())
    return plain


@pytest.mark.parametrize("options", KINDS, ids=str)
def test_logits_losses_and_gradients_equal_those_of_a_mask_per_sample(options):
    model, (tokens, caption) = text_model(**options), batch()
    plain = plain_of(model)
    assert torch.allclose(model(tokens, caption), plain(tokens, caption), atol=1e-4)
    loss, expected = model.loss(tokens, caption), plain.loss(tokens, caption)
    assert abs(loss.item() - expected.item()) < 1e-5
    found, wanted = gradients(model, loss), gradients(plain, expected)
    assert distance(found, wanted) < 1e-4
    model.recompute_every = 2
    again = gradients(model, model.loss(tokens, caption))
    assert all(torch.equal(again[name], found[name]) for name in found)


def test_bf16_is_as_near_as_bf16_is():
    model, (tokens, (features, present)) = text_model(), batch()
    exact = model(tokens, (features, present))
    half = text_model().to(torch.bfloat16)
    assert half.rotary.dtype == torch.float32
    assert torch.equal(half.rotary, model.rotary)
    found = half(tokens, (features, present)).float()
    mask = plain_of(model).to(torch.bfloat16)(tokens, (features.bfloat16(), present))
    assert (found - exact).abs().mean() < 1.5 * (mask - exact).abs().mean()


def sabotaged(monkeypatch, what: str) -> None:
    if what == "padding is left where it is":
        order = gpt_module.sequence_order
        monkeypatch.setattr(gpt_module, "sequence_order", lambda present, n: order(torch.ones_like(present), n))
    if what == "the other rotation":
        table = rotary_table

        def identity(config: GPTConfig) -> torch.Tensor:
            found = table(config)
            found[: config.prefix, :, 0] = 1.0
            return found

        monkeypatch.setattr(gpt_module, "rotary_table", identity)
    if what == "one position too late":
        rows = gpt_module.rows_of
        monkeypatch.setattr(gpt_module, "rows_of", lambda x, at: rows(x, (at + 1) % x.shape[1]))


@pytest.mark.parametrize("what", ["padding is left where it is", "the other rotation", "one position too late"])
def test_a_wrong_treatment_of_the_prefix_is_noticed(monkeypatch, what):
    tokens, caption = batch()
    expected = plain_of(text_model())(tokens, caption)
    sabotaged(monkeypatch, what)
    assert (text_model()(tokens, caption) - expected).abs().max() > 1e-2


def test_order_of_a_padded_sequence():
    present = torch.tensor([[False, False, True], [True, True, True], [False, True, True]])
    assert sequence_order(present, 2).tolist() == [[2, 3, 4, 0, 1], [0, 1, 2, 3, 4], [1, 2, 3, 4, 0]]


def decoded(model: GPT, tokens: torch.Tensor, caption) -> tuple[torch.Tensor, Cache]:
    logits, cache = model.prefill(caption)
    found = [logits]
    for position in range(tokens.shape[1] - 1):
        found.append(model.decode(tokens[:, position], cache))
    return torch.stack(found, dim=1), cache


@torch.no_grad()
@pytest.mark.parametrize("options", KINDS, ids=str)
def test_cached_decoding_equals_the_whole_sequence(options):
    model, (tokens, caption) = text_model(**options).eval(), batch()
    found, cache = decoded(model, tokens, caption)
    assert torch.allclose(found, plain_of(model)(tokens, caption), atol=1e-4)
    slots = 16 if model.config.prefix_rotation == "zero" else 6 + 15
    keys = cache.layers[0]._keys
    assert keys.shape == (len(LENGTHS), model.config.kv_heads, slots, 16)


@torch.no_grad()
def test_decoding_with_a_wrong_caption_length_is_noticed(monkeypatch):
    model, (tokens, caption) = text_model().eval(), batch()
    expected = plain_of(model)(tokens, caption)
    made = Cache.__init__

    def one_more(self, *arguments):
        made(self, *arguments)
        self._hidden = (self._hidden.exp() + 1).log()

    monkeypatch.setattr(Cache, "__init__", one_more)
    assert (decoded(model, tokens, caption)[0] - expected).abs().max() > 1e-2


def test_an_empty_caption_still_draws_an_image():
    model, (tokens, (features, present)) = text_model().eval(), batch()
    nothing = torch.zeros_like(present)
    with torch.no_grad():
        found, _ = decoded(model, tokens, (features, nothing))
        assert torch.allclose(found, model(tokens, (features, nothing)), atol=1e-4)
    drawn = generate(model, (features, nothing), cfg_scale=2.0, temperature=0.0)
    assert drawn.shape == tokens.shape


@pytest.mark.long
def test_gpt_b_with_captions_matches_the_reference_at_full_size():
    golden = np.load(GOLDEN / "gptb_t2i_recipe.npz")
    features = torch.from_numpy(golden["caption"]).float()
    lengths = torch.from_numpy(golden["caption_lengths"]).long()
    config = GPTConfig(**GPT_SIZES["GPT-B"], condition="text", **NO_DROPOUT)
    model = GPT(config)
    with torch.no_grad():
        recipe(model)
        present = torch.arange(config.prefix) >= config.prefix - lengths[:, None]
        assert not present.all(), "the golden captions are padded"
        tokens = torch.from_numpy(golden["tokens"])
        logits = model(tokens, (features, present))
        assert torch.allclose(logits[:, ::17, ::997], torch.from_numpy(golden["logits_head"]), atol=1e-4)
        loss = F.cross_entropy(logits.flatten(0, 1), tokens.flatten())
        assert abs(loss.item() - float(golden["loss"])) < 1e-5
        blind = model.loss(tokens, (features, torch.ones_like(present)))
    assert abs(blind.item() - float(golden["loss"])) > 1e-4, "sabotage twin: padding that is seen"
