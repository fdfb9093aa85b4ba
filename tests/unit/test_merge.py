"""llamagen shards merge, index and full disks; token shards as plain WebDataset reads them."""

import os
import resource
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
import webdataset
from hypothesis import given, settings
from hypothesis import strategies as st

from llamagen_dist.cli import main
from llamagen_dist.data import captions
from llamagen_dist.data.foreign import index_folder, merge, verify
from llamagen_dist.data.manifest import CaptionEncoding, Manifest, read_manifest, write_manifest
from llamagen_dist.data.pack import PackOptions, pack
from llamagen_dist.data.shards import open_shards
from llamagen_dist.data.tokens import CODES_MEMBER, codes_bytes
from llamagen_dist.data.writer import label_text, refused_when_full, shard_name, write_shard
from llamagen_dist.errors import UserError
from tests.unit.picture_sources import contents, encoded, tar_bytes

TOKENS, CROPS, DIM, CLASSES = 16, 3, 8, 12
ENCODING = CaptionEncoding("/a/t5", "ab" * 32, DIM, 120, captions.CLEANING, short=True)


def token_parts(number: int, captioned: bool, labelled: bool) -> dict[str, bytes]:
    rng = np.random.default_rng(number)
    parts = {CODES_MEMBER: codes_bytes(rng.integers(0, 64, (CROPS, TOKENS)).astype(np.uint16))}
    if labelled:
        parts[".cls"] = label_text(number % CLASSES, CLASSES)
    if captioned:
        parts[".txt"] = f"caption {number}: größer".encode()
        for member, length in ((".caption.npy", 1 + number % 7), (".short.npy", 1)):
            values = torch.from_numpy(rng.standard_normal((length, DIM)).astype(np.float32)).to(torch.bfloat16)
            parts[member] = captions.caption_bytes(captions.bits(values))
    return parts


def write_tokens(folder, sizes=(3, 4), first=0, captioned=True, labelled=True, **changes) -> Manifest:
    folder.mkdir(parents=True)
    members = tuple(token_parts(0, captioned, labelled))
    records = []
    for number, size in enumerate(sizes):
        samples = [(f"{n:09d}", token_parts(n, captioned, labelled)) for n in range(first, first + size)]
        records.append(write_shard(folder, shard_name(number), samples, members))
        first += size
    manifest = Manifest(
        kind="tokens",
        count=sum(sizes),
        members=members,
        shards=tuple(records),
        classes=[f"class {n}" for n in range(CLASSES)] if labelled else None,
        image_size=32,
        tokenizer_sha256="cd" * 32,
        vocab_size=64,
        grid=(4, 4),
        crops=CROPS,
        captions=ENCODING if captioned else None,
        source={"made_by": "test"},
    )
    manifest = replace(manifest, **changes)
    write_manifest(folder, manifest)
    return manifest


def read_all(folder) -> list[dict[str, bytes]]:
    shards = open_shards(folder)
    verify(shards)
    return [{part: shards.read(n, part) for part in shards.parts(n)} for n in range(len(shards))]


@pytest.mark.parametrize("captioned", [False, True])
@pytest.mark.parametrize("labelled", [False, True])
def test_plain_webdataset_streams_token_shards(tmp_path, captioned, labelled):
    write_tokens(tmp_path / "set", captioned=captioned, labelled=labelled)
    url = str(tmp_path / "set" / "shard-{000000..000001}.tar")
    stream = list(webdataset.WebDataset(url, shardshuffle=False).decode())
    assert len(stream) == 7
    for n, sample in enumerate(stream):
        parts = token_parts(n, captioned, labelled)
        assert {f".{key}" for key in sample if not key.startswith("__")} == {*parts}
        codes = np.random.default_rng(n).integers(0, 64, (CROPS, TOKENS))
        assert sample["codes.npy"].dtype == np.uint16
        assert np.array_equal(sample["codes.npy"], codes)
        assert not np.array_equal(sample["codes.npy"], np.roll(codes, 1))
        if labelled:
            assert sample["cls"] == n % CLASSES
        if captioned:
            assert sample["txt"] == f"caption {n}: größer"
            features = captions.features(sample["caption.npy"])
            assert (features.dtype, tuple(features.shape)) == (torch.bfloat16, (1 + n % 7, DIM))
            assert captions.caption_bytes(captions.bits(features)) == parts[".caption.npy"]
            assert sample["short.npy"].shape == (1, DIM)


@settings(max_examples=8, deadline=None)
@given(
    sizes=st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=3).filter(any), min_size=2, max_size=3),
    captioned=st.booleans(),
    copy=st.booleans(),
)
def test_merged_sets_hold_all_samples_in_the_stated_order(tmp_path_factory, sizes, captioned, copy):
    root, first, folders, expected = tmp_path_factory.mktemp("merge"), 0, [], []
    for number, part in enumerate(sizes):
        folders.append(root / f"{number}")
        write_tokens(folders[-1], part, first, captioned)
        expected += [token_parts(n, captioned, True) for n in range(first, first + sum(part))]
        first += sum(part)
    manifest = merge(folders, root / "out", copy)
    assert read_all(root / "out") == expected
    assert manifest == read_manifest(root / "out")
    if len(expected) > 1:
        swapped = merge([*folders[1:], folders[0]], root / "swapped", copy)
        assert read_all(root / "swapped") != expected  # the sabotage: another order is noticed
        assert swapped.fingerprint() != manifest.fingerprint()


def test_tars_are_linked_or_copied_and_the_same_command_again_does_nothing(tmp_path, capsys):
    write_tokens(tmp_path / "a")
    write_tokens(tmp_path / "b", first=50)
    folders = [str(tmp_path / "a"), str(tmp_path / "b")]
    main(["shards", "merge", *folders, "--out", str(tmp_path / "linked")])
    assert f"{tmp_path / 'linked'}: 4 shards, 14 samples" in capsys.readouterr().out
    main(["shards", "merge", *folders, "--out", str(tmp_path / "copied"), "--copy"])
    assert contents(tmp_path / "linked") == contents(tmp_path / "copied")
    assert os.path.samefile(tmp_path / "a" / "shard-000000.tar", tmp_path / "linked" / "shard-000000.tar")
    assert not os.path.samefile(tmp_path / "a" / "shard-000000.tar", tmp_path / "copied" / "shard-000000.tar")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "copied").iterdir()}
    main(["shards", "merge", *folders, "--out", str(tmp_path / "copied"), "--copy"])
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "copied").iterdir()} == before
    with pytest.raises(UserError, match="made in another way"):
        merge([tmp_path / "b", tmp_path / "a"], tmp_path / "copied")
    shutil.rmtree(tmp_path / "a")
    verify(open_shards(tmp_path / "linked"))  # the links do not need the folders they came from


def test_a_merge_that_was_cut_off_goes_on(tmp_path, monkeypatch):
    folders = [tmp_path / "a", tmp_path / "b"]
    write_tokens(folders[0])
    write_tokens(folders[1], first=50)
    merge(folders, tmp_path / "whole")

    class Killed(BaseException):
        pass

    def killed(count: int, name: str) -> None:
        if name == shard_name(2):
            raise Killed

    with pytest.raises(Killed):
        merge(folders, tmp_path / "cut", advance=killed)
    with pytest.raises(UserError, match="no shards here"):
        open_shards(tmp_path / "cut")
    merge(folders, tmp_path / "cut")
    assert contents(tmp_path / "cut") == contents(tmp_path / "whole")


def test_a_damaged_shard_is_not_copied(tmp_path):
    write_tokens(tmp_path / "a")
    record = write_tokens(tmp_path / "b", first=50).shards[1]
    path = tmp_path / "b" / record.name
    data = bytearray(path.read_bytes())
    data[600] ^= 1
    path.write_bytes(data)
    with pytest.raises(UserError, match=rf"{record.name}: sha256 .* records {record.sha256}"):
        merge([tmp_path / "a", tmp_path / "b"], tmp_path / "out", copy=True)
    assert not (tmp_path / "out" / "manifest.json").exists()
    assert not list((tmp_path / "out").glob(".*.tmp*"))


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"tokenizer_sha256": "ef" * 32}, r"the tokenizers differ \(sha256\): cdcd.* and efef"),
        ({"vocab_size": 128}, "codes: 64 and 128"),
        ({"grid": (8, 2)}, r"grid of tokens: \(4, 4\) and \(8, 2\)"),
        ({"crops": 2}, "crops per image: 3 and 2"),
        ({"image_size": 64}, "image size: 32 and 64"),
        ({"padding": (1, 1, 1, 1)}, "padding: None and"),
        ({"classes": [f"class {n}" for n in range(11)]}, "12 and 11 classes"),
        ({"classes": ["class 0", "dog"] + [f"class {n}" for n in range(2, 12)]}, "class 1 is 'class 1' and 'dog'"),
        ({"captions": replace(ENCODING, encoder_sha256="0" * 64)}, "the captions were encoded differently"),
        ({"captions": replace(ENCODING, max_tokens=77)}, "the captions were encoded differently"),
        ({"captioned": False}, "the captions were encoded differently.*parts of a sample"),
        ({"labelled": False}, "only one of them has classes.*parts of a sample"),
        ({"kind": "images"}, "one holds tokens, the other images"),
    ],
)
def test_sets_that_do_not_go_together_are_refused(tmp_path, changes, reason):
    write_tokens(tmp_path / "a")
    write_tokens(tmp_path / "b", first=50, **changes)
    with pytest.raises(UserError, match=rf"{tmp_path}/b: cannot be merged with {tmp_path}/a: .*{reason}") as caught:
        merge([tmp_path / "a", tmp_path / "b"], tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_what_makes_no_difference_is_merged(tmp_path):
    """The twin of the refusals: another path of the same encoder, and the parts of a sample in another order."""
    write_tokens(tmp_path / "a", sizes=(2,), captioned=False)
    write_tokens(tmp_path / "b", first=50, sizes=(2,), captioned=False)
    members, samples = (".cls", CODES_MEMBER), [(f"{n}", token_parts(n, False, True)) for n in (50, 51)]
    record = write_shard(tmp_path / "b", shard_name(0), samples, members)
    write_manifest(
        tmp_path / "b",
        replace(read_manifest(tmp_path / "b"), members=members, shards=(record,)),
    )
    manifest = merge([tmp_path / "a", tmp_path / "b"], tmp_path / "out")
    assert read_all(tmp_path / "out") == [token_parts(n, False, True) for n in (0, 1, 50, 51)]
    assert all(record.layout is not None for record in manifest.shards)
    write_tokens(tmp_path / "c")
    write_tokens(tmp_path / "d", first=50, captions=replace(ENCODING, encoder="/elsewhere/t5"))
    assert merge([tmp_path / "c", tmp_path / "d"], tmp_path / "texts").captions == ENCODING


def test_the_same_shard_twice_is_refused(tmp_path):
    write_tokens(tmp_path / "a")
    shutil.copytree(tmp_path / "a", tmp_path / "again")
    with pytest.raises(UserError, match=r"again/shard-000000.tar: has the same bytes as .*a/shard-000000.tar"):
        merge([tmp_path / "a", tmp_path / "again"], tmp_path / "out")
    with pytest.raises(UserError, match="two or more folders"):
        merge([tmp_path / "a"], tmp_path / "out")


def write_images(folder, kinds, first, size=None):
    folder.mkdir()
    members = tuple(sorted({f".{kind.lower()}" for kind in kinds}))
    samples = [(f"{first + n}", {f".{kind.lower()}": encoded(first + n, kind)}) for n, kind in enumerate(kinds)]
    record = write_shard(folder, shard_name(0), samples, members)
    write_manifest(folder, Manifest("images", len(kinds), members, (record,), skipped=("x",), image_size=size))
    return [parts for _, parts in samples]


def test_image_sets_of_different_formats_are_merged_and_can_be_indexed_again(tmp_path):
    first = write_images(tmp_path / "a", ["PNG"], 0)  # a single sample has a layout, which the merged set cannot use
    second = write_images(tmp_path / "b", ["JPEG", "PNG"], 10)
    manifest = merge([tmp_path / "a", tmp_path / "b"], tmp_path / "out")
    assert manifest.members == (".jpeg", ".png")
    assert manifest.skipped == ("x", "x")
    assert read_all(tmp_path / "out") == first + second
    for path in (tmp_path / "out").glob("*.index.npy"):
        path.unlink()
    index_folder(tmp_path / "out")
    assert read_all(tmp_path / "out") == first + second


# --- llamagen shards index


def test_captioned_tars_without_classes_are_indexed(tmp_path):
    entries = [(f"{n}.{end}", data) for n in range(3) for end, data in (("jpg", encoded(n)), ("txt", b"a %d" % n))]
    (tmp_path / "x.tar").write_bytes(tar_bytes(entries))
    manifest = index_folder(tmp_path)
    assert manifest.classes is None
    assert read_all(tmp_path) == [{".jpg": encoded(n), ".txt": b"a %d" % n} for n in range(3)]
    good = (tmp_path / "x.tar").read_bytes()
    damaged = bytearray(good)
    damaged[good.index(encoded(1)) + 30] ^= 1
    (tmp_path / "x.tar").write_bytes(damaged)
    with pytest.raises(UserError, match=r"x\.tar: sha256 .*its bytes have changed"):
        verify(open_shards(tmp_path))
    (tmp_path / "x.index.npy").unlink()
    with pytest.raises(UserError, match=r"is not the shard that manifest.json records"):
        index_folder(tmp_path)  # an index of damaged bytes would hide the damage
    (tmp_path / "x.tar").write_bytes(good)
    index_folder(tmp_path)
    assert (tmp_path / "x.index.npy").exists()
    verify(open_shards(tmp_path))


@pytest.mark.parametrize(
    ("entries", "reason"),
    [
        ([("a.jpg", b"1"), ("a.txt", b"x"), ("b.jpg", b"2")], "1 of 2 samples have no .txt, the first is sample 1"),
        (
            [("a.jpg", b"1"), ("b.txt", b"x"), ("b.seg.png", b"2")],
            "1 of 2 samples have no image, the first",
        ),
        ([("a.jpg", b"1"), ("a.cls", b"0"), ("b.jpg", b"2")], "1 of 2 samples have no .cls, the first is sample 1"),
        ([("a.jpg", b"1"), ("a.cls", b"cat")], "label b'cat' is not one of"),
        ([("a.codes.npy", b"1"), ("a.cls", b"0")], "these are token shards"),
        ([("a.txt", b"1")], "no images in these tars"),
    ],
)
def test_tars_that_cannot_be_indexed_are_left_as_they_were(tmp_path, entries, reason):
    (tmp_path / "x.tar").write_bytes(tar_bytes(entries))
    with pytest.raises(UserError, match=reason):
        index_folder(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["x.tar"]


# --- a full disk


def test_a_full_disk_is_one_sentence_and_the_pack_goes_on_when_there_is_room(tmp_path):
    photos, out = tmp_path / "photos", tmp_path / "shards"
    (photos / "thing").mkdir(parents=True)
    for n in range(9):  # shuffled into shards of three; the one with the large picture does not fit
        (photos / "thing" / f"{n}.png").write_bytes(encoded(n, "PNG", (200, 100) if n == 8 else (24, 20)))
    options = PackOptions(samples_per_shard=3)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    try:
        with pytest.raises(UserError, match=rf"{out}: File too large; make room and run the same command again"):
            pack(str(photos), out, options)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not (out / "manifest.json").exists()
    assert not list(out.glob(".*.tmp*"))
    kept = {path: path.stat().st_mtime_ns for path in out.glob("*.tar")}
    assert 0 < len(kept) < 3
    pack(str(photos), out, options)
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    pack(str(photos), tmp_path / "fresh", options)
    assert contents(out) == contents(tmp_path / "fresh")


def test_no_space_left_is_said_and_another_error_keeps_its_traceback(tmp_path):
    refused = pytest.raises(UserError, match=f"{tmp_path}: No space left on device; make room")
    with refused, refused_when_full(tmp_path), open("/dev/full", "wb", buffering=0) as file:
        file.write(b"x")
    with pytest.raises(IsADirectoryError), refused_when_full(tmp_path):
        tmp_path.write_bytes(b"")
