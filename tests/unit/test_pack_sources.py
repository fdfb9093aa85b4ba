"""llamagen pack: captions, WebDataset tars, a tar of tars, class maps, limits; the same samples as the files hold."""

import json
import tarfile

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llamagen_dist.data.formats import open_source
from llamagen_dist.data.index import scan
from llamagen_dist.data.pack import PackOptions, pack
from llamagen_dist.data.shards import open_shards
from llamagen_dist.data.source import caption_of
from llamagen_dist.errors import UserError
from tests.unit.picture_sources import contents, encoded, one_sentence, samples, tar_bytes

# --- jsonl


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


def test_one_picture_does_not_get_into_both_parts(captioned, tmp_path):
    pack(str(captioned), tmp_path / "fine", PackOptions(held_out=1))
    assert "holds folders of shards (train, validation)" in one_sentence(tmp_path / "fine", tmp_path / "out")
    with open(captioned, "a", encoding="utf-8") as file:
        file.write('{"image_path": "img/0.bin", "text": "another caption"}\n')
    assert "1 lines name a picture that an earlier line names" in one_sentence(captioned, tmp_path / "out", held_out=1)
    assert pack(str(captioned), tmp_path / "out", PackOptions())[""].count == 5


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
    for number in range(source.count):
        source.title(number).encode()
        if source.caption is not None:
            assert source.caption(number).text.strip()


# --- WebDataset tars


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


@pytest.mark.parametrize("padding", [0, 10240])
def test_tars_one_after_another_in_one_file_give_all_their_samples(tmp_path, padding):
    """``cat a.tar b.tar c.tar``: the empty blocks that close a tar are no end of the file."""
    wanted = [{".png": encoded(n, "PNG"), ".cls": b"%d" % (n % 2), ".txt": b"caption %d" % n} for n in range(6)]
    tars = []
    for first in (0, 2, 4):
        members = [(f"{n}{part}", wanted[n][part]) for n in (first, first + 1) for part in wanted[n]]
        tars.append(tar_bytes(members) + b"\0" * padding)
    (tmp_path / "joined.tar").write_bytes(b"".join(tars))
    pack(str(tmp_path / "joined.tar"), tmp_path / "out", PackOptions())
    assert samples(tmp_path / "out") == sorted(wanted, key=lambda parts: sorted(parts.items()))
    # the twin: Python's tarfile stops after the first of them, so a reader that trusts it loses four samples silently
    with tarfile.open(tmp_path / "joined.tar") as tar:
        assert {name.split(".")[0] for name in tar.getnames()} == {"0", "1"}
    # and a damaged header in the last of them is not taken for the end
    damaged = bytearray(b"".join(tars))
    damaged[len(tars[0]) + len(tars[1])] ^= 1
    (tmp_path / "joined.tar").write_bytes(damaged)
    assert "stands something that is no other tar" in one_sentence(tmp_path / "joined.tar", tmp_path / "never")


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
    with pytest.raises(UserError, match=r"fingerprint: .*; class_map: "):
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
