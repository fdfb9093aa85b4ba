"""Tokenizers of other projects: taming's VQGAN against plain arithmetic over its own names; GEAR's; what is refused."""

import sys
import types
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from llamagen_dist.checkpoint import foreign, llamagen
from llamagen_dist.cli import main
from llamagen_dist.config import TokenizerModelSection
from llamagen_dist.errors import UserError
from llamagen_dist.models.vq import VQ_SIZES, VQConfig, VQModel
from llamagen_dist.sampling.load import load_tokenizer

SMALL = {"ch": 32, "mult": (1, 2, 2), "blocks": 2, "z": 32, "codes": 64, "dim": 24}
Shapes = dict[str, tuple[int, ...]]


def taming_shapes(ch: int, mult: tuple[int, ...], blocks: int, z: int, codes: int, dim: int) -> Shapes:
    """Of every tensor of taming's VQModel, whose attention is at the last level."""
    shapes: Shapes = {}

    def conv(name: str, into: int, out: int, side: int) -> None:
        shapes[f"{name}.weight"], shapes[f"{name}.bias"] = (out, into, side, side), (out,)

    def norm(name: str, width: int) -> None:
        shapes[f"{name}.weight"] = shapes[f"{name}.bias"] = (width,)

    def res(name: str, into: int, out: int) -> None:
        norm(f"{name}.norm1", into), conv(f"{name}.conv1", into, out, 3)
        norm(f"{name}.norm2", out), conv(f"{name}.conv2", out, out, 3)
        if into != out:
            conv(f"{name}.nin_shortcut", into, out, 1)

    def attn(name: str, width: int) -> None:
        norm(f"{name}.norm", width)
        for part in ("q", "k", "v", "proj_out"):
            conv(f"{name}.{part}", width, width, 1)

    def mid(part: str, width: int) -> None:
        res(f"{part}.mid.block_1", width, width), attn(f"{part}.mid.attn_1", width)
        res(f"{part}.mid.block_2", width, width)

    last, width = len(mult) - 1, ch
    conv("encoder.conv_in", 3, ch, 3)
    for level, factor in enumerate(mult):
        for block in range(blocks):
            res(f"encoder.down.{level}.block.{block}", width, ch * factor)
            width = ch * factor
            if level == last:
                attn(f"encoder.down.{level}.attn.{block}", width)
        if level != last:
            conv(f"encoder.down.{level}.downsample.conv", width, width, 3)
    mid("encoder", width), norm("encoder.norm_out", width), conv("encoder.conv_out", width, z, 3)
    conv("decoder.conv_in", z, width, 3), mid("decoder", width)
    for level in range(last, -1, -1):
        for block in range(blocks + 1):
            res(f"decoder.up.{level}.block.{block}", width, ch * mult[level])
            width = ch * mult[level]
            if level == last:
                attn(f"decoder.up.{level}.attn.{block}", width)
        if level:
            conv(f"decoder.up.{level}.upsample.conv", width, width, 3)
    norm("decoder.norm_out", width), conv("decoder.conv_out", width, 3, 3)
    conv("quant_conv", z, dim, 1), conv("post_quant_conv", dim, z, 1)
    shapes["quantize.embedding.weight"] = (codes, dim)
    return shapes


def recipe(shapes: Shapes) -> dict[str, Tensor]:
    """Every tensor drawn from its own name."""
    weights = {}
    for name, shape in shapes.items():
        v = np.random.RandomState(zlib.crc32(name.encode())).standard_normal(shape).astype(np.float32)
        if len(shape) > 1:
            v = v / np.sqrt(np.prod(shape[1:]))
        else:
            v = 0.05 * v + (0 if name.endswith(".bias") else 1)
        weights[name] = torch.from_numpy(v.astype(np.float32))
    return weights


class Plain:
    """taming's forward pass over its own names, one operation after another; nothing of this project."""

    def __init__(self, weights: dict[str, Tensor], levels: int, blocks: int) -> None:
        self.w, self.levels, self.blocks = weights, levels, blocks

    def conv(self, name: str, x: Tensor, **how: int) -> Tensor:
        return F.conv2d(x, self.w[f"{name}.weight"], self.w[f"{name}.bias"], **how)

    def norm(self, name: str, x: Tensor) -> Tensor:
        return F.group_norm(x, 32, self.w[f"{name}.weight"], self.w[f"{name}.bias"], 1e-6)

    def res(self, name: str, x: Tensor) -> Tensor:
        h = x
        for number in "12":
            h = self.norm(f"{name}.norm{number}", h)
            h = self.conv(f"{name}.conv{number}", h * torch.sigmoid(h), padding=1)
        return h + (self.conv(f"{name}.nin_shortcut", x) if f"{name}.nin_shortcut.weight" in self.w else x)

    def attn(self, name: str, x: Tensor) -> Tensor:
        q, k, v = (self.conv(f"{name}.{part}", self.norm(f"{name}.norm", x)).flatten(2) for part in "qkv")
        weight = torch.softmax(torch.einsum("bci,bcj->bij", q, k) / q.shape[1] ** 0.5, dim=-1)
        return x + self.conv(f"{name}.proj_out", torch.einsum("bij,bcj->bci", weight, v).reshape(x.shape))

    def mid(self, part: str, x: Tensor) -> Tensor:
        x = self.attn(f"{part}.mid.attn_1", self.res(f"{part}.mid.block_1", x))
        return self.res(f"{part}.mid.block_2", x)

    def level(self, name: str, blocks: int, attention: bool, x: Tensor) -> Tensor:
        for block in range(blocks):
            x = self.res(f"{name}.block.{block}", x)
            x = self.attn(f"{name}.attn.{block}", x) if attention else x
        return x

    def out(self, part: str, x: Tensor) -> Tensor:
        x = self.norm(f"{part}.norm_out", x)
        return self.conv(f"{part}.conv_out", x * torch.sigmoid(x), padding=1)

    def encode(self, x: Tensor) -> Tensor:
        x = self.conv("encoder.conv_in", x, padding=1)
        for level in range(self.levels):
            x = self.level(f"encoder.down.{level}", self.blocks, level == self.levels - 1, x)
            if level < self.levels - 1:
                x = self.conv(f"encoder.down.{level}.downsample.conv", F.pad(x, (0, 1, 0, 1)), stride=2)
        z = self.conv("quant_conv", self.out("encoder", self.mid("encoder", x)))
        return torch.cdist(z.double().permute(0, 2, 3, 1), self.w["quantize.embedding.weight"].double()).argmin(-1)

    def decode(self, codes: Tensor) -> Tensor:
        x = self.conv("post_quant_conv", self.w["quantize.embedding.weight"][codes].permute(0, 3, 1, 2))
        x = self.mid("decoder", self.conv("decoder.conv_in", x, padding=1))
        for level in reversed(range(self.levels)):
            x = self.level(f"decoder.up.{level}", self.blocks + 1, level == self.levels - 1, x)
            if level:
                x = x.repeat_interleave(2, 2).repeat_interleave(2, 3)
                x = self.conv(f"decoder.up.{level}.upsample.conv", x, padding=1)
        return self.out("decoder", x)


def lightning(weights: dict[str, Tensor], path: Path) -> Path:
    """A checkpoint as Lightning 1 wrote it: its callback's class is a key, and the losses' networks lie beside."""
    module = types.ModuleType("pytorch_lightning.callbacks.model_checkpoint")
    callback = type("ModelCheckpoint", (), {"__module__": module.__name__})
    module.ModelCheckpoint = callback  # type: ignore[attr-defined]
    names = ("pytorch_lightning", "pytorch_lightning.callbacks", module.__name__)
    sys.modules.update({name: module for name in names})
    losses = {
        "loss.discriminator.main.0.weight": torch.zeros(2),
        "loss.perceptual_loss.lin0.model.1.weight": torch.ones(1),
    }
    try:
        torch.save({"state_dict": weights | losses, "epoch": 3, "callbacks": {callback: {"best": 0.5}}}, path)
    finally:
        for name in names:
            del sys.modules[name]
    return path


@pytest.fixture(scope="module")
def weights() -> dict[str, Tensor]:
    return recipe(taming_shapes(**SMALL))  # type: ignore[arg-type]


@torch.no_grad()
def test_a_taming_checkpoint_encodes_and_decodes_as_plain_arithmetic_does(tmp_path, weights, capsys):
    path = lightning(weights, tmp_path / "last.ckpt")
    plain = Plain(weights, len(SMALL["mult"]), SMALL["blocks"])
    x = torch.rand(2, 3, 32, 24, generator=torch.Generator().manual_seed(0)) * 2 - 1
    codes = plain.encode(x)
    assert len(codes.unique()) > 16
    pixels = plain.decode(codes)

    def agrees(file: Path) -> bool:
        model = load_tokenizer(file).model
        assert model.config.l2_norm is False
        close = torch.allclose(model.decode(codes), pixels, rtol=0, atol=1e-5)
        return bool((model.encode(x) == codes).all()) and close

    assert agrees(path)
    said = capsys.readouterr().out
    assert "64 codes of 24 numbers that are compared as they are (l2_norm: false)" in said
    assert "2 tensors of its losses (`loss.`) left out" in said
    for name in ("a.safetensors", "b.pt"):  # what no shape shows goes with the weights in both formats
        main(["convert", str(path), str(tmp_path / name)])
        assert agrees(tmp_path / name)
    assert "tokenizer, a size of its own, " in capsys.readouterr().out

    swapped = weights | {
        "decoder.up.0.block.1.conv1.weight": weights["decoder.up.0.block.2.conv1.weight"],
        "decoder.up.0.block.2.conv1.weight": weights["decoder.up.0.block.1.conv1.weight"],
    }
    assert not agrees(lightning(swapped, tmp_path / "swapped.ckpt")), "sabotage twin: two blocks of one level swapped"
    normalised = load_tokenizer(path, TokenizerModelSection(**sizes(l2_norm=False))).model
    normalised.quantize.l2_norm = True
    assert not (normalised.encode(x) == codes).all(), "sabotage twin: normalised codes"


def sizes(**changes: object) -> dict:
    own = {"channels": 32, "channel_multipliers": (1, 2, 2), "z_channels": 32, "codebook_size": 64, "codebook_dim": 24}
    return own | changes


@pytest.mark.parametrize("codes", [1024, 16384])
def test_the_published_imagenet_models_fit(codes):
    """f16: ch 128, multipliers 1 1 2 2 4, z 256, codes of 256 numbers; latent diffusion's f8: 1 2 2 4, codes of 4."""
    published = {
        16: taming_shapes(128, (1, 1, 2, 2, 4), 2, 256, codes, 256),
        8: taming_shapes(128, (1, 2, 2, 4), 2, 4, codes, 4),
    }
    for factor, shapes in published.items():
        given = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
        named, _ = foreign.from_taming(given)
        section = llamagen.tokenizer_section(named)
        assert section is not None
        config = section.vq()
        assert (config.downsampling, config.codebook_size, config.l2_norm) == (factor, codes, False)
        assert llamagen.incomplete(named) is None
        assert llamagen.describe(named).size is None, "not LlamaGen's VQ-16, whose codes are normalised"
        assert "compared as they are" in str(llamagen.difference(named, f"VQ-{factor}"))
        with torch.device("meta"):
            expected = VQModel(config).state_dict().keys() - {llamagen.STATISTIC}
        assert named.keys() - {foreign.PLAIN_CODES} == expected


def test_gears_file_gives_its_tokenizer_and_not_its_gpt(tmp_path, capsys):
    """Its layers are VQ-16's, so no size need be given."""
    with torch.device("meta"):
        shapes = {name: tuple(t.shape) for name, t in VQModel(VQConfig(**VQ_SIZES["VQ-16"])).state_dict().items()}
    live, average = ({name: torch.full((1,), n).expand(s) for name, s in shapes.items()} for n in (0.0, 1.0))
    gpt = {"tok_embeddings.weight": torch.zeros(2, 2), "output.weight": torch.zeros(2, 2)}
    torch.save({"ar": gpt, "ema": gpt, "vq": live, "vq_ema": average, "steps": 1}, tmp_path / "gear.pt")
    for group, value in ((None, 1.0), ("ema", 1.0), ("weights", 0.0)):
        named = llamagen.unwrap(llamagen.load(tmp_path / "gear.pt"), tmp_path / "gear.pt", group).tensors
        assert float(named["quant_conv.bias"][0]) == value
    section = llamagen.tokenizer_section(named)
    assert section is not None
    assert section.size == "VQ-16"
    smaller = named | {"quantize.embedding.weight": torch.zeros(512, 8)}
    assert llamagen.tokenizer_section(smaller) is None, "another codebook: its sizes must be given, as ever"


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"quantize.embedding.weight": None, "quant_conv.weight": (48, 32, 1, 1)}, "a KL autoencoder has no codebook"),
        ({"quantize.embedding.weight": None, "quantize.embed.weight": (64, 24)}, "a Gumbel quantizer"),
        ({"quantize.embedding.weight": None}, "lacks quantize.embedding.weight, its codebook"),
        ({"decoder.up.1.attn.0.norm.weight": (64,)}, "attention at the levels 1, 2 of 0 to 2"),
        ({"encoder.down.1.block.0.norm2.bias": None}, "encoder.conv_blocks.1.res.0.norm2.bias is missing"),
        ({"colorize": (3, 1, 1, 1)}, "colorize does not belong to this tokenizer"),
        ({"encoder.conv_in.weight": (32, 1, 3, 3), "decoder.conv_out.weight": (1, 32, 3, 3)}, "decoder.conv_out.bias"),
        ("diffusers", "an autoencoder by diffusers' names"),
        ("no attention", "attention at no level"),
    ],
)  # fmt: skip
def test_other_kinds_are_refused_by_name(tmp_path, weights, changes, sentence):
    if changes == "diffusers":
        changed = {
            "encoder.down_blocks.0.resnets.0.conv1.weight": torch.zeros(1),
            "decoder.conv_in.bias": torch.zeros(1),
        }
    elif changes == "no attention":
        changed = {name: tensor for name, tensor in weights.items() if ".attn." not in name}
    else:
        changed = weights | {name: torch.zeros(shape) for name, shape in changes.items() if shape is not None}
        changed = {name: tensor for name, tensor in changed.items() if changes.get(name, ()) is not None}
    torch.save({"state_dict": changed}, tmp_path / "in.ckpt")
    for act in (
        lambda: load_tokenizer(tmp_path / "in.ckpt"),
        lambda: main(["convert", str(tmp_path / "in.ckpt"), str(tmp_path / "out.safetensors")]),
    ):
        with pytest.raises(UserError) as refused:
            act()
        assert sentence in str(refused.value)
        assert "in.ckpt: " in str(refused.value)
        assert "\n" not in str(refused.value)
    assert not (tmp_path / "out.safetensors").exists()


def test_sizes_that_say_something_else_are_refused(tmp_path, weights):
    torch.save(weights, tmp_path / "in.pt")
    with pytest.raises(UserError, match=r"leave model out, or set model\.l2_norm=false"):
        load_tokenizer(tmp_path / "in.pt", TokenizerModelSection(**sizes()))
    with pytest.raises(UserError, match="do not fit its sizes"):
        load_tokenizer(tmp_path / "in.pt", TokenizerModelSection(**sizes(z_channels=64, l2_norm=False)))


def test_only_lightnings_own_classes_get_a_stand_in(tmp_path):
    """Sabotage twin of what is let through: a class of anything else is refused unread, as ever."""
    module = types.ModuleType("elsewhere")
    module.Thing = type("Thing", (), {"__module__": "elsewhere"})  # type: ignore[attr-defined]
    sys.modules["elsewhere"] = module
    try:
        torch.save({"state_dict": {}, "callbacks": {module.Thing: 1}}, tmp_path / "in.ckpt")
    finally:
        del sys.modules["elsewhere"]
    with pytest.raises(UserError, match=r"cannot be read as a file of weights \(it names elsewhere\.Thing"):
        llamagen.load(tmp_path / "in.ckpt")
