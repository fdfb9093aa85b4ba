"""llamagen pack on pictures that need a rule: turned, deep, transparent, or of several frames."""

import io
import itertools
import struct
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
from llamagen_dist.data.images import ImageStream, load_images
from llamagen_dist.data.manifest import read_manifest
from llamagen_dist.data.pack import PackOptions, pack
from llamagen_dist.data.shards import open_shards
from llamagen_dist.errors import UserError
from llamagen_dist.parallel.topology import Topology
from tests.unit.picture_sources import encoded, one_sentence, packed, samples, tar_bytes, write

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
