"""``order: rar``: which orders there are and when, and a model that follows any of them."""

from collections import Counter
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from llamagen_dist.config import GPTConfigFile
from llamagen_dist.config.resume import between
from llamagen_dist.config.section import build
from llamagen_dist.errors import UserError
from llamagen_dist.models.gpt import GPT
from llamagen_dist.models.sizes import TARGET_POSITIONS
from llamagen_dist.sampling.sampler import generate
from llamagen_dist.training.token_order import TokenOrder
from tests.plain_gpt import PlainGPT
from tests.unit.test_gpt import NO_DROPOUT
from tests.unit.test_gpt_text import batch, text_model
from tests.unit.test_gpt_training import LABELS, TOKENS, small
from tests.unit.test_sampler import cached_logits

N = 16


# --- the order, by position in the data ---


def test_orders_are_permutations_and_all_of_them_equally_likely():
    orders = TokenOrder(0, 4, 10**6, 10**6).at(torch.arange(24_000))
    counts = Counter(map(tuple, orders.tolist()))
    assert len(counts) == 24
    # 23 degrees of freedom: chi-square is above 50 once in a thousand seeds, and the seed is fixed
    assert sum((n - 1000) ** 2 / 1000 for n in counts.values()) < 50
    assert set(map(tuple, TokenOrder(0, N, 1, 1).at(torch.arange(3)).sort(dim=1).values.tolist())) == {tuple(range(N))}


def test_a_permutation_that_is_not_uniform_is_noticed():
    """Sabotage twin: rotations are permutations too."""
    shifts = torch.arange(24_000)[:, None] % 4
    counts = Counter(map(tuple, ((torch.arange(4) + shifts) % 4).tolist()))
    assert sum((counts[order] - 1000) ** 2 / 1000 for order in counts) > 50


def test_the_share_of_random_orders_falls_as_configured():
    order = TokenOrder(3, N, 4000, 8000)
    assert order.share(torch.tensor([0, 4000, 5000, 7999, 8000, 10**12])).tolist() == [1, 1, 0.75, 1 / 4000, 0, 0]
    random = (order.at(torch.arange(12_000)) != torch.arange(N)).any(dim=1).double().view(6, 2000).mean(dim=1)
    assert random[:2].tolist() == [1, 1]
    assert random[4:].tolist() == [0, 0]
    assert random[2:4].tolist() == pytest.approx([0.75, 0.25], abs=0.04), "4 deviations of 2,000 draws"
    step = TokenOrder(3, N, 50, 50)
    assert step.share(torch.tensor([49, 50])).tolist() == [1, 0]
    assert [step.settled(n) for n in (0, 49, 50, 51)] == [False, False, True, True]


def test_an_order_depends_on_seed_and_position_alone():
    order = TokenOrder(7, N, 100, 100)
    together = order.at(torch.arange(20))
    assert torch.equal(torch.cat([order.at(torch.arange(n, n + 4)) for n in range(0, 20, 4)]), together)
    assert not torch.equal(replace(order, seed=8).at(torch.arange(20)), together)
    assert order.at(torch.tensor([5]))[0].tolist() == [11, 13, 14, 3, 8, 4, 2, 12, 9, 5, 7, 15, 10, 1, 6, 0], (
        "a change would silently reorder old runs"
    )


# --- the model ---


def class_model(**options) -> tuple[GPT, Tensor, Tensor]:
    return small(order="rar", **NO_DROPOUT, **options).eval(), TOKENS, LABELS


def caption_model(**options):
    tokens, caption = batch()
    return text_model(order="rar", **options).eval(), tokens, caption


MODELS = [class_model, caption_model]


def with_table(model: GPT) -> GPT:
    nn.init.normal_(model.target_positions.weight, std=0.3, generator=torch.Generator().manual_seed(9))
    return model


def raster_twin(model: GPT) -> GPT:
    twin = GPT(replace(model.config, order="raster"))
    twin.load_state_dict({name: p for name, p in model.state_dict().items() if name != TARGET_POSITIONS})
    return twin.eval()


class Adds(nn.Module):
    def __init__(self, what: Tensor) -> None:
        super().__init__()
        self.what = what

    def forward(self, x: Tensor) -> Tensor:
        return x + self.what


def plain_logits(model: GPT, tokens: Tensor, condition, positions: Tensor) -> Tensor:
    """Sample by sample, with a rotary table and input vectors that are put in its own order beforehand."""
    found, prefix = [], model.config.prefix
    for number, own in enumerate(positions):
        plain = PlainGPT(model.config)
        own_names = plain.state_dict().keys()  # without the null caption
        plain.load_state_dict({name: p for name, p in model.state_dict().items() if name in own_names})
        plain.table = torch.cat([model.rotary[:prefix], model.rotary[prefix:][own]])
        aims = model.target_positions.weight[own]
        plain.dropout = Adds(torch.cat([aims.new_zeros(prefix - 1, aims.shape[1]), aims]))
        one = slice(number, number + 1)
        given = (condition[0][one], condition[1][one]) if isinstance(condition, tuple) else condition[one]
        found.append(plain.eval()(tokens[one], given))
    return torch.cat(found)


@pytest.mark.parametrize("make", MODELS)
@pytest.mark.parametrize("options", [{}, {"n_kv_head": 2, "prefix_rotation": "identity"}], ids=str)
@torch.no_grad()
def test_any_order_equals_a_plain_model_put_in_that_order(make, options):
    model, tokens, condition = make(**options)
    with_table(model)
    positions = TokenOrder(1, N, 100, 100).at(torch.arange(len(tokens)))
    expected = plain_logits(model, tokens, condition, positions)
    assert torch.allclose(model(tokens, condition, None, positions), expected, atol=1e-4)
    other = TokenOrder(2, N, 100, 100).at(torch.arange(len(tokens)))
    assert not torch.allclose(model(tokens, condition, None, other), expected, atol=1e-2), "the order must matter"
    # sabotage twin: tokens turn with their number in the sequence
    model.rotary[model.config.prefix :][positions[0]] = model.rotary[model.config.prefix :].clone()
    assert not torch.allclose(model(tokens, condition, None, positions), expected, atol=1e-2)


@pytest.mark.parametrize("make", MODELS)
@torch.no_grad()
def test_nothing_is_seen_before_its_turn(make):
    model, tokens, condition = make()
    with_table(model)
    positions = TokenOrder(1, N, 100, 100).at(torch.arange(len(tokens)))
    before = model(tokens, condition, None, positions)
    changed = tokens.clone()
    changed[:, 7] = (changed[:, 7] + 1) % 96
    after = model(changed, condition, None, positions)
    assert torch.allclose(before[:, :8], after[:, :8], atol=1e-5)
    assert not torch.allclose(before[:, 8:], after[:, 8:], atol=1e-3)


@pytest.mark.parametrize("make", MODELS)
@torch.no_grad()
def test_the_table_starts_neutral_and_is_off_exactly(make):
    model, tokens, condition = make()
    expected = raster_twin(model)(tokens, condition)
    assert torch.equal(model(tokens, condition), expected), "its initial value is zero"
    with_table(model)
    assert not torch.allclose(model(tokens, condition), expected, atol=1e-2), "sabotage twin: left on"
    model.target_positions.shown = False
    assert torch.equal(model(tokens, condition), expected)
    assert torch.equal(generate(model, condition), generate(raster_twin(model), condition))


def test_a_table_that_is_off_has_a_gradient_of_zero():
    model = with_table(small(order="rar", **NO_DROPOUT))
    model.loss(TOKENS, LABELS).backward()
    assert model.target_positions.weight.grad.abs().min() > 0
    model.zero_grad()
    model.target_positions.shown = False
    model.loss(TOKENS, LABELS).backward()
    assert model.target_positions.weight.grad.abs().max() == 0, "none at all would stop the engines"


@pytest.mark.parametrize("make", MODELS)
@torch.no_grad()
def test_sampling_follows_the_raster_order_with_its_targets(make):
    model, tokens, condition = make()
    with_table(model)
    whole = model(tokens, condition)
    assert torch.allclose(cached_logits(model, tokens, condition), whole, atol=1e-4)
    plain = generate(model, condition, cfg_scale=2.0)
    assert torch.equal(generate(model, condition, cfg_scale=2.0, window=5), plain)
    # sabotage twin: a table that is one position off
    model.target_positions.weight.copy_(model.target_positions.weight.roll(1, 0))
    assert not torch.allclose(cached_logits(model, tokens, condition), whole, atol=1e-2)


# --- config ---


def config(order: str, **train: int) -> GPTConfigFile:
    data = {
        "kind": "gpt",
        "run_dir": "unused",
        "model": {"size": "GPT-B", "order": order},
        "data": {"train": "unused", "validation": "unused"},
        "train": {"images": 2560, **train},
    }
    return build(GPTConfigFile, data, "x.yaml")


@pytest.mark.parametrize(
    ("order", "train", "reason"),
    [
        ("rar", {}, r"train\.anneal_until: model\.order: rar needs the image"),
        ("raster", {"anneal_until": 512}, r"train\.anneal_until: belongs to model\.order: rar"),
        ("rar", {"anneal_from": 1024, "anneal_until": 512}, r"train: anneal_until must not lie before anneal_from"),
        ("random", {}, r"model\.order: "),
    ],
)
def test_switches_that_contradict_each_other_are_refused(order, train, reason):
    with pytest.raises(UserError, match=reason):
        config(order, **train)


def test_a_run_cannot_be_resumed_with_a_switch_changed():
    rar = config("rar", anneal_from=1024, anneal_until=1536)
    assert "model.order: raster -> rar" in between(config("raster"), rar).refused
    assert between(rar, config("rar", anneal_from=1024, anneal_until=2048)).refused == (
        "train.anneal_until: 1536 -> 2048",
    )
    free = GPTConfigFile.model_validate(
        {**rar.model_dump(), "model": {"size": "GPT-B", "order": "rar", "guidance": "free"}}
    )
    assert between(rar, free).refused == ("model.guidance: dropout -> free",)
    assert between(rar, config("rar", anneal_from=1024, anneal_until=1536)).refused == (), "sabotage twin: no change"


def test_a_right_order_is_taken():
    assert config("rar", anneal_from=1024, anneal_until=1536).train.anneal_until == 1536
