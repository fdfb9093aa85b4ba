"""Every quantizer against a plain second implementation: values, gradients, codes, losses, averages."""

import itertools
import math
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from llamagen_dist.config import TokenizerConfigFile, TokenizerModelSection
from llamagen_dist.config.section import build
from llamagen_dist.errors import UserError
from llamagen_dist.hub.export import tokenizer_source
from llamagen_dist.models import learned_codebooks
from llamagen_dist.models.fixed_codebooks import FSQ, IFSQ, LFQ
from llamagen_dist.models.learned_codebooks import EMAQuantizer, IndexBackpropagationQuantizer
from llamagen_dist.models.quantizer import Quantizer, VectorQuantizer
from llamagen_dist.models.quantizers import make_quantizer, quantizer_of
from llamagen_dist.models.sizes import VQConfig
from llamagen_dist.models.vq import VQModel
from llamagen_dist.sampling.load import load_tokenizer

SMALL = VQConfig(channels=8, channel_multipliers=(1, 2), res_blocks=1, z_channels=8, codebook_size=32, codebook_dim=4)
SIZES: dict[str, dict[str, Any]] = {
    "vq": {},
    "ema": {},
    "ibq": {"l2_norm": False},
    "fsq": {"levels": (4, 3, 5), "codebook_size": 60, "codebook_dim": 8},
    "ifsq": {"levels": (4, 3, 5), "codebook_size": 60, "codebook_dim": 8},
    "lfq": {"codebook_size": 32, "codebook_dim": 8, "entropy_temperature": 1.0},
}


def config(kind: str) -> VQConfig:
    return replace(SMALL, quantizer=kind, **SIZES[kind])  # type: ignore[arg-type]


def latents(channels: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    return scale * torch.randn(2, channels, 3, 4, generator=torch.Generator().manual_seed(seed))


def rows_of(z: Tensor) -> Tensor:
    return z.permute(0, 2, 3, 1).reshape(-1, z.shape[1])


def gradients(loss: Tensor, *of: Tensor) -> list[Tensor]:
    found = torch.autograd.grad(loss, of, allow_unused=True, retain_graph=True)
    return [torch.zeros_like(t) if g is None else g for t, g in zip(of, found, strict=True)]


# --- the interface ---


@pytest.mark.parametrize("kind", SIZES)
def test_codes_become_vectors_and_codes_again(kind):
    torch.manual_seed(0)
    quantizer = make_quantizer(config(kind)).eval()
    every = torch.arange(quantizer.codebook_size).view(1, -1, 1)
    if kind == "ibq":  # the largest dot product is a vector's own only among vectors of one length
        quantizer.embedding.weight.data = F.normalize(quantizer.embedding.weight.data, dim=-1)
    vectors = quantizer.lookup(every)
    assert vectors.shape == (1, quantizer.codebook_dim, quantizer.codebook_size, 1)
    assert len(torch.unique(rows_of(vectors), dim=0)) == quantizer.codebook_size
    assert quantizer.bits == math.log2(quantizer.codebook_size)
    assert 2**quantizer.bits == pytest.approx(len(every.flatten()))
    if isinstance(quantizer, FSQ):  # latents that land on each level: the inverse of its bound
        half, offset = (quantizer.levels - 1) * 0.999 / 2, 0.5 * (quantizer.levels % 2 == 0)
        y = rows_of(vectors) * (quantizer.levels // 2) * 0.999  # just inside the outermost
        rows = (torch.atanh(((y + offset) / half).clamp(-0.9999, 0.9999)) - torch.tan(offset / half)) / quantizer.slope
    else:
        rows = rows_of(vectors)
    assert torch.equal(quantizer.nearest(rows), every.flatten())
    z = rows.t().reshape(1, quantizer.codebook_dim, -1, 1)
    quantised, _, codes = quantizer(z)
    assert torch.equal(codes, every)
    assert torch.allclose(quantised, vectors, atol=1e-6)


@pytest.mark.parametrize("kind", SIZES)
def test_autocast_changes_neither_codes_nor_types(kind):
    torch.manual_seed(0)
    quantizer = make_quantizer(config(kind))
    z = latents(quantizer.codebook_dim).bfloat16()
    expected, _, codes = quantizer(z.float(), entropy="entropy" in quantizer.losses)
    with torch.autocast("cpu", torch.bfloat16):
        quantised, losses, again = quantizer(z, entropy="entropy" in quantizer.losses)
    assert torch.equal(again, codes)
    assert torch.equal(quantised, expected)
    assert {name for name, value in losses._asdict().items() if value is not None} == set(quantizer.losses)
    assert all(value.dtype == torch.float32 for value in losses if value is not None)


@pytest.mark.long
@pytest.mark.parametrize("kind", SIZES)
def test_an_exported_tokenizer_computes_the_same(kind):
    torch.manual_seed(0)
    model, images = VQModel(config(kind)).eval(), torch.randn(2, 3, 8, 8)
    namespace: dict[str, Any] = {"__name__": "tokenizer"}
    exec(tokenizer_source(), namespace)
    options = {**asdict(model.config), "downsampling": model.config.downsampling}
    with torch.device("meta"):
        exported = namespace["VQModel"](SimpleNamespace(**options))
    exported.load_state_dict(model.state_dict(), assign=True)
    exported.eval()
    codes = exported.encode(images)
    assert torch.equal(codes, model.encode(images))
    assert torch.equal(exported.decode(codes), model.decode(codes))


@pytest.mark.parametrize(("kind", "other"), [("fsq", "ifsq"), ("ema", "vq"), ("vq", "ibq"), ("lfq", "fsq")])
def test_weights_of_another_quantizer_are_refused_by_name(kind, other, tmp_path):
    torch.manual_seed(0)
    model = VQModel(config(kind))
    save_file(model.state_dict(), tmp_path / "weights.safetensors")
    names = ("channels", "channel_multipliers", "res_blocks", "z_channels", "codebook_size", "codebook_dim", "l2_norm",
             "quantizer", "levels", "entropy_temperature")  # fmt: skip

    def section(kind: str) -> TokenizerModelSection:
        return TokenizerModelSection(**{name: getattr(config(kind), name) for name in names})

    loaded = load_tokenizer(tmp_path / "weights.safetensors", section(kind)).model
    assert all(torch.equal(value, loaded.state_dict()[name]) for name, value in model.state_dict().items())
    wanted = quantizer_of(VQModel(config(other)).state_dict())
    with pytest.raises(UserError, match=rf"trained with the quantizer {kind}.*model.quantizer says {wanted}"):
        load_tokenizer(tmp_path / "weights.safetensors", section(other))


# --- FSQ ---


def plain_fsq(z: float, levels: int, slope: float) -> tuple[int, float, float]:
    """(digit, the decoder's value, d value / d z without the rounding) of one number."""
    half = (levels - 1) * (1 - 1e-3) / 2
    offset = 0.5 if levels % 2 == 0 else 0.0
    shift = math.tan(offset / half)
    squashed = 2 / (1 + math.exp(-2 * (slope * z + shift))) - 1  # the sigmoid's way to write tanh
    level = round(squashed * half - offset)
    return level + levels // 2, level / (levels // 2), slope * (1 - squashed**2) * half / (levels // 2)


@pytest.mark.parametrize(("kind", "slope"), [(FSQ, 1.0), (IFSQ, 0.8)])
def test_fsq_is_a_rounding_of_every_channel(kind, slope):
    levels = (2, 3, 8, 5)
    quantizer, z = kind(levels), latents(4, scale=1.5).requires_grad_()
    quantised, losses, codes = quantizer(z)
    weights = torch.randn(quantised.shape)
    (gradient,) = gradients((quantised * weights).sum(), z)
    assert losses == (None, None, None)
    expected, slopes = torch.empty_like(z), torch.empty_like(z)
    numbers = {digits[::-1]: n for n, digits in enumerate(itertools.product(*(range(n) for n in levels[::-1])))}
    for b, h, w in itertools.product(range(2), range(3), range(4)):
        digits = []
        for c in range(4):
            digit, expected[b, c, h, w], slopes[b, c, h, w] = plain_fsq(float(z[b, c, h, w].detach()), levels[c], slope)  # type: ignore[assignment]
            digits.append(digit)
        assert codes[b, h, w] == numbers[tuple(digits)]  # channel 0 counts fastest
    assert torch.allclose(quantised, expected, atol=1e-6)
    assert torch.allclose(gradient, weights * slopes, atol=1e-5)
    assert not torch.allclose(gradient, weights * slopes * 1.25, atol=1e-5), "sabotage twin: another slope is seen"
    assert quantizer.codebook_size == 240


def test_ifsq_is_the_published_sigmoid():
    z = torch.linspace(-3, 3, 50).view(1, 1, 1, 50)
    quantizer = IFSQ((9,))
    expected = ((2 * torch.sigmoid(1.6 * z) - 1) * 4 * 0.999).round() / 4
    assert torch.allclose(quantizer(z)[0], expected)
    assert not torch.allclose(FSQ((9,))(z)[0], expected)


# --- LFQ ---


def plain_entropy(z: Tensor, temperature: float) -> Tensor:
    """Over all 2^C codes, the slow way: distances to each, softmax, the two entropies."""
    codes = torch.tensor(list(itertools.product((-1.0, 1.0), repeat=z.shape[1])))
    p = (-(z[:, None] - codes).square().sum(-1) / temperature).softmax(-1)
    mean = p.mean(0)
    return -(p * (p + 1e-30).log()).sum(-1).mean() + (mean * (mean + 1e-5).log()).sum()


@pytest.mark.parametrize("groups", [1, 2])
def test_lfq_is_the_sign_with_an_entropy_over_all_codes(groups):
    quantizer, z = LFQ(5, groups), latents(5, scale=0.4).requires_grad_()
    quantizer.temperature = 0.7
    quantised, losses, codes = quantizer(z, entropy=True)
    rows = rows_of(z)
    assert torch.equal(codes.flatten(), sum((rows[:, c] >= 0).long() * 2**c for c in range(5)))
    assert torch.allclose(quantised, torch.where(z >= 0, 1.0, -1.0), atol=1e-6)
    assert losses.vq is None
    assert losses.commit.item() == pytest.approx(float((z.detach().abs() - 1).square().mean()), rel=1e-6)
    expected = sum(plain_entropy(part, 0.7) for part in rows.tensor_split(groups, dim=-1))
    assert losses.entropy.item() == pytest.approx(expected.item(), rel=1e-5)
    found, wanted = (gradients(value, z)[0] for value in (losses.entropy, expected))
    assert torch.allclose(found, wanted, atol=1e-6)
    assert not torch.allclose(gradients(plain_entropy(rows, 1.4), z)[0], wanted, atol=1e-4), "twin: temperature"
    weights = torch.randn(z.shape)
    assert torch.allclose(gradients((quantised * weights).sum(), z)[0], weights), "straight through"


# --- IBQ ---


@pytest.mark.parametrize("l2_norm", [False, True])
def test_ibq_is_a_straight_through_one_hot_over_the_whole_codebook(l2_norm, monkeypatch):
    torch.manual_seed(0)
    monkeypatch.setattr(learned_codebooks, "SEARCH_ELEMENTS", 5 * 20)  # five rows at a time
    quantizer, z = IndexBackpropagationQuantizer(20, 3, l2_norm), latents(3).requires_grad_()
    weight = quantizer.embedding.weight
    weight.data = torch.randn(20, 3)
    quantised, losses, codes = quantizer(z, entropy=True)

    rows, table = (F.normalize(t, dim=-1) if l2_norm else t for t in (rows_of(z), weight))
    soft = (rows @ table.t()).softmax(-1)
    hard = F.one_hot(soft.argmax(-1), 20).float()
    chosen = (hard + soft - soft.detach()) @ table
    assert torch.equal(codes.flatten(), soft.argmax(-1))
    assert torch.allclose(rows_of(quantised), chosen, atol=1e-6)
    mix = torch.randn(chosen.shape)
    vq = (chosen - rows).square().mean() + 0.25 * (hard @ table - rows.detach()).square().mean()
    commit = ((hard @ table).detach() - rows).square().mean()
    pairs = [((rows_of(quantised) * mix).sum(), (chosen * mix).sum()), (losses.vq, vq), (losses.commit, commit)]
    for found, expected in pairs:
        assert found.item() == pytest.approx(expected.item(), rel=1e-5)
        for one, other in zip(gradients(found, z, weight), gradients(expected, z, weight), strict=True):
            assert torch.allclose(one, other, atol=1e-6)
    wrong = gradients((hard @ table * mix).sum(), z, weight)  # twin: without the softmax's gradient
    assert not torch.allclose(gradients(pairs[0][0], z, weight)[1], wrong[1], atol=1e-4)


# --- EMA ---


@pytest.mark.parametrize("l2_norm", [False, True])
def test_ema_codes_are_moving_averages_of_their_latents(l2_norm):
    torch.manual_seed(0)
    quantizer = EMAQuantizer(6, 3, l2_norm, decay=0.9).train()
    with torch.no_grad():
        quantizer.replace(torch.arange(6), F.normalize(torch.randn(6, 3), dim=-1))
    assert not quantizer.embedding.weight.requires_grad
    codes = quantizer.embedding.weight.double().numpy().copy()
    counts, sums = np.ones(6), codes.copy()
    for step in range(5):
        n, added = np.zeros(6), np.zeros((6, 3))
        for micro in range(2):
            z = latents(3, seed=10 * step + micro, scale=0.5)
            _, losses, found = quantizer(z)
            assert losses.vq is None
            for row in rows_of(z).double().numpy():
                row = row / np.linalg.norm(row) if l2_norm else row
                code = ((row - codes) ** 2).sum(1).argmin()
                n[code] += 1
                added[code] += row
            assert int(n.sum()) == (micro + 1) * found.numel()
        assert torch.equal(quantizer.pending[:, -1] / 2**32, torch.from_numpy(n).float())
        quantizer.absorb(quantizer.pending)
        quantizer.pending.zero_()
        counts, sums = 0.9 * counts + 0.1 * n, 0.9 * sums + 0.1 * added
        codes = sums / ((counts + 1e-5) / (counts.sum() + 6e-5) * counts.sum())[:, None]
        codes = codes / np.linalg.norm(codes, axis=1, keepdims=True) if l2_norm else codes
        assert np.allclose(quantizer.embedding.weight.numpy(), codes, atol=1e-5)
    assert not np.allclose(sums / counts.sum(), codes, atol=1e-3), "a wrong divisor would be seen"


def test_ema_sums_do_not_depend_on_order_or_on_how_the_batch_is_cut():
    torch.manual_seed(0)
    one, other = EMAQuantizer(6, 3, True, 0.9), EMAQuantizer(6, 3, True, 0.9)
    other.load_state_dict(one.state_dict())
    z = torch.cat([latents(3, seed) for seed in range(8)])
    one(z)
    for part in z.flip(0).split(3):
        other(part)
    assert torch.equal(one.pending, other.pending)
    rows = one.prepare(z).reshape(-1, 3)
    pieces = torch.stack([part.sum(0) for part in rows.flip(0).split(7)]).sum(0)
    assert not torch.equal(rows.sum(0), pieces), "sabotage twin: sums of floats do depend on it"
    one.eval()(z)
    assert torch.equal(one.pending, other.pending), "evaluation adds nothing"


# --- health ---


@pytest.mark.parametrize("kind", SIZES)
def test_health_is_usage_and_perplexity(kind):
    torch.manual_seed(0)
    quantizer: Quantizer = make_quantizer(config(kind))
    size = quantizer.codebook_size
    histogram = torch.zeros(size, dtype=torch.int64)
    histogram[:4] = torch.tensor([5, 0, 3, 8])
    found = {name: float(value) for name, value in quantizer.health(histogram).items()}
    p = np.array([5, 3, 8]) / 16
    assert found["usage"] == 3 / size
    assert found["perplexity"] == pytest.approx(math.exp(-(p * np.log(p)).sum()))
    even = quantizer.health(torch.full((size,), 7))
    assert (float(even["usage"]), float(even["perplexity"])) == (1.0, pytest.approx(size))
    empty = quantizer.health(torch.zeros(size, dtype=torch.int64))
    assert (float(empty["usage"]), float(empty["perplexity"])) == (0, 0)
    if "narrowest" in found:
        assert float(even["narrowest"]) == pytest.approx(1)
        never = float(1 / quantizer.levels.max())  # one digit only in the last channels
        assert found["narrowest"] == pytest.approx(never)
    if kind == "ema":
        assert found["starved"] == 0
        quantizer.ema_count[0] = 1e-3
        assert float(quantizer.health(histogram)["starved"]) == 1 / size


# --- what a config may say ---


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({"quantizer": "fsq", "levels": [8, 5, 5]}, r"model.levels: 8 x 5 x 5 = 200 codes, but .* is 16,384"),
        ({"quantizer": "ifsq"}, r"model.levels: ifsq needs them"),
        ({"levels": [8, 8]}, r"model.levels: only fsq and ifsq have levels, and quantizer is vq"),
        ({"quantizer": "fsq", "levels": [1, 5], "codebook_size": 5}, r"model.levels.0: .*greater than 1"),
        ({"quantizer": "lfq", "codebook_size": 1000}, r"1,000 is no power of two; use 512"),
        ({"quantizer": "lfq", "codebook_size": 16, "entropy_groups": 5}, r"4 bits cannot be cut into 5 groups"),
        ({"quantizer": "lfq", "codebook_size": 16, "codebook_dim": 6}, r"model.codebook_dim: lfq has 4 channels here"),
        ({"quantizer": "lfq", "codebook_size": 16, "codebook_init": "kmeans"}, r"codebook_init: lfq has no table"),
        ({"quantizer": "vqq"}, r"model.quantizer: "),
    ],
)  # fmt: skip
def test_options_that_do_not_go_together_are_refused(model, message):
    with pytest.raises(UserError, match=message):
        file({"channels": 8, "channel_multipliers": [1, 2], **model})


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({"loss": {"entropy_weight": 0.1}}, r"loss.entropy_weight: fsq has no entropy loss"),
        ({"codebook": {"revive_after_steps": 5}}, r"codebook.revive_after_steps: fsq has no table of codes"),
        ({"codebook": {"warn_below_usage": 0.5}}, r"codebook.warn_below_usage: needs the counts"),
        ({"codebook": {"revive_after_step": 5}}, r"did you mean codebook.revive_after_steps"),
    ],
)
def test_what_a_quantizer_cannot_do_is_refused(parts, message):
    model = {"channels": 8, "channel_multipliers": [1, 2], "quantizer": "fsq", "levels": [4, 4], "codebook_size": 16}
    with pytest.raises(UserError, match=message):
        file(model, **parts)


def file(model: dict[str, Any], loss: dict[str, Any] | None = None, **parts: Any) -> TokenizerConfigFile:
    return build(TokenizerConfigFile,
        {"kind": "tokenizer", "run_dir": Path("x"), "model": model,
         "data": {"train": "x", "validation": "x", "image_size": 16},
         "train": {"images": 256}, "loss": {"perceptual": "none", "discriminator": {"kind": "none"}, **(loss or {})},
         **parts}, "test")  # fmt: skip


def test_llamagens_own_has_no_signature():
    assert quantizer_of(VQModel(SMALL).state_dict()) == "vq"
    assert isinstance(make_quantizer(SMALL), VectorQuantizer)
    assert quantizer_of(VQModel(config("fsq")).state_dict()) == "fsq 4,3,5"
