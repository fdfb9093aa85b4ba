"""Caption features from a tiny T5 made on the spot: the same whoever shares the batch, and nothing loaded in part."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import T5Config, T5ForConditionalGeneration

from examples.text_encoder import make_small_text_encoder
from llamagen_dist.data import text_encoder
from llamagen_dist.data.captions import bits, features
from llamagen_dist.data.text_encoder import CaptionEncoder
from llamagen_dist.errors import UserError

TEXT = "a red blue cat dog on the mat sits runs in house of with big small"
WORDS = TEXT.split()


def captions(count: int, longest: int) -> list[str]:
    """Of every length from none to ``longest`` words."""
    draw = torch.Generator().manual_seed(1)
    lengths = torch.arange(count) * (longest + 1) // count
    return [" ".join(WORDS[i] for i in torch.randint(len(WORDS), (int(n),), generator=draw)) for n in lengths]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("text") / "t5"
    assert make_small_text_encoder([TEXT], out, dim=32) == len(WORDS)
    return out


@pytest.fixture(scope="module")
def encoder(folder) -> CaptionEncoder:
    return CaptionEncoder(folder, max_tokens=24)


def test_features_are_those_of_the_plain_model_without_padding(encoder):
    texts = captions(40, 30)
    for text, found in zip(texts, encoder.encode(texts, batch=8), strict=True):
        ids = encoder.tokenizer(text, truncation=True, max_length=24, return_tensors="pt").input_ids
        expected = encoder.model(input_ids=ids).last_hidden_state[0]
        assert found.dtype == torch.bfloat16
        assert found.shape == expected.shape == (min(len(text.split()) + 1, 24), 32)
        assert torch.allclose(found.float(), expected, rtol=2**-8, atol=1e-5)


def test_a_captions_features_do_not_depend_on_the_others(encoder):
    texts = captions(60, 30)
    whole = encoder.encode(texts, batch=8)
    order = torch.randperm(60, generator=torch.Generator().manual_seed(2)).tolist()
    shuffled = encoder.encode([texts[number] for number in order], batch=8)
    assert all(torch.equal(whole[number], row) for number, row in zip(order, shuffled, strict=True))
    assert all(torch.equal(whole[n], encoder.encode([texts[n]], batch=8)[0]) for n in (0, 17, 59))


def test_padding_that_is_seen_is_noticed(encoder, monkeypatch):
    texts = captions(40, 30)
    whole = encoder.encode(texts, batch=8)
    forward = encoder.model.forward
    monkeypatch.setattr(
        encoder.model,
        "forward",
        lambda input_ids, attention_mask: forward(input_ids, attention_mask=torch.ones_like(attention_mask)),
    )
    blind = encoder.encode(texts, batch=8)
    assert any(not torch.equal(one, other) for one, other in zip(whole, blind, strict=True))


def test_captions_are_cleaned_and_may_be_empty(encoder):
    dirty, clean, empty, nothing = encoder.encode(["<b>A red CAT</b> IMG_1.jpg", "a red cat", "", "😀.png"])
    assert torch.equal(dirty, clean)
    assert empty.shape == (1, 32)
    assert torch.equal(empty, nothing)
    assert encoder.encode([]) == []


def test_features_survive_the_way_into_a_shard(encoder):
    found = encoder.encode(["a big dog runs"])[0]
    assert torch.equal(features(bits(found)), found)
    with pytest.raises(TypeError, match="bfloat16"):
        bits(found.float())


def test_the_hash_names_the_files_that_decide_the_features(encoder, folder, tmp_path):
    copy = shutil.copytree(folder, tmp_path / "copy")
    (copy / "README.md").write_text("notes")
    assert CaptionEncoder(copy).sha256 == encoder.sha256
    weights = load_file(copy / "model.safetensors")
    weights["encoder.final_layer_norm.weight"][0] += 1e-3
    save_file(weights, copy / "model.safetensors")
    assert CaptionEncoder(copy).sha256 != encoder.sha256


@pytest.mark.parametrize("form", ["safetensors", "shards", "pickled"])
def test_a_whole_t5_as_published_is_read_for_its_encoder(encoder, folder, tmp_path, form):
    copy = shutil.copytree(folder, tmp_path / "copy")
    (copy / "model.safetensors").unlink()
    torch.manual_seed(4)
    whole = T5ForConditionalGeneration(T5Config.from_pretrained(copy, num_decoder_layers=1))
    whole.encoder.load_state_dict(encoder.model.encoder.state_dict())
    if form == "pickled":
        torch.save(whole.state_dict(), copy / "pytorch_model.bin")
    else:
        whole.save_pretrained(copy, max_shard_size="20KB" if form == "shards" else "1GB")
    texts = captions(6, 20)
    found = CaptionEncoder(copy, max_tokens=24).encode(texts, batch=8)
    assert all(torch.equal(one, other) for one, other in zip(found, encoder.encode(texts, batch=8), strict=True))
    if form == "shards":
        sorted(copy.glob("*.safetensors"))[1].unlink()
        with pytest.raises(UserError, match="cannot be loaded"):
            CaptionEncoder(copy)
    else:
        (weights,) = (path for path in copy.iterdir() if path.suffix in (".safetensors", ".bin"))
        weights.write_bytes(weights.read_bytes()[:-1000])
        with pytest.raises(UserError, match=rf"cannot be loaded: {weights.name} ends too early, most likely"):
            CaptionEncoder(copy)


def without(folder: Path, what: str) -> None:
    """Spoil a copy of a text encoder."""
    if what == "a weight":
        weights = load_file(folder / "model.safetensors")
        del weights["encoder.block.1.layer.0.SelfAttention.q.weight"]
        save_file(weights, folder / "model.safetensors", {"format": "pt"})
    elif what == "half its words":
        config = json.loads((folder / "config.json").read_text())
        weights = load_file(folder / "model.safetensors")
        weights["shared.weight"] = weights["shared.weight"][:8].clone()
        save_file(weights, folder / "model.safetensors", {"format": "pt"})
        (folder / "config.json").write_text(json.dumps({**config, "vocab_size": 8}))
    elif what == "T5":
        (folder / "config.json").write_text('{"model_type": "bert"}')
    elif what == "the tokenizer":
        for name in text_encoder.TOKENIZER_FILES:
            (folder / name).unlink(missing_ok=True)
    elif what == "bytes":
        data = (folder / "model.safetensors").read_bytes()
        (folder / "model.safetensors").write_bytes(data[: len(data) // 2])
    else:
        (folder / what).unlink()


@pytest.mark.parametrize(
    ("what", "sentence"),
    [
        ("config.json", "no config.json"),
        ("T5", "model_type 'bert', not 't5'"),
        ("model.safetensors", "no weights in it"),
        ("the tokenizer", "no tokenizer in it"),
        ("a weight", "1 of its weights are not in the files"),
        ("half its words", "do not belong together"),
        ("bytes", "cannot be loaded"),
    ],
)
def test_a_text_encoder_without_some_part_is_refused(folder, tmp_path, what, sentence):
    copy = shutil.copytree(folder, tmp_path / "copy")
    without(copy, what)
    with pytest.raises(UserError, match=sentence) as refusal:
        CaptionEncoder(copy)
    assert "\n" not in str(refusal.value)
    assert str(copy) in str(refusal.value)


def test_making_one_is_repeatable_and_never_overwrites(folder, tmp_path):
    again = tmp_path / "again"
    make_small_text_encoder(iter([TEXT]), again, dim=32)
    assert CaptionEncoder(again).sha256 == CaptionEncoder(folder).sha256
    make_small_text_encoder([TEXT], tmp_path / "other", dim=32, seed=1)
    assert CaptionEncoder(tmp_path / "other").sha256 != CaptionEncoder(folder).sha256
    with pytest.raises(UserError, match="made in another way"):
        make_small_text_encoder(["a"], folder)
    with pytest.raises(UserError, match="no word"):
        make_small_text_encoder(["", "photo.jpg"], tmp_path / "empty")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["again", "other"]
