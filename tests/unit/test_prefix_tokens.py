"""Prefix tokens: any first k of them decode, to exactly what the decoder makes of k of all; a grid stays as it was."""

import dataclasses
from pathlib import Path

import pytest
import torch
import yaml

from llamagen_dist.build import build_vq
from llamagen_dist.config import TokenizerConfigFile, load
from llamagen_dist.errors import UserError
from llamagen_dist.models.prefix_tokens import PrefixVQModel
from llamagen_dist.models.sizes import VQConfig
from llamagen_dist.models.vq import VQModel
from tokenizer_training.prefixes import measured_lengths, prefix_lengths

N = 6
SMALL = {"channels": 8, "channel_multipliers": (1, 2), "res_blocks": 1, "z_channels": 8, "codebook_size": 32}
PREFIX = {"tokens": "prefix", "token_count": N, "image_size": 16, "token_width": 16, "token_layers": 1}
QUANTIZERS = {
    "vq": {},
    "ema": {},
    "ibq": {},
    "lfq": {},
    "fsq": {"levels": (4, 4, 2)},
    "ifsq": {"levels": (4, 4, 2)},
}


def tokenizer(**options: object) -> PrefixVQModel:
    torch.manual_seed(0)
    return PrefixVQModel(VQConfig(**{**SMALL, **PREFIX, **options})).eval()  # type: ignore[arg-type]


def images(count: int = 3, seed: int = 1) -> torch.Tensor:
    return torch.rand(count, 3, 16, 16, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def config(tmp_path: Path, *changes: str, **model: object) -> TokenizerConfigFile:
    path = tmp_path / "tokenizer.yaml"
    sizes = {k: list(v) if isinstance(v, tuple) else v for k, v in {**SMALL, **PREFIX, **model}.items()}
    path.write_text(yaml.safe_dump({
        "kind": "tokenizer", "run_dir": str(tmp_path / "run"), "model": {k: v for k, v in sizes.items() if v},
        "data": {"train": "a", "validation": "b", "image_size": 16},
        "loss": {"perceptual": "none", "discriminator": {"kind": "none"}},
        "train": {"images": 64, "global_batch": 8}}))  # fmt: skip
    return load(path, changes, kind="tokenizer")


@pytest.mark.parametrize("quantizer", QUANTIZERS)
def test_a_prefix_decodes_as_it_did_in_training(quantizer):
    """For every quantizer: k codes give what all N codes give with the rest masked, bit for bit."""
    model, pictures = tokenizer(quantizer=quantizer, **QUANTIZERS[quantizer]), images()
    codes = model.encode(pictures)
    assert codes.shape == (3, 1, N)
    assert codes.dtype == torch.int64
    lengths = torch.tensor([1, 4, N])
    together, _, again = model(pictures, lengths=lengths)
    assert torch.equal(again, codes)
    for sample, k in enumerate(lengths.tolist()):
        alone = model.decode(codes[sample : sample + 1, :, :k])
        assert alone.shape == (1, 3, 16, 16)
        # another batch shape rounds otherwise
        torch.testing.assert_close(alone[0], together[sample], rtol=0, atol=2e-5)
    whole = model.render(model.quantize.lookup(codes), torch.full((3,), 4))
    assert torch.equal(model.decode(codes[..., :4]), whole)
    spoilt = codes.clone()
    spoilt[..., 4:] = (codes[..., 4:] + 1) % 32
    assert torch.equal(model.render(model.quantize.lookup(spoilt), torch.full((3,), 4)), whole)
    assert not torch.equal(model.decode(spoilt), model.decode(codes)), "sabotage twin: without the mask they are seen"


def test_other_sizes_and_longer_prefixes_are_refused():
    model = tokenizer()
    with pytest.raises(ValueError, match="16 x 16"):
        model.encode(torch.zeros(1, 3, 32, 32))
    with pytest.raises(ValueError, match="7 tokens, and an image has 6"):
        model.decode(torch.zeros(1, 1, N + 1, dtype=torch.int64))


def test_every_parameter_has_a_gradient_whatever_the_lengths():
    """DDP waits for each parameter's gradient in each step, also where no token is masked."""
    model = tokenizer().train()
    for lengths in (torch.full((3,), N), torch.ones(3, dtype=torch.int64), None):
        model.zero_grad(set_to_none=True)
        picture, losses, _ = model(images(), lengths=lengths)
        (picture.square().mean() + losses.vq + losses.commit).backward()
        assert [name for name, p in model.named_parameters() if p.grad is None] == []


def test_a_grid_is_what_it_was(tmp_path):
    """The default builds VQModel: the same parameters drawn from the same generator."""
    torch.manual_seed(3)
    built = build_vq(config(tmp_path, **dict.fromkeys(PREFIX)).model)
    assert type(built) is VQModel
    torch.manual_seed(3)
    bare = VQModel(VQConfig(**SMALL))  # type: ignore[arg-type]
    assert all(torch.equal(a, b) for a, b in zip(built.parameters(), bare.parameters(), strict=True))
    assert built.config.grid(16) == (8, 8)
    assert isinstance(build_vq(config(tmp_path).model), PrefixVQModel)
    assert tokenizer().config.grid(16) == (1, N)


def test_lengths_follow_from_seed_and_position(tmp_path):
    settings = config(tmp_path)
    lengths = prefix_lengths(settings, 0, 4096)
    assert lengths is not None
    counts = torch.bincount(lengths, minlength=N + 1)
    assert counts[0] == 0
    assert len(counts) == N + 1
    assert counts[1:].min() > 4096 / N * 0.85  # 4 standard deviations of a fair share
    parts = torch.cat([prefix_lengths(settings, first, 512) for first in range(0, 4096, 512)])
    assert torch.equal(parts, lengths)
    other = prefix_lengths(config(tmp_path, "train.seed=1"), 0, 4096)
    assert not torch.equal(other, lengths), "sabotage twin: another seed draws others"
    powers = prefix_lengths(config(tmp_path, "prefix.lengths=powers"), 0, 4096)
    assert set(powers.tolist()) == {1, 2, 4, N}
    assert set(prefix_lengths(config(tmp_path, "prefix.shortest=5"), 0, 99).tolist()) == {5, 6}
    assert prefix_lengths(config(tmp_path, "prefix.lengths=full"), 0, 8) is None
    assert prefix_lengths(config(tmp_path, **dict.fromkeys(PREFIX)), 0, 8) is None
    assert measured_lengths(settings) == [1, 2, 4]
    assert measured_lengths(config(tmp_path, "prefix.measured=[3,6]")) == [3]


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        (["model.token_count=null"], "token_count: tokens: prefix needs it"),
        (["model.tokens=grid"], "token_count: belongs to tokens: prefix"),
        (["model.image_size=32"], "image_size: 16 pixels, and the prefix tokens are of 32"),
        (["model.token_width=18"], "token_width: 18 is not a multiple of token_heads 4"),
        (["prefix.measured=[8]"], "prefix.measured: 8 tokens, and an image has 6"),
        (["prefix.shortest=7"], "prefix.shortest: 7 tokens, and an image has 6"),
        (["model.token_cuont=3"], "did you mean model.token_count"),
    ],
)
def test_what_cannot_be_is_one_sentence(tmp_path, changes, sentence):
    with pytest.raises(UserError, match=sentence):
        config(tmp_path, *changes)


def test_prefix_options_of_a_grid_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"prefix: belongs to model\.tokens: prefix"):
        config(tmp_path, "prefix.lengths=powers", **dict.fromkeys(PREFIX))


def test_what_a_released_size_fixes_includes_its_tokens():
    assert VQConfig() == dataclasses.replace(VQConfig(), tokens="grid")
    with pytest.raises(ValueError, match="token_count"):
        VQConfig(tokens="prefix")
