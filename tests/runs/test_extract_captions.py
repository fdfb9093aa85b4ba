"""Captions through extraction: their features are the encoder's own, the same bytes for any ranks; faults are said."""

import contextlib
import io
import os
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import save_file

import tokenizer_training.extract as program
from llamagen_dist.build import build_vq
from llamagen_dist.config import TokenizerModelSection
from llamagen_dist.data.captions import CAPTION_FEATURES_MEMBER, SHORT_FEATURES_MEMBER, bits, clean
from llamagen_dist.data.foreign import verify
from llamagen_dist.data.manifest import Manifest, write_manifest
from llamagen_dist.data.shards import CAPTION_MEMBER, SHORT_CAPTION_MEMBER, open_shards
from llamagen_dist.data.text_encoder import CaptionEncoder
from llamagen_dist.data.tokens import CODES_MEMBER
from llamagen_dist.data.writer import shard_name, write_shard
from llamagen_dist.errors import UserError
from tests.ranks.forked import end_ranks, run_ranks
from tests.tiny_t5 import write_t5
from tests.tokenizer_run import TINY

SIZE, COUNT = 16, 23
EMPTY = (4, 17)
WITH_SHORT = 5


def caption(number: int) -> bytes:
    if number in EMPTY:
        return [b"", b" http://example.com/x "][number > 10]  # the second is empty once cleaned
    words = ["a red fox", "two Blue birds", "one green tree"][number % 3]
    return f"{words} near the river. It is day {'very ' * (number % 7)}late.".encode()


def write_images(folder: Path, captions: list[bytes | None], classes: list[str] | None = None) -> Path:
    folder.mkdir(parents=True)
    members = (".png", CAPTION_MEMBER, SHORT_CAPTION_MEMBER) + ((".cls",) if classes else ())

    def samples():
        for number, text in enumerate(captions):
            buffer = io.BytesIO()
            small = np.random.default_rng(number).integers(256, size=(4, 4, 3)).astype(np.uint8)
            Image.fromarray(small).resize((SIZE, SIZE), Image.Resampling.BICUBIC).save(buffer, "PNG")
            parts = {".png": buffer.getvalue()}
            if text is not None:
                parts[CAPTION_MEMBER] = text
            if number == WITH_SHORT:
                parts[SHORT_CAPTION_MEMBER] = b"blue birds"
            if classes:
                parts[".cls"] = str(number % len(classes)).encode()
            yield f"{number:08d}", parts

    record = write_shard(folder, shard_name(0), samples(), members)
    write_manifest(folder, Manifest("images", len(captions), members, (record,), classes, SIZE))
    return folder


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    folder = tmp_path_factory.mktemp("captions")
    torch.manual_seed(0)
    model = build_vq(TokenizerModelSection(**TINY))
    for name in ("tokenizer", "other"):
        save_file({k: v.contiguous() for k, v in model.state_dict().items()}, folder / f"{name}.safetensors")
        torch.nn.init.normal_(model.quant_conv.weight)
    captions = [caption(number) for number in range(COUNT)]
    write_images(folder / "images", captions)
    write_t5(folder / "t5", [text.decode() for text in captions])
    settings = {
        "kind": "extract",
        "tokenizer": str(folder / "tokenizer.safetensors"),
        "model": TINY,
        "images": str(folder / "images"),
        "out": str(folder / "unused"),
        "text_encoder": str(folder / "t5"),
        "max_caption_tokens": 9,
        "image_size": SIZE,
        "crops": "center",
        "batch": 4,
        "samples_per_shard": 5,
    }
    (folder / "extract.yaml").write_text(yaml.safe_dump(settings))
    return folder


def extract(work: Path, out: Path, *settings: str) -> str:
    heard = io.StringIO()
    with contextlib.redirect_stdout(heard):
        program.main([str(work / "extract.yaml"), f"out={out}", *settings])
    return heard.getvalue()


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def array(shards, sample: int, member: str) -> np.ndarray:
    return np.load(io.BytesIO(shards.read(sample, member)), allow_pickle=False)


@pytest.fixture(scope="module")
def alone(work):
    heard = extract(work, work / "alone")
    assert "2 empty captions (once cleaned), encoded as the end mark alone" in heard
    return work / "alone"


def test_captions_and_their_features_lie_beside_the_codes(work, alone):
    shards = open_shards(alone, "tokens")
    verify(shards)
    encoder = CaptionEncoder(work / "t5", max_tokens=9)
    said = shards.manifest.captions
    assert said is not None
    assert (said.encoder_sha256, said.dim, said.max_tokens, said.short) == (encoder.sha256, 8, 9, True)
    assert shards.manifest.classes is None
    long = [shards.read(sample, CAPTION_MEMBER) for sample in range(COUNT)]
    assert long == [caption(sample) for sample in range(COUNT)]
    short = [shards.read(sample, SHORT_CAPTION_MEMBER).decode() for sample in range(COUNT)]
    assert short[WITH_SHORT] == "blue birds"
    assert short[0] == "a red fox near the river"
    for texts, member in (
        ([text.decode() for text in long], CAPTION_FEATURES_MEMBER),
        (short, SHORT_FEATURES_MEMBER),
    ):
        expected = [bits(encoder.encode([text])[0]) for text in texts]
        found = [array(shards, sample, member) for sample in range(COUNT)]
        assert all(np.array_equal(a, b) for a, b in zip(expected, found, strict=True))
        moved = [*expected[1:], expected[0]]
        assert sum(np.array_equal(a, b) for a, b in zip(moved, found, strict=True)) < COUNT // 2
    assert [array(shards, sample, CAPTION_FEATURES_MEMBER).shape for sample in EMPTY] == [(1, 8)] * 2
    assert clean(caption(EMPTY[1]).decode()) == ""
    at_limit = sum(len(array(shards, sample, CAPTION_FEATURES_MEMBER)) == 9 for sample in range(COUNT))
    assert 0 < at_limit < COUNT
    assert shards.manifest.noticed == {"empty_captions": 2, "captions_at_limit": at_limit}


def test_the_codes_do_not_depend_on_captions(work, alone, tmp_path):
    """With classes and captions, features or not: the same codes; without a text encoder, records of equal length."""
    pictures = write_images(tmp_path / "images", [caption(n) for n in range(COUNT)], ["even", "odd"])
    extract(work, tmp_path / "plain", f"images={pictures}", "text_encoder=null")
    extract(work, tmp_path / "both", f"images={pictures}", "short_captions=false")
    plain, both, captions = (open_shards(out, "tokens") for out in (tmp_path / "plain", tmp_path / "both", alone))
    assert all(record.layout is not None for record in plain.manifest.shards)
    assert set(both.manifest.members) == {".cls", CODES_MEMBER, CAPTION_MEMBER, CAPTION_FEATURES_MEMBER}
    assert np.array_equal(both.labels(range(COUNT)), np.arange(COUNT) % 2)
    codes = [[array(shards, n, CODES_MEMBER) for n in range(COUNT)] for shards in (plain, both, captions)]
    assert np.array_equal(codes[0], codes[1])
    assert np.array_equal(codes[0], codes[2])
    assert not np.array_equal(codes[0][1:], codes[0][:-1])


@pytest.mark.parametrize("ranks", [2, 3])
def test_any_number_of_ranks_writes_the_same_bytes(work, alone, tmp_path, ranks):
    run_ranks(program.main, ranks, [str(work / "extract.yaml"), f"out={tmp_path / 'out'}"])
    assert contents(tmp_path / "out") == contents(alone)
    assert sum(name.endswith(".tar") for name in contents(alone)) == 5
    assert not [name for name in contents(alone) if name.startswith(".")]  # nothing left behind


def killed_in_its_second_shard(arguments: list[str]) -> None:
    """Rank 1 of 2 writes shards 1 and 3; it is killed when half of the latter is written."""
    written = program.codes_bytes
    count = 0

    def count_and_die(codes):
        nonlocal count
        count += 1
        if os.environ["RANK"] == "1" and count == 8:
            os.kill(os.getpid(), signal.SIGKILL)
        return written(codes)

    program.codes_bytes = count_and_die
    program.main(arguments)


def test_a_killed_rank_loses_one_shard_and_nothing_is_doubled(work, alone, tmp_path):
    out = tmp_path / "out"
    words = [str(work / "extract.yaml"), f"out={out}"]
    codes = [code for code, _ in end_ranks(killed_in_its_second_shard, 2, words)]
    assert codes[1] == -signal.SIGKILL
    assert not (out / "manifest.json").exists()
    done = {path.name: path.stat().st_mtime_ns for path in out.glob("*.tar")}
    assert shard_name(1) in done
    assert shard_name(3) not in done
    index = out / shard_name(1).replace(".tar", ".index.npy")
    index.write_bytes(index.read_bytes()[:-1] + b"x")  # and one that was finished is damaged
    run_ranks(program.main, 3, words)
    assert contents(out) == contents(alone)  # the counts in the manifest are those of all shards, too
    again = {path.name for path in out.glob("*.tar") if path.stat().st_mtime_ns != done.get(path.name)}
    assert again == {shard_name(number) for number in range(5)} - (done.keys() - {shard_name(1)})


def test_bf16_says_how_many_codes_it_changes(work, tmp_path):
    heard = extract(work, tmp_path / "bf16", "text_encoder=null", f"images={classed(tmp_path)}", "precision=bf16")
    extract(work, tmp_path / "fp32", "text_encoder=null", f"images={classed(tmp_path)}")
    rounded, exact = (open_shards(tmp_path / name) for name in ("bf16", "fp32"))
    codes = [np.stack([array(shards, n, CODES_MEMBER) for n in range(COUNT)]) for shards in (rounded, exact)]
    changed = int((codes[0] != codes[1]).sum())
    assert 0 < changed < codes[0].size / 5
    assert rounded.manifest.noticed == {"bf16_changed_codes": changed, "bf16_compared_codes": codes[0].size}
    assert f"bf16 changes {changed} of {codes[0].size:,} codes" in heard
    assert exact.manifest.noticed == {}
    with pytest.raises(UserError, match=r"made in another way \(precision"):
        extract(work, tmp_path / "fp32", "text_encoder=null", f"images={classed(tmp_path)}", "precision=bf16")


def classed(folder: Path) -> Path:
    images = folder / "classed"
    return images if images.exists() else write_images(images, [caption(n) for n in range(COUNT)], ["a", "b", "c"])


def test_another_text_encoder_or_tokenizer_is_refused(work, alone):
    before = contents(alone)
    write_t5(work / "t5-other", ["other words"], seed=1)
    for setting, what in (
        (f"text_encoder={work / 't5-other'}", "captions"),
        ("max_caption_tokens=8", "captions"),
        ("short_captions=false", "captions"),
        (f"tokenizer={work / 'other.safetensors'}", "tokenizer_sha256"),
    ):
        with pytest.raises(UserError, match=f"made in another way .{what}: "):
            extract(work, alone, setting)
    assert contents(alone) == before


def test_nothing_is_written_where_one_of_two_sets_has_another_tokenizers_tokens(work, tmp_path):
    for name in ("train", "validation"):
        write_images(tmp_path / "images" / name, [caption(n) for n in range(3)])
    images = f"images={tmp_path / 'images'}"
    extract(work, tmp_path / "out", images)
    first = contents(tmp_path / "out")
    for path in (tmp_path / "out" / "train").iterdir():
        path.unlink()
    with pytest.raises(UserError, match="out/validation: already holds shards made in another way"):
        extract(work, tmp_path / "out", images, f"tokenizer={work / 'other.safetensors'}")
    assert not list((tmp_path / "out" / "train").iterdir())
    extract(work, tmp_path / "out", images)
    assert contents(tmp_path / "out") == first


@pytest.mark.parametrize(("third", "sentence"), [
    (None, "sample 3 has no .txt"),
    (b"caf\xe9", "sample 3: .txt is not UTF-8 (unexpected end of data at byte 3)"),
])  # fmt: skip
def test_a_caption_that_cannot_be_read_is_named(work, tmp_path, third, sentence):
    texts = [caption(n) for n in range(6)]
    images = write_images(tmp_path / "images", [*texts[:3], third, *texts[4:]])
    with pytest.raises(UserError) as refusal:
        extract(work, tmp_path / "out", f"images={images}")
    assert sentence in str(refusal.value)
    assert not list((tmp_path / "out").glob("*.tar"))
    extract(work, tmp_path / "good", f"images={write_images(tmp_path / 'good-images', texts)}")


@pytest.mark.parametrize(("setting", "sentence"), [
    ("text_encoder=null", "no class labels (.cls), and token shards need those or encoded captions; it has captions"),
    ("text_encoder={work}/nowhere", "there is no such folder"),
    ("text_encoder={work}/images", "no config.json"),
    ("max_caption_tokens=0", "max_caption_tokens"),
])  # fmt: skip
def test_wrong_inputs_get_one_sentence(work, tmp_path, setting, sentence):
    with pytest.raises(UserError) as refusal:
        extract(work, tmp_path / "out", setting.format(work=work))
    assert sentence in str(refusal.value)
    assert not (tmp_path / "out").exists()
