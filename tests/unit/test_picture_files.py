"""Folders and zips of pictures as image sets: their order, their pixels, and one sentence for each thing amiss."""

import struct
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from llamagen_dist.data.images import center_crop
from llamagen_dist.errors import UserError
from llamagen_dist.evaluation import passport
from llamagen_dist.evaluation.image_sets import open_images


def picture(seed: int, width: int = 8, height: int = 8) -> Image.Image:
    return Image.fromarray(np.random.RandomState(seed).randint(0, 256, (height, width, 3)).astype(np.uint8))


@pytest.fixture
def folder(tmp_path) -> Path:
    (tmp_path / "set" / "b").mkdir(parents=True)
    for number, name in enumerate(("a10.png", "a9.png", "b/c.png", ".hidden.png")):
        picture(number).save(tmp_path / "set" / name)
    (tmp_path / "set" / "notes.txt").write_text("no picture")
    return tmp_path / "set"


def test_a_folder_and_a_zip_of_it_give_the_same_images_sorted_by_name(folder, tmp_path):
    with zipfile.ZipFile(tmp_path / "set.zip", "w") as archive:
        for name in ("b/c.png", "a9.png", "notes.txt", "a10.png"):
            archive.write(folder / name, name)
    expected = np.stack([np.asarray(picture(number)) for number in (0, 1, 2)])
    for path in (folder, tmp_path / "set.zip"):
        images = open_images(path)
        assert (images.count, images.height, images.width) == (3, 8, 8)
        assert (images.read(np.array([2, 0, 1])) == expected[[2, 0, 1]]).all()
    assert passport.provenance(open_images(folder))["count"] == 3


def test_pictures_of_many_sizes_are_cropped_as_adm_does(folder):
    picture(5, 20, 12).save(folder / "a11.png")
    images = open_images(folder, image_size=6)
    assert (images.height, images.width) == (6, 6)
    assert (images.read(np.array([1]))[0] == np.asarray(center_crop(picture(5, 20, 12), 6))).all()
    with pytest.raises(UserError, match=r"a10.png has 8 x 8 pixels and a11.png has 20 x 12; set image_size"):
        open_images(folder)


def test_jpeg_and_palette_pictures_are_read(folder):
    picture(6).save(folder / "d.JPG", "JPEG", quality=95)
    picture(7).quantize(4).save(folder / "e.png")
    images = open_images(folder)
    assert images.count == 5
    assert (images.read(np.array([4]))[0] == np.asarray(picture(7).quantize(4).convert("RGB"))).all()


def deep_rgb(path: Path) -> None:
    """A 2 x 2 PNG with 16 bits per colour, which PIL cannot write."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    rows = b"".join(b"\0" + bytes(range(12)) for _ in range(2))
    header = struct.pack(">IIBBBBB", 2, 2, 16, 2, 0, 0, 0)
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize(
    ("write", "sentence"),
    [
        (lambda f: picture(1).convert("L").save(f / "x.png"), "x.png is grey; convert it to 8-bit RGB"),
        (lambda f: picture(1).convert("RGBA").save(f / "x.png"), "x.png has an alpha channel; convert"),
        (lambda f: picture(1).convert("LA").save(f / "x.png"), "x.png has an alpha channel; convert"),
        (lambda f: Image.new("I;16", (8, 8)).save(f / "x.png"), "x.png has 16 bits per value; convert"),
        (lambda f: deep_rgb(f / "x.png"), "x.png has 16 bits per value; convert"),
        (lambda f: picture(1).convert("CMYK").save(f / "x.jpg"), "x.jpg is CMYK; convert"),
        (lambda f: (f / "x.png").write_bytes(b"no picture"), r"x.png cannot be decoded \(cannot identify"),
        (lambda f: picture(1).save(f / "x.webp"), "holds x.webp, but only PNG and JPEG"),
    ],
)
def test_what_is_not_8_bit_rgb_is_refused_by_name(folder, write, sentence):
    assert open_images(folder).count == 3, "the twin"
    write(folder)
    with pytest.raises(UserError, match=sentence) as refused:
        open_images(folder)
    assert "\n" not in str(refused.value)


def test_a_picture_that_ends_too_early_is_named_when_it_is_read(folder):
    data = (folder / "a9.png").read_bytes()
    (folder / "a9.png").write_bytes(data[: len(data) - 40])
    images = open_images(folder)
    with pytest.raises(UserError, match=r"a9.png cannot be decoded"):
        images.read(np.arange(3))


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("empty", "empty: holds no PNG or JPEG pictures"),
        ("bad.zip", "bad.zip: cannot be read as a zip"),
        ("empty.zip", "empty.zip: holds no PNG or JPEG pictures"),
        ("cut.npz", "cut.npz: cannot be read as an .npz"),
        ("nowhere", "nowhere: no such images"),
    ],
)
def test_nothing_to_read_is_one_sentence(tmp_path, name, sentence):
    (tmp_path / "empty").mkdir()
    (tmp_path / "bad.zip").write_bytes(b"PK no zip")
    zipfile.ZipFile(tmp_path / "empty.zip", "w").close()
    np.savez(tmp_path / "whole.npz", arr_0=np.asarray(picture(0))[None])
    assert open_images(tmp_path / "whole.npz").count == 1, "the twin"
    (tmp_path / "cut.npz").write_bytes((tmp_path / "whole.npz").read_bytes()[:-60])
    with pytest.raises(UserError, match=sentence) as refused:
        open_images(tmp_path / name)
    assert "\n" not in str(refused.value)
