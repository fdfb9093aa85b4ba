"""``guidance: free``: the loss in training, one pass in sampling, and which guidance belongs to which model."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llamagen_dist.config import GPTModelSection, SampleConfig, SearchConfig
from llamagen_dist.config.section import build
from llamagen_dist.data.batch import TokenBatch
from llamagen_dist.errors import UserError
from llamagen_dist.evaluation.search import grid, next_point
from llamagen_dist.models.gpt import GPT
from llamagen_dist.report.search import verdict
from llamagen_dist.sampling.guidance import misguided
from llamagen_dist.sampling.pictures import Settings
from llamagen_dist.sampling.sampler import generate
from llamagen_dist.training.gpt_task import training_beta
from tests.unit.test_gpt import NO_DROPOUT
from tests.unit.test_gpt_text import batch, text_model
from tests.unit.test_gpt_training import IDS, LABELS, TOKENS, small

BETA = torch.tensor([0.0, 0.3, 0.66, 1.0])


def class_model(**options) -> tuple[GPT, Tensor, Tensor]:
    return small(**{"guidance": "free", **NO_DROPOUT, **options}), TOKENS, LABELS


def caption_model(**options):
    tokens, caption = batch()
    return text_model(**{"guidance": "free", **options}), tokens, caption


MODELS = [class_model, caption_model]


def embedded(model: GPT) -> GPT:
    nn.init.normal_(model.beta_embedding.fc2.weight, std=0.2, generator=torch.Generator().manual_seed(9))
    return model


def formula(model: GPT, tokens: Tensor, condition, through_null: bool = False) -> Tensor:
    logits, null = model(tokens, condition, beta=BETA), model(tokens, model.null_condition(condition))
    share = BETA[:, None, None]
    both = share * logits + (1 - share) * (null if through_null else null.detach())
    return F.cross_entropy(both.flatten(0, 1), tokens.flatten())


def gradients(model: GPT, loss: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(loss, list(model.parameters())))


def close(one: list[Tensor], other: list[Tensor]) -> bool:
    return all(torch.allclose(a, b, atol=1e-5) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("make", MODELS)
def test_the_loss_and_its_gradients_are_those_of_the_formula(make):
    model, tokens, condition = make()
    embedded(model)
    loss, expected = model.loss(tokens, condition, beta=BETA), formula(model, tokens, condition)
    assert torch.allclose(loss, expected, atol=1e-5)
    right = gradients(model, expected)
    assert close(gradients(model, loss), right)
    assert not close(gradients(model, formula(model, tokens, condition, through_null=True)), right), "sabotage twin"
    assert not torch.allclose(model.loss(tokens, condition), expected, atol=1e-3), "sabotage twin: not mixed"


def test_the_null_branch_is_computed_as_in_sampling():
    """Without dropout, whatever the other branch drops; and recomputation changes no bit."""
    model = embedded(small(guidance="free"))
    zero = torch.zeros(4)
    with torch.no_grad():
        quiet = GPT(replace(model.config, **NO_DROPOUT))
        quiet.load_state_dict(model.state_dict())
        expected = quiet.loss(TOKENS, quiet.null_condition(LABELS))
    assert torch.allclose(model.loss(TOKENS, LABELS, IDS, beta=zero), expected, atol=1e-6)
    before = model.loss(TOKENS, LABELS, IDS, beta=BETA)
    found = gradients(model, before)
    model.recompute_every = 1
    again = model.loss(TOKENS, LABELS, IDS, beta=BETA)
    assert torch.equal(again, before)
    assert all(map(torch.equal, gradients(model, again), found))


@pytest.mark.parametrize("make", MODELS)
@torch.no_grad()
def test_the_embedding_starts_neutral(make):
    model, tokens, condition = make()
    plain, _, _ = make(guidance="dropout")
    plain.load_state_dict({k: p for k, p in model.state_dict().items() if not k.startswith("beta_embedding")})
    assert torch.equal(model(tokens, condition, beta=BETA), plain(tokens, condition))
    assert not torch.equal(embedded(model)(tokens, condition, beta=BETA), plain(tokens, condition)), "sabotage twin"


@pytest.mark.parametrize("make", MODELS)
@pytest.mark.parametrize("window", [1, 5])
@torch.no_grad()
def test_sampling_takes_one_pass_with_its_beta(make, window, monkeypatch):
    model, _, condition = make()
    embedded(model).eval()
    passes, prefill = [], GPT.prefill

    def counted(self, given, *rest, **named):
        passes.append(len(given[0] if isinstance(given, tuple) else given))
        return prefill(self, given, *rest, **named)

    monkeypatch.setattr(GPT, "prefill", counted)
    greedy = {"temperature": 0.0, "window": window}
    found = generate(model, condition, beta=0.4, **greedy)
    whole = model(found, condition, beta=torch.full((len(found),), 0.4))
    assert torch.equal(whole.argmax(-1), found), "what the whole sequence predicts"
    assert torch.equal(generate(model, condition, **greedy), generate(model, condition, beta=1.0, **greedy))
    assert not torch.equal(generate(model, condition, **greedy), found), "sabotage twin: without its beta"
    assert passes == [len(found)] * 4, "no null half"


def test_beta_is_uniform_by_position_and_one_where_the_condition_is_dropped():
    model, _, _ = class_model()
    whole = TokenBatch(torch.zeros(4000, 16), torch.zeros(4000), torch.arange(4000))
    beta = training_beta(model, whole, 3)
    assert beta.histc(10, 0, 1).tolist() == pytest.approx([400] * 10, abs=80), "4 deviations of 400 draws"
    pieces = [training_beta(model, piece, 3) for piece in whole.split(1000)]
    assert torch.equal(torch.cat(pieces), beta)
    assert not torch.equal(training_beta(model, whole, 4), beta)
    dropped = torch.arange(4000) % 10 == 0
    assert torch.equal(training_beta(model, replace(whole, dropped=dropped), 3), torch.where(dropped, 1.0, beta))
    assert training_beta(small(), whole, 3) is None


# --- which guidance is meant ---


@pytest.mark.parametrize(
    ("guidance", "scale", "beta", "reason"),
    [
        ("free", 2.0, None, "has no guidance scale: instead of cfg_scale 2 set cfg_scale 1 and beta, such as 0.5"),
        ("free", 2.0, 0.5, "has no guidance scale"),
        ("dropout", 1.0, 0.5, "belongs to a GPT that was trained guidance-free .* set cfg_scale, such as 2 for"),
        ("free", 1.0, 1.5, "beta 1.5 must lie above 0 and not above 1"),
        ("free", 1.0, 0.5, None),
        ("free", 1.0, None, None),
        ("dropout", 2.0, None, None),
    ],
)
def test_the_guidance_of_another_kind_of_model_is_refused(guidance, scale, beta, reason):
    model = small(guidance=guidance, **NO_DROPOUT)
    found = misguided(model.config, scale, beta)
    if reason is None:
        assert found is None
        return
    with pytest.raises(ValueError, match=reason):
        generate(model, LABELS, cfg_scale=scale, beta=beta)


def test_settings_and_configs_that_make_no_sense_are_refused():
    with pytest.raises(ValueError, match="beta 0"):
        Settings(beta=0.0)
    files = {"checkpoint": "c", "tokenizer": "t", "out": "o"}
    with pytest.raises(UserError, match=r"beta: 0\.5 takes the place of cfg_scale, which is 2\.0; set cfg_scale to 1"):
        build(SampleConfig, {"kind": "sample", **files, "beta": 0.5}, "x.yaml")
    assert build(SampleConfig, {"kind": "sample", **files, "beta": 0.5, "cfg_scale": 1}, "x.yaml").beta == 0.5
    with pytest.raises(ValueError, match="guidance: free needs samples without their condition"):
        GPTModelSection(size="GPT-B", guidance="free", class_dropout_p=0.0)
    assert GPTModelSection(size="GPT-B", guidance="free").class_dropout_p == 0.1


def test_a_search_goes_over_betas_as_over_scales():
    base = {"kind": "search", "checkpoint": "c", "tokenizer": "t", "reference": "r", "out": "o"}
    config = build(SearchConfig, {**base, "grid": {"beta": [0.5, 0.8, 1.0]}}, "x.yaml")
    points = grid(config)
    assert [point.cfg_scale for point in points] == [1.0, 1.25, 2.0]
    assert [point.settings["beta"] for point in points] == [1.0, 0.8, 0.5]
    assert {(p.settings["cfg_scale"], p.settings["guidance"]) for p in points} == {(1.0, "constant")}
    assert sorted(config.guidances()) == [(1.0, 0.5), (1.0, 0.8), (1.0, 1.0)]
    finer = next_point(config, dict(zip(points, [5.0, 3.0, 4.0], strict=True)))
    assert finer is not None
    assert (finer.cfg_scale, finer.settings["beta"]) == (1.625, 0.6154), "between the best scale and a neighbour"
    best = {**finer._asdict(), "mean": 3.0, "sd": None, "indistinct": None}
    assert "guidance free, scale 1.625" in verdict({"metric": "fid", "best": {"fid": best}})
    assert "; as beta 0.6154." in verdict({"metric": "fid", "best": {"fid": best}})
    with pytest.raises(UserError, match=r"grid\.beta: has no schedule"):
        build(SearchConfig, {**base, "grid": {"beta": [0.5, 1.0], "guidance": ["linear"]}}, "x.yaml")
