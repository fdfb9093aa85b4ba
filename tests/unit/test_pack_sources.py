"""llamagen pack: captions, WebDataset tars, a tar of tars, class maps, limits; the same samples as the files hold."""

import io
import json
import os
import signal
import struct
import tarfile
import zlib

import numpy as np
import pytest
import webdataset
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from llamagen_dist.cli import main
from llamagen_dist.config import UserError
from llamagen_dist.data.images import decode, load_images
from llamagen_dist.data.index import scan
from llamagen_dist.data.pack import PackOptions, pack
from llamagen_dist.data.recipe import ImageRecipe
from llamagen_dist.data.shards import open_shards, verify
from llamagen_dist.data.sources import open_source
from llamagen_dist.data.sources.source import caption_of


def encoded(seed: int, kind: str = "JPEG", size: tuple[int, int] = (24, 20), mode: str = "RGB") -> bytes:
    rng = np.random.default_rng(seed)
    image = Image.fromarray(rng.integers(0, 256, (size[1], size[0], 3)).astype(np.uint8)).convert(mode)
    buffer = io.BytesIO()
    image.save(buffer, kind, **({"lossless": True} if kind == "WEBP" else {}))
    return buffer.getvalue()


def tar_bytes(entries: list[tuple[str | bytes, bytes]]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.GNU_FORMAT) as tar:
        for name, data in entries:
            info = tarfile.TarInfo(name.decode("utf-8", "surrogateescape") if isinstance(name, bytes) else name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def samples(folder) -> list[dict[str, bytes]]:
    """Every sample's parts, in an order that does not depend on the shuffling."""
    shards = open_shards(folder)
    verify(shards)
    found = [{part: shards.read(n, part) for part in shards.parts(n)} for n in range(len(shards))]
    return sorted(found, key=lambda parts: sorted(parts.items()))


def one_sentence(source, out, **options) -> str:
    with pytest.raises(UserError) as caught:
        pack(str(source), out, PackOptions(**options))
    assert "\n" not in str(caught.value)
    assert not (out / "manifest.json").exists()
    return str(caught.value)


def contents(folder) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


# --- jsonl


@pytest.fixture
def captioned(tmp_path):
    """pairs/set.jsonl: three formats, one caption, two captions, a list of three."""
    folder = tmp_path / "pairs"
    (folder / "img").mkdir(parents=True)
    lines = []
    for n, (kind, more) in enumerate(
        [
            ("JPEG", {"text": "a grey cat"}),
            ("PNG", {"text": "ein Kätzchen, das schläft", "short": "Kätzchen"}),
            ("WEBP", {"text": ["a dog", "a dog that runs over a lawn", "a dog that runs"]}),
            ("JPEG", {"caption": "two birds"}),
        ]
    ):
        (folder / "img" / f"{n}.bin").write_bytes(encoded(n, kind))
        lines.append(json.dumps({"image_path": f"img/{n}.bin", **more}, ensure_ascii=n % 2 == 0))
    (folder / "set.jsonl").write_text("\n".join([*lines[:2], "", *lines[2:]]) + "\n", encoding="utf-8")
    return folder / "set.jsonl"


def test_captions_and_files_arrive_byte_for_byte(captioned, tmp_path):
    pack(str(captioned), tmp_path / "out", PackOptions(samples_per_shard=3))
    image = {n: (captioned.parent / "img" / f"{n}.bin").read_bytes() for n in range(4)}
    wanted = [
        {".jpg": image[0], ".txt": b"a grey cat"},
        {".png": image[1], ".txt": "ein Kätzchen, das schläft".encode(), ".short.txt": "Kätzchen".encode()},
        {".webp": image[2], ".txt": b"a dog that runs over a lawn", ".short.txt": b"a dog"},
        {".jpg": image[3], ".txt": b"two birds"},
    ]
    assert samples(tmp_path / "out") == sorted(wanted, key=lambda parts: sorted(parts.items()))
    manifest = open_shards(tmp_path / "out").manifest
    assert manifest.classes is None
    assert ".cls" not in manifest.members


def test_captions_of_other_images_would_be_noticed(captioned, tmp_path):
    """The sabotage of the test above: two images swapped, everything else the same."""
    a, b = captioned.parent / "img" / "0.bin", captioned.parent / "img" / "3.bin"
    pack(str(captioned), tmp_path / "right", PackOptions())
    first, second = a.read_bytes(), b.read_bytes()
    a.write_bytes(second)
    b.write_bytes(first)
    pack(str(captioned), tmp_path / "wrong", PackOptions())
    assert samples(tmp_path / "right") != samples(tmp_path / "wrong")


@pytest.mark.parametrize("jobs", [2, 3])
def test_captioned_shards_do_not_depend_on_the_number_of_processes(captioned, tmp_path, jobs):
    pack(str(captioned), tmp_path / "one", PackOptions(samples_per_shard=1, jobs=1))
    pack(str(captioned), tmp_path / "more", PackOptions(samples_per_shard=1, jobs=jobs))
    assert contents(tmp_path / "one") == contents(tmp_path / "more")
    pack(str(captioned), tmp_path / "other", PackOptions(samples_per_shard=2))
    assert contents(tmp_path / "one") != contents(tmp_path / "other")


def test_missing_captions_and_files_are_named_and_left_out_when_asked(captioned, tmp_path):
    with open(captioned, "a", encoding="utf-8") as file:
        file.write('{"image_path": "img/1.bin"}\n{"image_path": "img/0.bin", "text": "  "}\n')
        file.write('{"image_path": "img/gone.png", "text": "nothing there"}\n')
    text = one_sentence(captioned, tmp_path / "out")
    assert "3 of 7 images cannot be read" in text
    assert "--skip-bad" in text
    manifest = pack(str(captioned), tmp_path / "out", PackOptions(skip_bad=True))[""]
    assert manifest.skipped == ("line 6 (img/1.bin)", "line 7 (img/0.bin)", "line 8 (img/gone.png)")
    assert manifest.count == 4
    bare = tmp_path / "bare.jsonl"
    bare.write_text('{"image_path": "pairs/img/0.bin", "class": 1}\n{"image_path": "pairs/img/1.bin", "class": "0"}\n')
    assert pack(str(bare), tmp_path / "labelled", PackOptions(size=8))[""].members == (".cls", ".png")
    assert open_shards(tmp_path / "labelled").manifest.classes == ["0", "1"]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"image_path": "a.png", "text": "x"', "line 1"),
        (b'["a.png"]', "not a JSON object"),
        (b'{"text": "x"}', '"image_path" must be'),
        (b'{"image_path": 3}', '"image_path" must be'),
        (b'{"image_path": "a.png", "text": "x", "text": "y"}', "a key comes twice"),
        (b'{"image_path": "a.png", "text": 7}', "must be strings"),
        (b'{"image_path": "a.png", "text": ["x", 7]}', "must be strings"),
        (b'{"image_path": "a.png", "text": "\xff"}', "line 1"),
        (b"[" * 100_000, "line 1"),
        (b'{"image_path": "a.png", "text": "\\ud800"}', "surrogates not allowed"),
        (b'{"image_path": "a.png", "class": 1.5}', "must be a number from 0 or a name"),
        (b'{"image_path": "a.png", "class": -1}', "must be a number from 0 or a name"),
        (b'{"image_path": "a.png", "class": true}', "must be a number from 0 or a name"),
        (b'{"image_path": "a.png", "class": 1}\n{"image_path": "a.png", "class": "cat"}', "use one or the other"),
        (b'{"image_path": "a.png", "class": 1}\n{"image_path": "a.png"}', "1 of 2 samples have no class.*line 2"),
        (b"", "no images found"),
    ],
)
def test_bad_lines_get_one_sentence(tmp_path, line, reason):
    path = tmp_path / "x.jsonl"
    path.write_bytes(line)
    text = one_sentence(path, tmp_path / "out")
    assert str(path) in text
    with pytest.raises(UserError, match=reason):
        open_source(str(path))


@settings(max_examples=40, deadline=None)
@given(st.lists(st.text(max_size=12), min_size=1, max_size=4), st.none() | st.text(max_size=6))
def test_a_list_of_captions_gives_its_longest_and_its_shortest(texts, short):
    found = caption_of({"text": texts, "short": short} if short is not None else {"text": texts})
    if not max(texts, key=len).strip():
        assert found is None
        return
    assert found.text in texts
    assert len(found.text) == max(map(len, texts))
    if short is None and found.short is not None:
        assert len(found.short) == min(map(len, texts)) <= len(found.text)
    if short is not None:
        assert found.short == (short if short.strip() else None)
    assert caption_of({"text": found.text}).short is None


@settings(max_examples=80)
@given(
    st.binary(max_size=60)
    | st.dictionaries(
        st.sampled_from(["image_path", "text", "short", "class", "caption"]),
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.lists(st.text(max_size=3)),
        max_size=4,
    ).map(lambda record: json.dumps({"image_path": "a.png"} | record).encode())
)
def test_any_line_is_read_or_refused_with_one_sentence(tmp_path_factory, line):
    path = tmp_path_factory.getbasetemp() / "any.jsonl"
    path.write_bytes(line + b"\n")
    try:
        source = open_source(str(path))
    except UserError:
        return
    for number in range(len(source)):
        source.title(number).encode()
        if source.captioned:
            assert source.caption(number).text.strip()


# --- WebDataset tars


@pytest.fixture
def foreign(tmp_path):
    """Two tars of another tool: classes as numbers, captions in .txt and .json, a mask beside an image."""
    folder = tmp_path / "foreign"
    folder.mkdir()
    a = [("n/0.JPG", encoded(0)), ("n/0.cls", b"1\n"), ("n/0.txt", b"first")]
    a += [("n/1.seg.png", encoded(9, "PNG")), ("n/1.png", encoded(1, "PNG")), ("n/1.cls", b"0"), ("n/1.txt", b"second")]
    b = [("n/0.webp", encoded(2, "WEBP")), ("n/0.cls", b"1"), ("n/0.json", b'{"caption": "third, long", "short": "3"}')]
    (folder / "a.tar").write_bytes(tar_bytes(a))
    (folder / "b.tar").write_bytes(tar_bytes(b))
    return folder


@pytest.mark.parametrize("how", ["", "/*.tar", "/[ab].tar"])
def test_webdataset_tars_are_packed_sample_by_sample(foreign, tmp_path, how):
    pack(f"{foreign}{how}", tmp_path / "out", PackOptions())
    wanted = [
        {".jpg": encoded(0), ".cls": b"1", ".txt": b"first"},
        {".png": encoded(1, "PNG"), ".cls": b"0", ".txt": b"second"},
        {".webp": encoded(2, "WEBP"), ".cls": b"1", ".txt": b"third, long", ".short.txt": b"3"},
    ]
    assert samples(tmp_path / "out") == sorted(wanted, key=lambda parts: sorted(parts.items()))
    # the sabotage: the same set with two labels exchanged is another one
    wanted[0][".cls"], wanted[1][".cls"] = wanted[1][".cls"], wanted[0][".cls"]
    assert samples(tmp_path / "out") != sorted(wanted, key=lambda parts: sorted(parts.items()))


def test_our_own_shards_can_be_packed_again_with_their_class_names(tmp_path, captioned):
    np.savez(
        tmp_path / "x.npz",
        arr_0=np.random.default_rng(0).integers(0, 256, (5, 16, 16, 3)).astype(np.uint8),
        labels=np.arange(5) % 2,
    )
    (tmp_path / "map").write_text("0 tabby cat\n1\tgreat dane\n")
    pack(str(tmp_path / "x.npz"), tmp_path / "first", PackOptions(class_map=tmp_path / "map"))
    assert open_shards(tmp_path / "first").manifest.classes == ["tabby cat", "great dane"]
    pack(str(tmp_path / "first"), tmp_path / "second", PackOptions(size=8))
    assert open_shards(tmp_path / "second").manifest.classes == ["tabby cat", "great dane"]
    pack(str(captioned), tmp_path / "third", PackOptions())
    pack(str(tmp_path / "third"), tmp_path / "fourth", PackOptions())
    assert samples(tmp_path / "third") == samples(tmp_path / "fourth")


def test_bad_tars_get_one_sentence(foreign, tmp_path):
    good = (foreign / "a.tar").read_bytes()

    def refused(data: bytes) -> str:
        (foreign / "a.tar").write_bytes(data)
        return one_sentence(foreign, tmp_path / "out")

    assert "cut short" in refused(good[:1000])
    header = bytearray(good)
    second = 512 + -(-len(encoded(0)) // 512) * 512
    header[second + 20] ^= 1  # the header of the second member: tarfile alone takes that for the end of the archive
    assert "cut short or damaged at byte" in refused(bytes(header))
    assert "cut short or damaged at byte" in refused(good[:second])
    assert "leaves the archive" in refused(tar_bytes([("../x.png", encoded(0, "PNG"))]))
    assert "comes twice" in refused(tar_bytes([("a.png", b"1"), ("b.png", b"2"), ("a.cls", b"0")]))
    assert "has .png twice" in refused(tar_bytes([("a.png", b"1"), ("a.png", b"2")]))
    assert "not UTF-8" in refused(tar_bytes([(b"a.p\xffg", b"1")]))
    assert "have no class, the first is sample 0 of a.tar" in refused(tar_bytes([("a.png", encoded(0, "PNG"))]))
    assert "use one or the other" in refused(tar_bytes([("a.png", encoded(0, "PNG")), ("a.cls", b"cat")]))
    text = refused(tar_bytes([(b"\xe9.png", encoded(0, "PNG")[:40]), (b"\xe9.cls", b"0"), (b"\xe9.txt", b"caf\xe9")]))
    assert "1 of 2 images cannot be read, the first is a.tar: \\xe9" in text
    manifest = pack(str(foreign), tmp_path / "out", PackOptions(skip_bad=True))[""]
    assert len(manifest.skipped) == 1
    (foreign / "b.tar").unlink()
    (foreign / "a.tar").write_bytes(tar_bytes([("a.cls", b"0")]))
    assert "no images in these tars" in one_sentence(foreign, tmp_path / "never")
    (foreign / "sub").mkdir()
    assert "both tar files and folders" in one_sentence(foreign, tmp_path / "never")
    assert "matches no file" in one_sentence(foreign / "*.tgz", tmp_path / "never")


@pytest.fixture(scope="module")
def small_tar(tmp_path_factory):
    path = tmp_path_factory.mktemp("tar") / "x.tar"
    data = tar_bytes([(f"{n}.{end}", b"x" * (300 * n)) for n in range(4) for end in ("png", "cls", "txt")])
    path.write_bytes(data)
    return path, data, scan(path)


@settings(max_examples=150)
@given(data=st.data())
def test_no_damage_to_a_tars_structure_goes_unnoticed(small_tar, data):
    """A flipped bit in a header or a cut anywhere is refused, or it does not change what is found."""
    path, whole, index = small_tar
    starts = (index.spans[:, :, 0].astype(int) - 512).ravel().tolist()
    damaged = bytearray(whole)
    if data.draw(st.booleans(), label="cut"):
        del damaged[data.draw(st.integers(0, len(whole) - 1)) :]
    else:
        damaged[data.draw(st.sampled_from(starts)) + data.draw(st.integers(0, 511))] ^= 1 << data.draw(
            st.integers(0, 7)
        )
    path.write_bytes(damaged)
    try:
        found = scan(path)
    except UserError:
        return
    assert found.members == index.members
    assert np.array_equal(found.spans, index.spans)


def test_the_undamaged_tar_is_found(small_tar):
    """The twin of the test above: it does not pass because everything is refused."""
    path, whole, index = small_tar
    path.write_bytes(whole)
    assert np.array_equal(scan(path).spans, index.spans)
    assert index.spans.shape == (4, 3, 2)


# --- a tar of tars


@pytest.fixture
def imagenet(tmp_path):
    """train.tar holding n02.tar and n01.tar, as ImageNet's training set comes."""
    inner = {
        "n02": [("n02_1.JPEG", encoded(1)), ("notes.txt", b"no image"), ("n02_0.JPEG", encoded(2))],
        "n01": [("n01_9.JPEG", encoded(3))],
    }
    path = tmp_path / "train.tar"
    path.write_bytes(tar_bytes([(f"{name}.tar", tar_bytes(entries)) for name, entries in inner.items()]))
    return path


def test_a_tar_of_class_tars_is_read_without_unpacking(imagenet, tmp_path):
    pack(str(imagenet), tmp_path / "out", PackOptions())
    shards = open_shards(tmp_path / "out")
    assert shards.manifest.classes == ["n01", "n02"]
    wanted = [{".jpg": encoded(n), ".cls": label} for n, label in ((1, b"1"), (2, b"1"), (3, b"0"))]
    assert samples(tmp_path / "out") == sorted(wanted, key=lambda parts: sorted(parts.items()))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "train.tar"]


def test_a_class_map_fixes_order_and_names(imagenet, tmp_path):
    names = tmp_path / "map"
    names.write_text("n02 great white shark\nn01\ttench, Tinca tinca\n")
    pack(str(imagenet), tmp_path / "out", PackOptions(class_map=names))
    shards = open_shards(tmp_path / "out")
    assert shards.manifest.classes == ["great white shark", "tench, Tinca tinca"]
    wanted = [{".jpg": encoded(n), ".cls": label} for n, label in ((1, b"0"), (2, b"0"), (3, b"1"))]
    assert samples(tmp_path / "out") == sorted(wanted, key=lambda parts: sorted(parts.items()))
    names.write_text("n01 tench\nn02 shark\n")
    with pytest.raises(UserError, match="different: class_map, fingerprint"):
        pack(str(imagenet), tmp_path / "out", PackOptions(class_map=names))

    def refused(text: bytes) -> str:
        names.write_bytes(text)
        return one_sentence(imagenet, tmp_path / "other", class_map=names)

    assert "1 classes are not in" in refused(b"n01 tench\n")
    assert "1 classes of" in refused(b"n01 a\nn02 b\nn03 c\n")
    assert "lists 'n01' twice" in refused(b"n01 a\nn01 b\n")
    assert "names no class" in refused(b"\n\n")
    assert "cannot be read as UTF-8" in refused(b"\xff")


def test_a_damaged_tar_of_tars_is_refused(imagenet, tmp_path):
    good = imagenet.read_bytes()

    def refused(data: bytes) -> str:
        imagenet.write_bytes(data)
        return one_sentence(imagenet, tmp_path / "out")

    assert "cut short inside 'n02.tar'" in refused(good[:2000])
    damaged = bytearray(good)
    damaged[1024 - 500] ^= 1  # the first header of the first inner tar
    assert "damaged at byte 512" in refused(bytes(damaged))
    ended = tar_bytes([("n01.tar", tar_bytes([("x.JPEG", encoded(0))])[:-10240])])
    assert "cut short or damaged at byte" in refused(ended)
    assert "holds the class 'n01' twice" in refused(tar_bytes([("a/n01.tar", b""), ("b/n01.tar", b"")]))
    assert "no images in the tar of this class" in refused(tar_bytes([("n01.tar", tar_bytes([("x.txt", b"")]))]))
    inner = tar_bytes([("/etc/x.JPEG", encoded(0))])
    assert "leaves the archive" in refused(tar_bytes([("n01.tar", inner)]))


# --- what becomes of the pictures


@pytest.fixture
def mixed(tmp_path):
    """One class, every format that is kept, a bitmap, a transparent picture and small ones."""
    folder = tmp_path / "photos" / "thing"
    folder.mkdir(parents=True)
    for n, kind in enumerate(("JPEG", "PNG", "WEBP", "BMP")):
        (folder / f"{n}.{kind.lower()}").write_bytes(encoded(n, kind))
    (folder / "wrong.png").write_bytes(encoded(7, "JPEG"))  # a JPEG by another name
    clear = Image.new("RGBA", (24, 20), (200, 0, 0, 0))
    clear.paste((0, 0, 255, 255), (0, 0, 12, 20))
    clear.save(folder / "clear.png")
    (folder / "low.png").write_bytes(encoded(8, "PNG", (40, 9)))
    return folder.parent


def test_files_are_kept_where_every_reader_sees_the_same_pixels(mixed, tmp_path):
    pack(str(mixed), tmp_path / "out", PackOptions())
    found = [
        {member: data for member, data in parts.items() if member != ".cls"} for parts in samples(tmp_path / "out")
    ]
    for member, kept in ((".jpg", encoded(0)), (".png", encoded(1, "PNG")), (".webp", encoded(2, "WEBP"))):
        assert {member: kept} in found
    assert {".jpg": encoded(7)} in found
    pixels = [np.asarray(decode(data)) for parts in found for data in parts.values()]
    assert any(np.array_equal(image, np.asarray(decode(encoded(3, "BMP")))) for image in pixels)
    clear = np.full((20, 24, 3), 255)
    clear[:, :12] = (0, 0, 255)
    assert any(np.array_equal(image, clear) for image in pixels)  # white where it was transparent
    assert len(found) == 7


@pytest.mark.parametrize(("kind", "member"), [("jpeg", ".jpg"), ("webp", ".webp"), ("png", ".png")])
def test_everything_can_be_encoded_alike(mixed, tmp_path, kind, member):
    out = {}
    for quality in (95, 20):
        manifest = pack(str(mixed), tmp_path / f"{quality}", PackOptions(size=16, format=kind, quality=quality))[""]
        assert manifest.members == (".cls", member)
        out[quality] = sum(len(parts[member]) for parts in samples(tmp_path / f"{quality}"))
    assert out[20] == out[95] if kind == "png" else out[20] < out[95]
    again = pack(str(mixed), tmp_path / "again", PackOptions(size=16, format=kind, jobs=2, samples_per_shard=2))[""]
    once = pack(str(mixed), tmp_path / "once", PackOptions(size=16, format=kind, jobs=1, samples_per_shard=2))[""]
    assert again == once


def test_small_images_are_left_out_and_listed_apart_from_unreadable_ones(mixed, tmp_path):
    (mixed / "thing" / "torn.png").write_bytes(encoded(1, "PNG")[:60])
    options = PackOptions(min_side=10, skip_bad=True)
    manifest = pack(str(mixed), tmp_path / "out", options)[""]
    assert manifest.too_small == ("thing/low.png",)
    assert manifest.skipped == ("thing/torn.png",)
    assert manifest.count == 6
    assert open_shards(tmp_path / "out").manifest == manifest
    assert pack(str(mixed), tmp_path / "all", PackOptions(min_side=9, skip_bad=True))[""].too_small == ()
    (mixed / "thing" / "torn.png").unlink()
    assert "all 7 images are smaller than --min-side 21" in one_sentence(mixed, tmp_path / "none", min_side=21)


def bomb(width: int, height: int) -> bytes:
    """A PNG of a few hundred bytes that claims to be huge."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"\0" * 100)) + chunk(b"IEND", b"")
    )


def test_a_decompression_bomb_is_named_before_it_is_unpacked(mixed, tmp_path):
    (mixed / "thing" / "bomb.png").write_bytes(bomb(40_000, 40_000))
    assert "thing/bomb.png" in one_sentence(mixed, tmp_path / "out")
    (mixed / "thing" / "bomb.png").unlink()
    text = one_sentence(mixed, tmp_path / "out", most_pixels=400)
    assert "6 of 7 images cannot be read" in text
    assert "24 x 20 pixels, more than the limit of 400" in text
    assert pack(str(mixed), tmp_path / "out", PackOptions(most_pixels=480))[""].count == 7


def test_an_npz_larger_than_the_memory_is_refused_before_it_is_unpacked(tmp_path, monkeypatch):
    np.savez_compressed(tmp_path / "x.npz", arr_0=np.zeros((50, 64, 64, 3), np.uint8))
    assert (tmp_path / "x.npz").stat().st_size < 10_000
    small = {"SC_PAGE_SIZE": 4096, "SC_PHYS_PAGES": 100}
    monkeypatch.setattr(os, "sysconf", lambda name: small[name])
    assert "unpacks to 0.0 GB, more than this machine's" in one_sentence(tmp_path / "x.npz", tmp_path / "out")
    small["SC_PHYS_PAGES"] = 10_000
    assert pack(str(tmp_path / "x.npz"), tmp_path / "out", PackOptions())[""].count == 50


def test_names_that_are_not_utf8(mixed, tmp_path):
    os.rename(mixed / "thing" / "low.png", os.fsencode(mixed) + b"/thing/l\xf6w.png")
    manifest = pack(str(mixed), tmp_path / "out", PackOptions(min_side=10))[""]
    assert manifest.too_small == ("thing/l\\xf6w.png",)
    assert json.loads((tmp_path / "out" / "manifest.json").read_text(encoding="utf-8"))["count"] == 6
    os.rename(mixed / "thing", os.fsencode(mixed) + b"/th\xefng")
    assert "the class name 'th\\\\xefng' is not UTF-8" in one_sentence(mixed, tmp_path / "other")


def test_a_packing_process_that_is_killed_is_said_and_the_next_run_goes_on(mixed, tmp_path, monkeypatch):
    options = PackOptions(samples_per_shard=2, jobs=2)
    victim, stored = os.getpid(), ImageRecipe.stored

    def killed_at_the_jpeg(recipe, picture):
        if picture == encoded(7) and os.getpid() != victim:
            os.kill(os.getpid(), signal.SIGKILL)
        return stored(recipe, picture)

    monkeypatch.setattr(ImageRecipe, "stored", killed_at_the_jpeg)
    assert "packing processes was killed" in one_sentence(mixed, tmp_path / "out", samples_per_shard=2, jobs=2)
    monkeypatch.undo()
    pack(str(mixed), tmp_path / "out", options)
    pack(str(mixed), tmp_path / "whole", options)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_classes_without_images_are_said(tmp_path, capsys):
    np.savez(tmp_path / "x.npz", arr_0=np.zeros((2, 8, 8, 3), np.uint8), labels=np.array([0, 3]))
    pack(str(tmp_path / "x.npz"), tmp_path / "out", PackOptions())
    assert "2 of 4 classes have no images, the first is '1'" in capsys.readouterr().out


# --- the library reads the same


@pytest.mark.parametrize("options", [{}, {"size": 16}, {"size": 16, "format": "jpeg"}, {"format": "webp"}])
@pytest.mark.parametrize("name", ["captioned", "foreign", "imagenet", "mixed"])
def test_plain_webdataset_streams_the_same_samples(request, tmp_path, name, options):
    pack(str(request.getfixturevalue(name)), tmp_path / "out", PackOptions(**options, samples_per_shard=2))
    shards = open_shards(tmp_path / "out")
    last = len(shards.manifest.shards) - 1
    url = str(tmp_path / "out" / f"shard-{{000000..{last:06d}}}.tar")
    pictures = [np.asarray(decode(shards.image_bytes(n))) for n in range(len(shards))]
    for form in ("rgb8", "pil"):
        stream = list(webdataset.WebDataset(url, shardshuffle=False).decode(form))
        assert len(stream) == len(shards)
        for n, sample in enumerate(stream):
            (image,) = (sample[part] for part in ("jpg", "png", "webp") if part in sample)
            assert np.array_equal(np.asarray(image), pictures[n])
            parts = shards.parts(n)
            assert set(sample) - {"__key__", "__url__", "__local_path__"} == {part[1:] for part in parts}
            for text in {".txt", ".short.txt"} & {*parts}:
                assert sample[text[1:]] == shards.read(n, text).decode()
            if ".cls" in parts:
                assert sample["cls"] == shards.labels([n])[0]
    if len(pictures) > 1:
        assert not np.array_equal(pictures[0], pictures[-1])  # so that a shifted stream would be noticed
    if "size" in options:
        assert np.array_equal(load_images(shards, range(len(shards)), 16), np.stack(pictures))


def test_the_command_takes_all_options(foreign, tmp_path, capsys):
    names = tmp_path / "names"
    names.write_text("0 cat\n1 dog\n")
    more = ["--class-map", str(names), "--format", "jpeg", "--quality", "80", "--min-side", "8", "--max-pixels", "9999"]
    main(["pack", str(foreign), "--out", str(tmp_path / "out"), "--size", "16", "--jobs", "1", *more])
    assert "3 images in 1 shards, 2 classes, with captions" in capsys.readouterr().out
    for wrong in (["--quality", "0"], ["--max-pixels", "0"], ["--max-pixels", "999999999"], ["--min-side", "-1"]):
        with pytest.raises(UserError, match=wrong[0]):
            main(["pack", str(foreign), "--out", str(tmp_path / "out"), *wrong])
