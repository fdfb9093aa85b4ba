"""``llamagen convert``: every container both ways, bytes kept; sizes and kinds told apart and refused by key."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from llamagen_dist.checkpoint import llamagen as released
from llamagen_dist.checkpoint.checkpoint import identity_of
from llamagen_dist.cli import main
from llamagen_dist.errors import UserError
from llamagen_dist.models.gpt import GPT, GPTConfig
from llamagen_dist.models.sizes import GPT_SIZES, TARGET_POSITIONS
from llamagen_dist.models.vq import VQ_SIZES, VQConfig, VQModel
from tests.checkpoints import read_weights


def tiny(condition: str = "class") -> dict[str, Tensor]:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"vocab_size": 32, "image_tokens": 4, "num_classes": 3, "caption_dim": 8}
    sizes |= {"condition": "class", "qk_norm": True} if condition == "normed" else {"condition": condition}
    return GPT(GPTConfig(2, 2, 16, **sizes)).state_dict()


def on_meta(name: str, condition: str = "class") -> dict[str, Tensor]:
    with torch.device("meta"):
        if name in VQ_SIZES:
            return VQModel(VQConfig(**VQ_SIZES[name])).state_dict()
        return GPT(GPTConfig(**GPT_SIZES[name], condition=condition)).state_dict()  # type: ignore[arg-type]


@pytest.mark.parametrize("container", [None, "model", "module", "state_dict", "ema"])
def test_there_and_back_keeps_every_bit(
    tmp_path: Path, container: str | None, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = tiny() | {"norm.weight": torch.full((16,), 1 / 3, dtype=torch.bfloat16)}
    content = weights | {"freqs_cis": torch.zeros(2)}
    torch.save(content if container is None else {container: content}, tmp_path / "in.pt")
    main(
        [
            "convert",
            "--from",
            "llamagen",
            str(tmp_path / "in.pt"),
            "--to",
            "safetensors",
            str(tmp_path / "a.safetensors"),
        ]
    )
    main(["convert", str(tmp_path / "a.safetensors"), str(tmp_path / "new" / "out.pth")])
    for name in ("a.safetensors", "new/out.pth"):
        assert identity_of(read_weights(tmp_path / name)) == identity_of(weights)
    with safe_open(tmp_path / "a.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt", "kind": "class-conditional GPT", "size": "own"}
    upstream = torch.load(tmp_path / "new" / "out.pth", weights_only=True)["model"]
    assert upstream["norm.weight"].dtype == torch.bfloat16
    said = capsys.readouterr().out
    assert said.count(identity_of(weights)) == 2, "the same identity in both formats"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.safetensors", "in.pt", "new"]


def test_one_other_bit_is_another_identity() -> None:
    weights = tiny()
    before = identity_of(weights)
    weights["norm.weight"][3] += 2**-23  # the last bit of 1.0
    assert identity_of(weights) != before


@pytest.mark.parametrize("name", released.SIZES)
def test_every_released_size_is_recognised_and_no_other(name: str) -> None:
    weights = on_meta(name)
    assert [other for other in released.SIZES if released.difference(weights, other) is None] == [name]
    assert released.describe(weights).size == name


def test_parameters_and_kinds_are_told() -> None:
    assert released.describe(on_meta("GPT-B")).parameters == 110_888_448
    assert released.describe(on_meta("VQ-16")).parameters == 71_883_403
    text = released.describe(on_meta("GPT-XL", "text"))
    assert (text.kind, text.size) == ("text-conditional GPT", "GPT-XL")
    without = on_meta("VQ-8")
    del without["quantize.codebook_used"]
    assert released.describe(without).size == "VQ-8"


@pytest.mark.parametrize(
    ("name", "change", "size", "sentence"),
    [
        (
            "GPT-L",
            {},
            "GPT-B",
            "cls_embedding.embedding_table.weight has shape [1001, 1024], and GPT-B has [1001, 768]",
        ),
        ("GPT-B", {"layers.11.ffn_norm.weight": None}, "GPT-B", "layers.11.ffn_norm.weight is missing"),
        ("GPT-B", {"layers.12.ffn_norm.weight": (768,)}, "GPT-B", "layers.12.ffn_norm.weight does not belong to GPT-B"),
        ("VQ-16", {}, "GPT-B", "it is a tokenizer, and GPT-B is a GPT"),
        ("GPT-B", {}, "VQ-8", "it is a class-conditional GPT, and VQ-8 is a tokenizer"),
    ],
)
def test_the_first_differing_key_is_named(name: str, change: dict, size: str, sentence: str) -> None:
    weights = on_meta(name)
    for key, shape in change.items():
        if shape is None:
            del weights[key]
        else:
            weights[key] = torch.empty(shape, device="meta")
    assert released.difference(weights, size) == sentence


def tiny_tokenizer() -> dict[str, Tensor]:
    torch.manual_seed(0)
    config = VQConfig(8, (1, 2), res_blocks=2, z_channels=8, codebook_size=16, codebook_dim=4)
    return VQModel(config).state_dict()


@pytest.mark.parametrize("form", ["pt", "safetensors"])
@pytest.mark.parametrize(
    ("kind", "lost", "sentence"),
    [
        ("class", ["norm.weight"], "norm.weight is missing"),
        ("class", ["layers.0."], "layers.0.attention.wqkv.weight is missing, and 6 more"),
        ("class", ["layers.1.feed_forward.w2"], "layers.1.feed_forward.w2.weight is missing"),
        ("class", ["output.weight"], "a GPT that lacks output.weight"),
        ("normed", ["layers.1.attention.k_norm"], "layers.1.attention.k_norm.weight is missing"),
        ("normed", [], ""),
        ("class", ["cls_embedding."], "a GPT that lacks cls_embedding.embedding_table.weight or"),
        ("text", ["cls_embedding.cap_proj.fc2"], "cls_embedding.cap_proj.fc2.weight is missing"),
        ("vq", ["encoder.norm_out.weight"], "encoder.norm_out.weight is missing"),
        ("vq", ["encoder.conv_blocks.0."], "encoder.conv_blocks.0.res.0.norm1.weight is missing, and "),
        ("vq", ["decoder.conv_blocks.1.res.2."], "decoder.conv_blocks.1.res.2.norm1.weight is missing"),
        ("vq", ["decoder."], "decoder.conv_in.weight is missing"),
        ("vq", ["encoder.conv_in.weight"], "encoder.conv_in.weight or encoder.conv_out.weight is missing"),
        ("vq", ["quantize.embedding.weight"], "a tokenizer that lacks quantize.embedding.weight"),
        ("class", [], ""),
        ("text", [], ""),
        ("vq", [], ""),
        ("vq", ["quantize.codebook_used"], ""),
    ],
)
def test_a_model_with_a_gap_is_refused_by_what_is_missing(
    tmp_path: Path, form: str, kind: str, lost: list[str], sentence: str
) -> None:
    """An own size, so that no table says what is due; nothing lost: it passes."""
    weights = tiny_tokenizer() if kind == "vq" else tiny(kind)
    kept = {name: tensor for name, tensor in weights.items() if not any(name.startswith(part) for part in lost)}
    assert len(kept) < len(weights) or not lost
    source, out = tmp_path / f"in.{form}", tmp_path / ("out.safetensors" if form == "pt" else "out.pt")
    if form == "pt":
        torch.save({"model": kept}, source)
    else:
        save_file(kept, source)
    words = ["convert", str(source), str(out)]
    if not sentence:
        main(words)
        assert out.exists()
        return
    with pytest.raises(UserError) as refused:
        main(words)
    assert sentence in str(refused.value)
    assert not out.exists()


def test_the_other_weights_of_a_training_file_can_be_chosen(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trained, average = tiny(), {name: tensor / 2 for name, tensor in tiny().items()}
    torch.save({"model": trained, "ema": average}, tmp_path / "in.pt")
    for number, (words, taken, other, expected) in enumerate(
        (
            ([], "ema", "model", average),
            (["--weights", "ema"], "ema", "model", average),
            (["--weights", "model"], "model", "ema", trained),
        )
    ):
        out = tmp_path / f"{number}.safetensors"
        main(["convert", str(tmp_path / "in.pt"), str(out), *words])
        assert f"in.pt: took `{taken}` and not `{other}`" in capsys.readouterr().out
        assert identity_of(read_weights(out)) == identity_of(expected)


def test_what_llamagen_has_not_has_no_file_of_llamagens(tmp_path: Path) -> None:
    torch.save(tiny() | {TARGET_POSITIONS: torch.zeros(4, 16)}, tmp_path / "early.pt")
    with pytest.raises(UserError, match=r"early\.pt is not in raster order yet .* from image train\.anneal_until on"):
        main(["convert", str(tmp_path / "early.pt"), str(tmp_path / "out.safetensors")])
    torch.save(tiny() | {"beta_embedding.fc1.weight": torch.zeros(16, 256)}, tmp_path / "free.pt")
    with pytest.raises(UserError, match=r"free\.pt was trained guidance-free"):
        main(["convert", str(tmp_path / "free.pt"), str(tmp_path / "out.safetensors")])
    torch.save(tiny(), tmp_path / "late.pt")
    main(["convert", str(tmp_path / "late.pt"), str(tmp_path / "out.safetensors")])


def test_bad_input_is_one_sentence_and_leaves_nothing(tmp_path: Path) -> None:
    torch.save(tiny(), tmp_path / "in.pt")
    torch.save({"w": torch.ones(1)}, tmp_path / "other.pt")
    (tmp_path / "there.pt").touch()
    before = sorted(tmp_path.iterdir())
    for words, sentence in (
        (["in.pt", "out.bin"], "the suffix must be"),
        (["in.pt", "out.pt", "--to", "safetensors"], "must end in .safetensors"),
        (["in.pt", "out.safetensors", "--from", "safetensors"], "is a llamagen file by its suffix"),
        (["in.pt", "there.pt"], "is there already"),
        (["absent.pt", "out.pt"], "no such checkpoint"),
        (["other.pt", "out.safetensors"], "other.pt: neither a LlamaGen GPT nor a tokenizer"),
        (["in.pt", "out.safetensors", "--size", "GPT-B"], "in.pt: not GPT-B: cls_embedding.embedding_table.weight has"),
        (["in.pt", "in.pt/out.safetensors"], "cannot be written"),
    ):
        with pytest.raises(UserError) as refused:
            main(["convert", *(str(tmp_path / word) if "." in word else word for word in words)])
        assert sentence in str(refused.value)
        assert "\n" not in str(refused.value)
    assert sorted(tmp_path.iterdir()) == before
