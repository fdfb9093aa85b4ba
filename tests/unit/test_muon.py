"""Muon on one process, weight decay by group, and what a config may not say. Layouts: tests/ranks/test_muon.py."""

import re

import pytest
import torch

from llamagen_dist.config import GPTConfigFile, OptimSection, TokenizerConfigFile
from llamagen_dist.config.resume import between
from llamagen_dist.models.cost import total_parameters
from llamagen_dist.models.gpt import GPT, GPTConfig
from llamagen_dist.parallel import muon, optim
from llamagen_dist.parallel.engine import TorchEngine
from llamagen_dist.parallel.topology import Topology
from llamagen_dist.planning import memory

SMALL = {"n_layer": 2, "n_head": 4, "n_kv_head": 2, "dim": 32, "multiple_of": 16}
SIZES = GPTConfig(**SMALL, vocab_size=48, image_tokens=16, num_classes=5, qk_norm=True)
MUON = OptimSection(kind="muon", lr=1e-2, muon_lr=3e-2, weight_decay=0.1)


def model_of(sizes: GPTConfig = SIZES) -> GPT:
    model = GPT(sizes).initialize(0)
    for number, p in enumerate(model.parameters()):
        torch.nn.init.normal_(p, generator=torch.Generator().manual_seed(number))
    return model


def gradients(model: GPT, step: int) -> None:
    for number, p in enumerate(model.parameters()):
        p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(1000 * step + number))


def singular_values(matrix: torch.Tensor) -> torch.Tensor:
    return torch.linalg.svdvals(matrix.double()) / (muon.SCALE * max(matrix.shape) ** 0.5)


@pytest.mark.parametrize("shape", [(48, 48), (32, 80), (80, 32)])
def test_an_update_has_equal_singular_values_and_the_momentums_directions(shape):
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 1e-4  # gradients are small
    update = muon.orthogonalized(matrix)
    # the steps leave singular values between about 0.7 and 1.2, but for those that were next to nothing
    assert singular_values(update).quantile(0.1) > 0.6
    assert singular_values(update).max() < 1.25
    u, _, v = torch.linalg.svd(matrix.double(), full_matrices=False)
    assert torch.nn.functional.cosine_similarity((u @ v).flatten(), update.double().flatten(), dim=0) > 0.97
    assert update.square().mean().sqrt().item() == pytest.approx(muon.SCALE, rel=0.2), "whatever the shape"
    narrow = muon.orthogonalized(matrix, torch.bfloat16)
    assert (narrow - update).norm() < 0.3 * update.norm(), "but for the few directions that are below its rounding"
    assert not muon.orthogonalized(torch.zeros(shape)).any()


def test_too_few_steps_are_noticed(monkeypatch):
    """Sabotage twin."""
    monkeypatch.setattr(muon, "STEPS", 1)
    update = muon.orthogonalized(torch.randn(48, 48, generator=torch.Generator().manual_seed(0)))
    assert singular_values(update).quantile(0.1) < 0.6


def expected(weight: torch.Tensor, seen: list[torch.Tensor], pieces: list[int]) -> torch.Tensor:
    """A weight after Muon's steps on the gradients ``seen``, as one writes it first, in fp64."""
    weight, momentum = weight.double(), torch.zeros_like(weight, dtype=torch.float64)
    for gradient in seen:
        momentum = 0.95 * momentum + 0.05 * gradient.double()
        ahead = 0.05 * gradient.double() + 0.95 * momentum
        updates = []
        for part in ahead.split(pieces):
            x = part / part.norm()
            for _ in range(5):
                s = x @ x.T
                x = 3.4445 * x - 4.7750 * s @ x + 2.0315 * s @ s @ x
            updates.append(0.2 * max(part.shape) ** 0.5 * x)
        weight = weight * (1 - 3e-2 * 0.1) - 3e-2 * torch.cat(updates)
    return weight


def test_steps_are_those_of_the_formula_and_of_adamw():
    model, twin = model_of(), model_of()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    by_adamw = optim.build(twin, OptimSection(lr=1e-2, weight_decay=0.1))
    optimizer = optim.build(model, MUON, query_group=2)
    seen: dict[str, list[torch.Tensor]] = {name: [] for name in before}
    for step in range(3):
        for one, stepped in ((model, optimizer), (twin, by_adamw)):
            gradients(one, step)
            if one is model:
                for name, p in one.named_parameters():
                    seen[name].append(p.grad.clone())
            optim.set_learning_rate(stepped.param_groups, MUON, 0)
            stepped.step()
    taken = {name for name in before if muon.takes(name)}
    assert taken == {
        f"layers.{n}.{part}.weight"
        for n in (0, 1)
        for part in ("attention.wqkv", "attention.wo", "feed_forward.w1", "feed_forward.w2", "feed_forward.w3")
    }
    other = dict(twin.named_parameters())
    for name, p in model.named_parameters():
        if name not in taken:
            assert torch.equal(p, other[name]), name
            continue
        pieces = [32, 16, 16] if "wqkv" in name else [len(p)]
        # the formula takes tall matrices as they are, where the code takes their transpose: the same but for rounding
        wanted = expected(before[name], seen[name], pieces)
        assert (p - wanted).abs().max() < 1e-5, name
        if "wqkv" in name:
            assert (p - expected(before[name], seen[name], [64])).abs().max() > 1e-3, "sabotage twin: q, k and v as one"
        assert (p - expected(before[name], seen[name][::-1], pieces)).abs().max() > 1e-3, "sabotage twin: momentum"


def test_the_rate_of_muon_follows_the_schedule():
    section = OptimSection(kind="muon", lr=1e-3, muon_lr=2e-2, schedule="wsd", cooldown_from=100, cooldown_images=100)
    groups = optim.build(model_of(), section).param_groups
    for images, share in ((0, 1.0), (150, 0.5), (200, 0.0)):
        optim.set_learning_rate(groups, section, images)
        assert [group["lr"] for group in groups] == pytest.approx([1e-3 * share, 1e-3 * share, 2e-2 * share])
    assert optim.build(model_of(), OptimSection(kind="muon")).param_groups[-1][optim.RATE] == 1.0


def test_work_is_dealt_evenly_and_the_same_everywhere():
    shapes = {name: tuple(p.shape) for name, p in model_of().named_parameters() if muon.takes(name)}
    for ranks in (1, 3, 4, 16):
        makers = muon.deal(shapes, ranks)
        assert makers == muon.deal(dict(shapes), ranks)
        assert makers.keys() == shapes.keys()
        load = [sum(shapes[n][0] * shapes[n][1] for n, r in makers.items() if r == rank) for rank in range(ranks)]
        assert sum(load) == sum(a * b for a, b in shapes.values())
        assert max(load) <= sum(load) / ranks + max(a * b for a, b in shapes.values())


# --- groups ---


def decays(module: torch.nn.Module, section: OptimSection) -> dict[str, float]:
    name_of = {p: name for name, p in module.named_parameters()}
    built = optim.build(module, section)
    return {name_of[p]: group["weight_decay"] for group in built.param_groups for p in group["params"]}


def test_by_default_matrices_decay_and_vectors_do_not():
    model = model_of()
    built = optim.build(model, OptimSection())
    assert type(built) is torch.optim.AdamW
    assert [group["weight_decay"] for group in built.param_groups] == [0.05, 0.0]
    assert [group["params"] for group in built.param_groups] == [
        [p for p in model.parameters() if p.dim() >= 2],
        [p for p in model.parameters() if p.dim() < 2],
    ], "in the order of today's flat partitions"


def test_decay_can_be_set_by_group():
    found = decays(model_of(), OptimSection(embedding_decay=0.0, norm_decay=0.01))
    assert {n for n, rate in found.items() if rate == 0.0} == {
        "tok_embeddings.weight",
        "cls_embedding.embedding_table.weight",
    }
    assert {n for n, rate in found.items() if rate == 0.01} == {n for n in found if "norm" in n}
    assert found["output.weight"] == found["layers.0.attention.wo.weight"] == 0.05
    plain = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.LayerNorm(2))
    found = decays(plain, OptimSection(bias_decay=0.5, embedding_decay=1.0))
    assert found == {"0.weight": 0.05, "0.bias": 0.5, "1.weight": 0.0, "1.bias": 0.5}
    captions = GPT(GPTConfig(**SMALL, vocab_size=48, image_tokens=16, condition="text", caption_dim=8))
    assert decays(captions, OptimSection(embedding_decay=0.0))["cls_embedding.cap_proj.fc1.weight"] == 0.05


# --- configs ---


def config(**sections) -> GPTConfigFile:
    base = {"kind": "gpt", "run_dir": "x", "data": {"train": "a", "validation": "b"}, "train": {"images": 256}}
    return GPTConfigFile.model_validate({**base, "model": SMALL, **sections})


def test_what_cannot_be_is_refused_by_name():
    with pytest.raises(ValueError, match="muon_lr: kind: adamw has no Muon; set kind: muon beside it"):
        config(optim={"muon_lr": 0.01})
    with pytest.raises(ValueError, match="muon trains the matrices of a GPT's blocks, and a tokenizer has none"):
        TokenizerConfigFile.model_validate(
            {
                "kind": "tokenizer",
                "run_dir": "x",
                "model": {"size": "VQ-16"},
                "data": {"train": "a", "validation": "b", "image_size": 256},
                "train": {"images": 256},
                "optim": {"kind": "muon"},
            }
        )
    assert config(optim={"kind": "muon", "muon_lr": 0.01}).optim.kind == "muon"


@pytest.mark.parametrize(
    ("sections", "line"),
    [
        ({"optim": {"kind": "muon"}}, "optim.kind: adamw -> muon"),
        ({"optim": {"norm_decay": 0.1}}, "optim.norm_decay: 0.0 -> 0.1"),
        ({"model": {**SMALL, "qk_norm": True}}, "model.qk_norm: false -> true"),
        ({"model": {**SMALL, "z_loss": 1e-4}}, "model.z_loss: 0.0 -> 0.0001"),
    ],
)
def test_a_run_cannot_go_on_with_a_switch_changed(sections, line):
    change = between(config(), config(**sections))
    assert re.sub("True", "true", re.sub("False", "false", "; ".join(change.refused))) == line
    assert between(config(**sections), config(**sections)).refused == (), "sabotage twin: nothing changed"


# --- the plan ---


def test_the_plan_knows_the_smaller_state_and_the_new_parameters():
    model = model_of()
    assert total_parameters(SIZES) == sum(p.numel() for p in model.parameters())
    held = TorchEngine(model, MUON, Topology()).held_bytes()
    assert memory.state(SIZES, memory.Layout(muon=True))["moments"] == held["moments"]
    assert memory.state(SIZES, memory.Layout())["moments"] > 1.3 * held["moments"], "sabotage twin: AdamW's"
    taken = sum(p.nbytes for name, p in model.named_parameters() if muon.takes(name))
    assert memory.by_muon(SIZES) * 4 == taken
    assert memory.checkpoint_bytes(SIZES, 0) - memory.checkpoint_bytes(SIZES, 0, muon=True) == taken
