"""llamagen pack on the folders, pictures and files that people have: nothing is lost or guessed without a word."""

import io
import itertools
import json
import os
import struct
import zipfile
import zlib

import numpy as np
import pytest
from PIL import Image

from llamagen_dist.cli import main
from llamagen_dist.data.decode import (
    AS_BYTES,
    AS_LONGS,
    AS_WORDS,
    FLOATS,
    FRAMES,
    TURNED,
    UPPER_BITS,
    WHITE,
    decode,
    decode_and_tell,
)
from llamagen_dist.data.formats import count, open_source
from llamagen_dist.data.images import ImageStream, load_images
from llamagen_dist.data.manifest import read_manifest
from llamagen_dist.data.pack import PackOptions, pack
from llamagen_dist.data.shards import open_shards
from llamagen_dist.errors import UserError
from llamagen_dist.parallel.topology import Topology
from tests.unit.picture_sources import encoded, one_sentence, samples, tar_bytes

APPLE = b"\0\5\x16\7" + b"\0" * 60  # how an AppleDouble file begins


def write(path, data: bytes = b""):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data or encoded(sum(path.name.encode()), "PNG"))
    return path


def packed(source, out, capsys=None, **options):
    """(labels by picture, manifest, what was printed)."""
    manifest = pack(str(source), out, PackOptions(**options))[""]
    shards = open_shards(out)
    labels = shards.labels(range(len(shards))) if manifest.classes else [None] * len(shards)
    by_picture = {shards.image_bytes(n): label for n, label in enumerate(labels)}
    assert read_manifest(out).noticed == manifest.noticed
    return by_picture, manifest, capsys.readouterr().out if capsys else ""


# --- lost without a word


def test_linked_folders_are_read_once_and_cycles_end(tmp_path, capsys):
    elsewhere = write(tmp_path / "disk" / "more" / "2.png").parent
    root = write(tmp_path / "photos" / "ant" / "1.png").parent.parent
    bee = write(root / "bee" / "3.png")
    (root / "ant" / "linked").symlink_to(elsewhere)
    (root / "ant" / "again").symlink_to(elsewhere)
    (root / "ant" / "up").symlink_to(root)
    (elsewhere / "round").symlink_to(elsewhere)
    (root / "wasp").symlink_to(write(tmp_path / "disk" / "wasp" / "4.png").parent)
    labels, manifest, printed = packed(root, tmp_path / "out", capsys)
    assert manifest.classes == ["ant", "bee", "wasp"]
    wanted = {(root / "ant" / "1.png"): 0, elsewhere / "2.png": 0, bee: 1, root / "wasp" / "4.png": 2}
    assert labels == {path.read_bytes(): label for path, label in wanted.items()}
    assert "3 linked folders passed over" in printed
    assert "ant/" in printed
    assert any("3 linked folders passed over" in note for note in manifest.noticed["source"])
    without = packed(tmp_path / "disk" / "more" / "..", tmp_path / "plain", capsys)[2]
    assert without.count("linked folders") == 1, "the twin: one link to itself, and no other"


def test_what_lies_beside_the_pictures_is_counted_and_not_taken_for_pictures(tmp_path, capsys):
    root = tmp_path / "photos"
    for number in range(40):
        write(root / "ab"[number % 2] / f"{number}.png")
        write(root / "ab"[number % 2] / f"{number}.txt", b"a caption")
        write(root / "ab"[number % 2] / f"{number}.wav", b"a sound")
        write(root / "ab"[number % 2] / f"._{number}.png", APPLE)
        write(root / "ab"[number % 2] / ".thumbs" / f"{number}.png")
    write(root / "labels.csv", b"a,b")
    write(root / ".DS_Store", APPLE)
    assert count(str(root)) == 40
    _, manifest, printed = packed(root, tmp_path / "out", capsys)
    assert manifest.count == 40
    for sentence in (
        "40 files that are no images (.txt) passed over, the first is a/",
        "40 files that are no images (.wav) passed over",
        "1 files that are no images (.csv) passed over, the first is labels.csv",
        "43 hidden files and folders (such as the ._ files of AppleDouble) passed over",
    ):
        assert sentence in printed
        assert any(sentence in note for note in manifest.noticed["source"])
    main(["shards", "stats", str(tmp_path / "out")])
    assert "40 files that are no images (.txt) passed over" in capsys.readouterr().out


def test_a_folder_without_anything_special_has_nothing_to_say(tmp_path, capsys):
    write(tmp_path / "photos" / "ant" / "1.png")
    _, manifest, printed = packed(tmp_path / "photos", tmp_path / "out", capsys)
    assert manifest.noticed == {}
    assert "photos:" not in printed


def test_unknown_keys_are_named_and_others_can_be_chosen(tmp_path, capsys):
    for n in range(3):
        write(tmp_path / f"{n}.png", encoded(n, "PNG"))
    lines = [{"image_path": f"{n}.png", "prompt": f"thing {n}", "captions": ["a", "bb"], "label": n} for n in range(3)]
    path = tmp_path / "x.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)))
    _, manifest, printed = packed(path, tmp_path / "bare", capsys)
    sentence = "keys that are not read: 'captions' (3 lines), 'label' (3 lines), 'prompt' (3 lines); --caption-key"
    assert sentence in printed
    assert sentence in manifest.noticed["source"][0]
    assert manifest.members == (".jpg", ".png", ".webp")
    labels, manifest, printed = packed(path, tmp_path / "out", capsys, caption_key="prompt", class_key="label")
    assert labels == {encoded(n, "PNG"): n for n in range(3)}
    assert {parts[".txt"] for parts in samples(tmp_path / "out")} == {b"thing 0", b"thing 1", b"thing 2"}
    assert "keys that are not read: 'captions' (3 lines)" in printed
    packed(path, tmp_path / "list", caption_key="captions")
    assert {(parts[".txt"], parts[".short.txt"]) for parts in samples(tmp_path / "list")} == {(b"bb", b"a")}
    with pytest.raises(UserError, match="caption_key: null -> "):
        pack(str(path), tmp_path / "bare", PackOptions(caption_key="prompt"))
    assert "--caption-key title: no line of" in one_sentence(path, tmp_path / "no", caption_key="title")
    assert "--class-key klass: no line of" in one_sentence(path, tmp_path / "no", class_key="klass")
    path.write_text('{"file_name": "0.png"}')
    assert "its keys are 'file_name'" in one_sentence(path, tmp_path / "no")
    path.write_text('{"image_path": "0.png", "text": "taken", "caption": "lost"}')
    assert "keys that are not read: 'caption' (1 lines)" in packed(path, tmp_path / "both", capsys)[2]
    assert "--class-key: " in one_sentence("builtin:fashion-mnist", tmp_path / "no", class_key="label")


def test_the_parts_of_webdataset_samples_that_are_not_read_are_named(tmp_path, capsys):
    entries = [("._0.png", APPLE), ("README", b"no ending")]
    for n in range(3):
        about = json.dumps({"prompt": f"thing {n}", "label": n, "width": 24}).encode()
        entries += [(f"{n}.png", encoded(n, "PNG")), (f"{n}.seg.png", b"mask"), (f"{n}.json", about)]
    entries.insert(-1, ("2.jpg", encoded(2)))
    folder = tmp_path / "tars"
    write(folder / "a.tar", tar_bytes(entries))
    write(folder / "._a.tar", APPLE)
    _, manifest, printed = packed(folder, tmp_path / "bare", capsys)
    for sentence in (
        "3 members .seg.png not read",
        "2 files that are no part of a sample (hidden, or without an ending) passed over, the first is ._0.png",
        ".json members whose keys 'label', 'prompt', 'width' are not read (--caption-key chooses)",
        "1 samples with several images, of which only one is read (in the order .png, .jpg), the first is sample 2",
        "1 hidden files and folders (such as the ._ files of AppleDouble) passed over, the first is ._a.tar",
    ):
        assert sentence in printed
        assert any(sentence in note for note in manifest.noticed["source"])
    assert count(str(folder)) == 3
    labels, _, printed = packed(folder, tmp_path / "out", capsys, caption_key="prompt", class_key="label")
    assert sorted(labels.values()) == [0, 1, 2]
    assert {parts[".txt"] for parts in samples(tmp_path / "out")} == {b"thing 0", b"thing 1", b"thing 2"}
    assert "keys 'width' are not read" in printed
    labelled = packed(folder, tmp_path / "labelled", class_key="label")[1]
    assert (labelled.classes, ".txt" in labelled.members) == (["0", "1", "2"], False)
    assert "no .json of" in one_sentence(folder, tmp_path / "no", caption_key="title")
    assert "no .json of" in one_sentence(folder, tmp_path / "no", class_key="title")


def test_appledouble_files_in_a_tar_of_class_tars_are_passed_over_and_counted(tmp_path, capsys):
    inner = tar_bytes([("._x.JPEG", APPLE), ("x.JPEG", encoded(0)), ("notes.txt", b"")])
    path = write(tmp_path / "train.tar", tar_bytes([("._n01.tar", APPLE), ("n01.tar", inner), ("n02.tar", inner)]))
    _, manifest, printed = packed(path, tmp_path / "out", capsys)
    assert manifest.classes == ["n01", "n02"]
    assert manifest.count == 2
    assert "2 hidden files (such as AppleDouble's ._ files) passed over, the first is n01.tar: ._x.JPEG" in printed
    assert "2 files that are no images passed over, the first is n01.tar: notes.txt" in printed
    assert "1 files that are no tars of a class passed over, the first is ._n01.tar" in printed
    assert len(manifest.noticed["source"]) == 3


def test_one_class_of_many_folders_is_said(tmp_path, capsys):
    for name in ("ant", "bee"):
        write(tmp_path / "photos" / "all" / name / f"{name}.png")
    _, manifest, printed = packed(tmp_path / "photos", tmp_path / "out", capsys)
    assert manifest.classes == ["all"]
    assert "one class, 'all', whose images lie in 2 folders; if these are the classes, pack" in printed
    assert packed(tmp_path / "photos" / "all", tmp_path / "named", capsys)[1].noticed == {}


def test_a_marked_utf8_file_is_read(tmp_path):
    write(tmp_path / "a.png")
    (tmp_path / "x.jsonl").write_text('{"image_path": "a.png", "text": "x"}\n', encoding="utf-8-sig")
    assert packed(tmp_path / "x.jsonl", tmp_path / "out")[1].count == 1


# --- wrong pixels

UPRIGHT = np.arange(4 * 6 * 3, dtype=np.uint8).reshape(4, 6, 3) * 3


def turned(orientation: int, kind: str = "PNG") -> bytes:
    """UPRIGHT, stored as a camera would that notes ``orientation`` (EXIF 2.3, tag 0x0112)."""
    stored = {
        1: UPRIGHT,
        2: UPRIGHT[:, ::-1],
        3: UPRIGHT[::-1, ::-1],
        4: UPRIGHT[::-1],
        5: UPRIGHT.transpose(1, 0, 2),
        6: UPRIGHT.transpose(1, 0, 2)[::-1],
        7: UPRIGHT[::-1, ::-1].transpose(1, 0, 2),
        8: UPRIGHT.transpose(1, 0, 2)[:, ::-1],
    }[orientation]
    image = Image.fromarray(np.ascontiguousarray(stored))
    exif = Image.Exif()
    exif[0x0112] = orientation
    file = io.BytesIO()
    image.save(
        file, kind, exif=exif, **{"JPEG": {"quality": 100, "subsampling": 0}, "WEBP": {"lossless": True}}.get(kind, {})
    )
    return file.getvalue()


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_orientation_becomes_upright(orientation, kind):
    image, done = decode_and_tell(turned(orientation, kind))
    pixels = np.asarray(image)
    assert done == ([] if orientation == 1 else [TURNED])
    assert pixels.shape == UPRIGHT.shape
    assert np.abs(pixels.astype(int) - UPRIGHT).max() <= (12 if kind == "JPEG" else 0)


def test_turned_pictures_are_packed_upright_resized_or_kept_and_said(tmp_path, capsys):
    root = tmp_path / "photos"
    for orientation in range(1, 9):
        write(root / "class" / f"{orientation}.jpg", turned(orientation, "JPEG"))
    for name, options in (("kept", {}), ("resized", {"size": 4}), ("webp", {"format": "webp"})):
        out = tmp_path / name
        main(["pack", str(root), "--out", str(out), *(f"--{k}={v}" for k, v in options.items()), "--jobs", "1"])
        assert f"{out}: 7 images {TURNED}" in capsys.readouterr().out
        assert read_manifest(out).noticed["changed"] == {TURNED: 7}
        for parts in samples(out):
            picture = next(data for part, data in parts.items() if part != ".cls")
            with Image.open(io.BytesIO(picture)) as plain:  # a reader that knows nothing of EXIF sees the same
                assert np.array_equal(np.asarray(plain.convert("RGB")), np.asarray(decode(picture)))
                assert plain.width >= plain.height
                assert 0x0112 not in plain.getexif() or plain.getexif()[0x0112] == 1
    kept = [parts for parts in samples(tmp_path / "kept") if ".jpg" in parts]
    assert [parts[".jpg"] for parts in kept] == [turned(1, "JPEG")]


def test_readers_turn_pictures_that_others_packed(tmp_path):
    """The shards of another tool: the training's reader and the evaluation's decode as packing does."""
    from llamagen_dist.data.foreign import index_folder

    write(tmp_path / "a.tar", tar_bytes([("0.png", turned(6)), ("1.png", turned(1))]))
    index_folder(tmp_path)
    pixels = load_images(open_shards(tmp_path), [0, 1], 4)
    assert np.array_equal(pixels[0], pixels[1])


def test_broken_exif_data_are_no_reason_to_refuse_a_picture():
    image, file = Image.fromarray(UPRIGHT), io.BytesIO()
    image.save(file, "PNG", exif=b"Exif\0\0II*\0\xff\xff\xff\xff")
    assert np.array_equal(np.asarray(decode(file.getvalue())), UPRIGHT)


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def deep_png(values: np.ndarray, colour: int, transparent: tuple[int, ...] = ()) -> bytes:
    """A 16-bit PNG; colour: 0 grey, 2 RGB, 4 grey and alpha, 6 RGBA."""
    head = struct.pack(">IIBBBBB", values.shape[1], values.shape[0], 16, colour, 0, 0, 0)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    key = chunk(b"tRNS", struct.pack(f">{len(transparent)}H", *transparent)) if transparent else b""
    body = chunk(b"IHDR", head) + key + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


def saved(image: Image.Image, kind: str = "TIFF", **more) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **more)
    return file.getvalue()


DEEP = np.array([[0, 255, 256, 511], [30000, 32768, 65279, 65535]], np.uint16)
UPPER = (DEEP >> 8).astype(np.uint8)
GREY = np.array([[0, 1, 127, 128], [200, 254, 255, 3]], np.uint8)
DEEP_PICTURES = {
    "grey png": (deep_png(DEEP, 0), UPPER, [UPPER_BITS]),
    "rgb png": (deep_png(np.stack([DEEP] * 3, -1), 2), UPPER, [UPPER_BITS]),
    "grey and alpha png": (deep_png(np.stack([DEEP, DEEP * 0 + 65535], -1), 4), UPPER, [UPPER_BITS, WHITE]),
    "rgba png": (deep_png(np.stack([DEEP] * 3 + [DEEP * 0 + 65535], -1), 6), UPPER, [UPPER_BITS, WHITE]),
    "grey png, a value transparent": (
        deep_png(DEEP, 0, (30000,)),
        np.where(DEEP == 30000, 255, UPPER),
        [UPPER_BITS, WHITE],
    ),
    "16-bit tiff": (saved(Image.fromarray(DEEP)), UPPER, [UPPER_BITS]),
    "16-bit tiff, big-endian": (saved(Image.fromarray(DEEP.astype(">u2"))), UPPER, [UPPER_BITS]),
    "16-bit tiff, 0 is white": (saved(Image.fromarray(DEEP), tiffinfo={262: 0}), 255 - UPPER, [UPPER_BITS]),
    "jpeg 2000": (saved(Image.fromarray(DEEP), "JPEG2000", irreversible=False), UPPER, [UPPER_BITS]),
    "pgm": (b"P5 4 2 65535\n" + DEEP.astype(">u2").tobytes(), UPPER, [UPPER_BITS]),
    "floats to 1": (saved(Image.fromarray(GREY.astype(np.float32) / 255)), GREY, [FLOATS]),
    "floats to 255": (saved(Image.fromarray(GREY.astype(np.float32))), GREY, [AS_BYTES]),
    "floats to 65535": (saved(Image.fromarray(DEEP.astype(np.float32))), UPPER, [AS_WORDS]),
    "32-bit to 255": (saved(Image.fromarray(GREY.astype(np.int32))), GREY, [AS_BYTES]),
    "32-bit to 65535": (saved(Image.fromarray(DEEP.astype(np.int32))), UPPER, [AS_WORDS]),
    "32-bit": (saved(Image.fromarray(DEEP.astype(np.int32) * 30000)), DEEP.astype(np.uint64) * 30000 >> 24, [AS_LONGS]),
}


@pytest.mark.parametrize("name", DEEP_PICTURES)
def test_more_than_8_bits_become_8_by_the_stated_rule(name):
    data, wanted, rules = DEEP_PICTURES[name]
    image, done = decode_and_tell(data)
    assert np.array_equal(np.asarray(image), np.repeat(wanted.astype(np.uint8)[..., None], 3, 2))
    assert done == rules


def test_deep_pictures_are_packed_resized_or_kept_and_said(tmp_path, capsys):
    root = tmp_path / "photos"
    pictures = {name: entry for name, entry in DEEP_PICTURES.items() if "pgm" not in name and "2000" not in name}
    for number, (name, (data, _, _)) in enumerate(pictures.items()):
        write(root / "class" / f"{number:02}.{'png' if 'png' in name else 'tif'}", data)
    _, manifest, _ = packed(root, tmp_path / "kept")
    rules = list(itertools.chain.from_iterable(done for _, _, done in pictures.values()))
    assert manifest.noticed["changed"] == {rule: rules.count(rule) for rule in sorted({*rules})}
    shards = open_shards(tmp_path / "kept")
    seen = sorted(np.asarray(decode(shards.image_bytes(n))).tobytes() for n in range(len(shards)))
    assert seen == sorted(np.repeat(np.uint8(grey)[..., None], 3, 2).tobytes() for _, grey, _ in pictures.values())
    assert all(".png" in shards.parts(n) for n in range(len(shards)))
    main(["pack", str(root), "--out", str(tmp_path / "resized"), "--size", "2", "--jobs", "1"])
    assert f"{rules.count(UPPER_BITS)} images {UPPER_BITS}" in capsys.readouterr().out


@pytest.mark.parametrize(
    "values",
    [[[0.0, np.nan]], [[0.0, np.inf]], [[-0.5, 0.5]], [[0.0, 1.4]], [[0.0, 300.0]], [[0.0, 1e6]]],
)
def test_values_that_no_rule_covers_are_named_and_not_guessed(tmp_path, values):
    write(tmp_path / "photos" / "class" / "x.tif", saved(Image.fromarray(np.array(values, np.float32))))
    write(tmp_path / "photos" / "class" / "y.png")
    assert "1 of 2 images cannot be read, the first is class/x.tif" in one_sentence(
        tmp_path / "photos", tmp_path / "out"
    )
    assert packed(tmp_path / "photos", tmp_path / "out", skip_bad=True)[1].skipped == ("class/x.tif",)


def test_ordinary_modes_are_as_they_were():
    """What PIL converts rightly is left to it; what is laid on white or cut to one picture is said."""
    rgb = Image.fromarray(np.random.default_rng(0).integers(0, 256, (8, 8, 3)).astype(np.uint8))
    for mode, kind in (("L", "PNG"), ("P", "PNG"), ("1", "PNG"), ("CMYK", "JPEG"), ("YCbCr", "JPEG"), ("RGB", "BMP")):
        data = saved(rgb.convert(mode), kind)
        image, done = decode_and_tell(data)
        with Image.open(io.BytesIO(data)) as plain:
            assert np.array_equal(np.asarray(image), np.asarray(plain.convert("RGB"))), mode
        assert done == []
    for mode in ("LA", "RGBA"):
        assert decode_and_tell(saved(rgb.convert(mode), "PNG"))[1] == [WHITE]
    for kind in ("GIF", "TIFF", "WEBP"):
        frames = [rgb, rgb.transpose(Image.Transpose.ROTATE_90)]
        data = saved(frames[0], kind, save_all=True, append_images=frames[1:])
        image, done = decode_and_tell(data)
        assert done == [FRAMES]
        with Image.open(io.BytesIO(data)) as plain:
            assert np.array_equal(np.asarray(image), np.asarray(plain.convert("RGB"))), kind


@pytest.mark.parametrize("size", [(1, 4000), (4000, 1), (3, 12000)])
def test_a_strip_that_would_become_huge_is_one_sentence(tmp_path, size):
    write(tmp_path / "photos" / "class" / "strip.png", encoded(0, "PNG", size))
    write(tmp_path / "photos" / "class" / "fine.png")
    text = one_sentence(tmp_path / "photos", tmp_path / "out", size=256)
    assert "1 of 2 images cannot be read, the first is class/strip.png" in text
    assert "more than the limit of 89,478,485 pixels" in text
    assert packed(tmp_path / "photos", tmp_path / "out", size=256, skip_bad=True)[1].count == 1
    pack(str(tmp_path / "photos"), tmp_path / "kept", PackOptions())
    with pytest.raises(UserError, match=r"sample \d: .* would become .* more than the limit"):
        load_images(open_shards(tmp_path / "kept"), [0, 1], 256)
    for cut in (True, False):
        with pytest.raises(UserError, match=r"sample \d: .* would become .* more than the limit"):
            ImageStream(open_shards(tmp_path / "kept"), Topology(), 2, 0, 256, random_crop=cut).batch(0)
    assert packed(tmp_path / "photos", tmp_path / "small", size=4)[1].count == 2


# --- wrong classes


def test_folders_named_by_numbers_are_sorted_as_numbers_and_said(tmp_path, capsys):
    root = tmp_path / "photos"
    paths = {number: write(root / f"{number}" / f"{number}.png", encoded(number, "PNG")) for number in range(12)}
    labels, manifest, printed = packed(root, tmp_path / "out", capsys)
    assert labels == {path.read_bytes(): number for number, path in paths.items()}
    assert manifest.classes == [str(number) for number in range(12)]
    sentence = "class names are numbers and sorted as such: label 11 is '11'"
    assert printed.count(sentence) == 1
    assert any(sentence in note for note in manifest.noticed["source"])
    assert manifest.source["class_order"] == "numeric", "shards whose label 2 is folder 10 are not taken for the same"
    for name in ("0", "10", "11"):
        (root / name).rename(root / f"x{name}")
    labels, manifest, printed = packed(root, tmp_path / "mixed", capsys)
    assert manifest.classes == [*map(str, range(1, 10)), "x0", "x10", "x11"]
    assert "some class names are numbers and some are not; they are sorted as text: label 0 is '1'" in printed
    (root / "01").mkdir()
    for name in ("x0", "x10", "x11"):
        (root / name).rename(root / name.replace("x", "9"))
    assert "two class folders are called 1" in one_sentence(root, tmp_path / "no")


def test_numbers_that_do_not_begin_at_0_are_said_and_names_with_numbers_too(tmp_path, capsys):
    for name in ("1", "2"):
        write(tmp_path / "photos" / name / "x.png")
    assert "label 0 is '1'" in packed(tmp_path / "photos", tmp_path / "out", capsys)[2]
    for name in ("bird2", "bird10"):
        write(tmp_path / "birds" / name / "x.png")
    assert (
        "sorted as text: label 0 is 'bird10', label 1 is 'bird2'"
        in packed(tmp_path / "birds", tmp_path / "b", capsys)[2]
    )
    for name in ("0", "1"):
        write(tmp_path / "plain" / name / "x.png")
    assert packed(tmp_path / "plain", tmp_path / "p")[1].noticed == {}


def test_the_tars_of_classes_named_by_numbers_are_sorted_as_numbers_too(tmp_path):
    inner = {n: tar_bytes([("x.JPEG", encoded(n))]) for n in (0, 2, 10)}
    path = write(tmp_path / "all.tar", tar_bytes([(f"{n}.tar", data) for n, data in inner.items()]))
    labels, manifest, _ = packed(path, tmp_path / "out")
    assert manifest.classes == ["0", "2", "10"]
    assert labels == {encoded(n): label for label, n in enumerate(inner)}


@pytest.mark.parametrize("parts", [("train", "val"), ("Training", "test"), ("train", "val", "test", "meta")])
def test_the_parts_of_a_data_set_are_not_taken_for_classes(tmp_path, parts):
    root = tmp_path / "photos"
    for part in parts:
        for name in ("ant", "bee"):
            write(root / part / name / f"{part}{name}.png")
    text = one_sentence(root, tmp_path / "out")
    assert "look like parts of a data set and not like classes" in text
    assert "--split" in text
    manifest = packed(root, tmp_path / "out", split=parts[0])[1]
    assert manifest.classes == ["ant", "bee"]
    assert count(str(root), PackOptions(split=parts[0])) == 2
    assert "--split dev:" in one_sentence(root, tmp_path / "no", split="dev")
    (tmp_path / "above").mkdir()
    root.rename(tmp_path / "above" / "photos")  # the same, one folder further down
    assert "look like parts" in one_sentence(tmp_path / "above", tmp_path / "no")
    root = tmp_path / "above" / "photos"
    (tmp_path / "map").write_text("".join(f"{part}\n" for part in sorted(parts)))
    asked = packed(root, tmp_path / "asked", class_map=tmp_path / "map")[1]
    assert asked.classes == sorted(parts), "who lists them means them"


def test_a_class_called_train_among_others_is_a_class(tmp_path):
    for name in ("train", "boat"):
        write(tmp_path / "photos" / name / "x.png")
    assert packed(tmp_path / "photos", tmp_path / "out")[1].classes == ["boat", "train"]
    write(tmp_path / "alone" / "train" / "ant" / "x.png")
    assert "pack it with --split train" in one_sentence(tmp_path / "alone", tmp_path / "no")
    write(tmp_path / "tars" / "train-0.tar", tar_bytes([("0.png", encoded(0, "PNG"))]))
    write(tmp_path / "tars" / "val-0.tar", tar_bytes([("1.png", encoded(1, "PNG"))]))
    assert "look like parts" in one_sentence(tmp_path / "tars", tmp_path / "no")
    assert packed(f"{tmp_path}/tars/train*.tar", tmp_path / "tarred")[1].count == 1


def test_a_class_map_with_spaces_in_its_names_is_read(tmp_path):
    for name in ("great dane", "great", "cat"):
        write(tmp_path / "photos" / name / f"{name}.png")
    map_ = tmp_path / "map"
    map_.write_text("\ufeffgreat dane The Great Dane\ncat\ngreat  great ones\n", encoding="utf-8")
    labels, manifest, _ = packed(tmp_path / "photos", tmp_path / "out", class_map=map_)
    assert manifest.classes == ["The Great Dane", "cat", "great ones"]
    wanted = {name: label for label, name in enumerate(("great dane", "cat", "great"))}
    assert labels == {(tmp_path / "photos" / n / f"{n}.png").read_bytes(): label for n, label in wanted.items()}
    map_.write_text("great dane\ncat\ngreat\n")
    assert packed(tmp_path / "photos", tmp_path / "bare", class_map=map_)[1].classes == ["great dane", "cat", "great"]
    map_.write_text("great dane\ncat\ngreat\ndog\n")
    assert "1 classes of" in one_sentence(tmp_path / "photos", tmp_path / "no", class_map=map_)


def test_a_class_map_for_numbers_names_the_right_ones(tmp_path, capsys):
    np.savez(tmp_path / "x.npz", arr_0=np.zeros((2, 8, 8, 3), np.uint8), labels=np.array([0, 1]))
    map_ = tmp_path / "map"

    def classes(text: str) -> list[str] | None:
        map_.write_text(text)
        out = tmp_path / f"out{len(list(tmp_path.iterdir()))}"
        return pack(str(tmp_path / "x.npz"), out, PackOptions(class_map=map_))[""].classes

    assert classes("0 tabby cat\n1 great dane\n") == ["tabby cat", "great dane"]
    assert classes("cat\ndog\n") == ["cat", "dog"]
    assert "is taken for" not in capsys.readouterr().out
    assert classes("n01 tabby cat\nn02\tgreat dane\n") == ["tabby cat", "great dane"]
    assert "'n01' is taken for the source's name of class 'tabby cat'" in capsys.readouterr().out
    map_.write_text("1 dog\n0 cat\n")
    text = one_sentence(tmp_path / "x.npz", tmp_path / "no", class_map=map_)
    assert "class 0 must stand in line 1, but '1' does" in text


# --- tracebacks


def test_a_link_that_leads_nowhere_is_named(tmp_path):
    root = write(tmp_path / "photos" / "ant" / "1.png").parent.parent
    (root / "ant" / "gone.png").symlink_to(tmp_path / "nowhere.png")
    (root / "ant" / "self.png").symlink_to(root / "ant" / "self.png")
    text = one_sentence(root, tmp_path / "out")
    assert "2 of 3 images cannot be read, the first is ant/" in text
    manifest = packed(root, tmp_path / "out", skip_bad=True)[1]
    assert manifest.skipped == ("ant/gone.png", "ant/self.png")
    (root / "ant" / "gone").symlink_to(tmp_path / "nowhere")
    assert any("1 links that lead nowhere" in note for note in open_source(str(root)).notes)
    os.mkfifo(root / "ant" / "pipe.png")  # reading it would wait for ever
    assert any("1 pipes and devices passed over" in note for note in open_source(str(root)).notes)
    (root / "bee").symlink_to(tmp_path / "nowhere")
    assert "this link leads nowhere, so a class may be missing" in one_sentence(root, tmp_path / "no")


@pytest.mark.parametrize("label", [2**32 - 1, 2**31, 2**63, 10**6])
@pytest.mark.parametrize("key", ["labels", "arr_1"])
def test_a_label_that_would_fill_the_memory_is_refused(tmp_path, label, key):
    np.savez(tmp_path / "x.npz", arr_0=np.zeros((2, 8, 8, 3), np.uint8), **{key: np.array([0, label], np.uint64)})
    assert f"image 1 has the label {label}" in one_sentence(tmp_path / "x.npz", tmp_path / "out")


def test_arrays_that_are_not_read_are_named(tmp_path, capsys):
    arrays = {"labels": np.array([0, 1]), "arr_1": np.array([1, 0]), "captions": np.array(["a", "b"])}
    np.savez(tmp_path / "x.npz", arr_0=np.zeros((2, 8, 8, 3), np.uint8), **arrays)
    _, manifest, printed = packed(tmp_path / "x.npz", tmp_path / "out", capsys)
    assert "arrays that are not read: arr_1, captions" in printed
    assert "arrays that are not read: arr_1, captions" in manifest.noticed["source"][0]
    assert count(str(tmp_path / "x.npz")) == 2


def npz(path, header: bytes, data: bytes = b"\0" * 64):
    with zipfile.ZipFile(path, "w") as archive:
        padded = header + b" " * (63 - (10 + len(header)) % 64) + b"\n"
        archive.writestr("arr_0.npy", b"\x93NUMPY\1\0" + struct.pack("<H", len(padded)) + padded + data)
    return path


@pytest.mark.parametrize(
    "header",
    [
        b"{'descr': '|u1', 'fortran_order': False, 'shape': (1000000000000, 64, 64, 3), }",
        b"{'descr': '|u1', 'fortran_order': False, 'shape': (-1, 64, 64, 3), }",
        b"{'descr': '|O', 'fortran_order': False, 'shape': (4,), }",
        b"{'descr': 'nonsense', 'fortran_order': False, 'shape': (4,), }",
        b"{",
        b"",
    ],
)
def test_damaged_npz_files_are_one_sentence(tmp_path, header):
    path = npz(tmp_path / "x.npz", header)
    assert str(path) in one_sentence(path, tmp_path / "out")


@pytest.mark.parametrize("cut", [0, 10, 200, 400, -30, -3])
def test_cut_npz_files_are_one_sentence(tmp_path, cut):
    path = tmp_path / "x.npz"
    np.savez_compressed(path, arr_0=np.random.default_rng(0).integers(0, 255, (3, 8, 8, 3)).astype(np.uint8))
    path.write_bytes(path.read_bytes()[:cut])
    assert str(path) in one_sentence(path, tmp_path / "out")
    with pytest.raises(UserError, match=r"x\.npz"):
        count(str(path))


@pytest.mark.parametrize("value", [10**6, 10**30, int("9" * 4000), -1, "1" * 5000])
def test_a_class_that_is_no_class_is_one_sentence(tmp_path, value):
    path = tmp_path / "x.jsonl"
    path.write_text(json.dumps({"image_path": "a.png", "class": value}))
    text = one_sentence(path, tmp_path / "out")
    assert "must be a number from 0 or a name" in text
    assert len(text) < 400


def test_a_yaml_file_of_kind_pack_says_the_same_as_the_command(tmp_path, capsys):
    root = write(tmp_path / "photos" / "ant" / "1.png").parent.parent
    file = tmp_path / "pack.yaml"
    file.write_text(f"kind: pack\nsource: {root}\nout: {tmp_path / 'a'}\nsize: 8\njobs: 1\n")
    main(["pack", str(file)])
    main(["pack", str(root), "--out", str(tmp_path / "b"), "--size", "8", "--jobs", "1"])
    assert (tmp_path / "a" / "manifest.json").read_bytes() == (tmp_path / "b" / "manifest.json").read_bytes()
    main(["pack", str(file), "--out", str(tmp_path / "c"), "size=16"])
    assert read_manifest(tmp_path / "c").image_size == 16
    capsys.readouterr()
    main(["config", str(file)])
    assert "samples_per_shard: 2500" in capsys.readouterr().out
    for wrong, sentence in (
        (["--size", "big"], "size: Input should be a valid integer"),
        (["sise=8"], "did you mean size"),
        (["--fit", "stretch"], "'crop' or 'pad'"),
        (["--held-out", "nan"], "held_out"),
        (["--held-out", "0"], "held_out"),
    ):
        with pytest.raises(UserError, match=sentence):
            main(["pack", str(root), "--out", str(tmp_path / "no"), *wrong])
    with pytest.raises(UserError, match="out: missing"):
        main(["pack", str(root)])
