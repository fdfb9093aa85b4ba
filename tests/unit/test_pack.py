"""llamagen pack: every source, every refusal, the same bytes every time."""

import json
import os
import shutil

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from llamagen_dist.cli import main
from llamagen_dist.data import fashion_mnist
from llamagen_dist.data.foreign import verify
from llamagen_dist.data.images import center_crop, load_images
from llamagen_dist.data.pack import PackOptions, held_out_mask, pack
from llamagen_dist.data.shards import open_shards
from llamagen_dist.errors import UserError


def picture(seed: int, width: int = 40, height: int = 30) -> Image.Image:
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (height // 5 + 1, width // 5 + 1, 3)).astype(np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


@pytest.fixture
def folder(tmp_path):
    """zebra/ and ant/ (so that sorting matters), PNG and JPEG, one file deeper down."""
    root = tmp_path / "photos"
    (root / "zebra").mkdir(parents=True)
    (root / "ant" / "deep").mkdir(parents=True)
    for n in range(4):
        picture(n).save(root / "zebra" / f"{n}.png")
    for n in range(3):
        picture(10 + n, 64, 64).save(root / "ant" / f"{n}.jpg")
    picture(20).save(root / "ant" / "deep" / "x.PNG")
    (root / "ant" / ".hidden.png").write_bytes(b"")
    (root / "ant" / "notes.txt").write_text("not an image")
    return root


def contents(folder) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.fixture(scope="module")
def fashion(tmp_path_factory):
    out = tmp_path_factory.mktemp("fashion") / "shards"
    manifests = pack("builtin:fashion-mnist", out, PackOptions(size=32, held_out=1000, samples_per_shard=3000, jobs=2))
    return out, manifests


@pytest.mark.long
def test_the_embedded_set_is_split_9000_to_1000_evenly_and_disjointly(fashion):
    out, manifests = fashion
    train, validation = open_shards(out / "train"), open_shards(out / "validation")
    assert (len(train), len(validation)) == (9000, 1000)
    assert np.bincount(validation.labels(range(1000))).tolist() == [100] * 10
    assert np.bincount(train.labels(range(9000))).tolist() == [900] * 10
    pixels, labels = fashion_mnist.load()
    seen = []
    for shards in (train, validation):
        stored = load_images(shards, range(len(shards)), 32)
        assert not stored[:, :2].any()
        assert not stored[:, :, 30:].any()
        assert (stored[..., 0] == stored[..., 2]).all()
        inner = stored[:, 2:30, 2:30, 0]
        seen += [
            (image.tobytes(), label) for image, label in zip(inner, shards.labels(range(len(shards))), strict=True)
        ]
    assert sorted(seen) == sorted((image.tobytes(), label) for image, label in zip(pixels, labels, strict=True))
    manifest = manifests["train"]
    assert (manifest.image_size, manifest.padding, len(manifest.shards)) == (32, (2, 2, 2, 2), 3)
    assert manifest.classes == list(fashion_mnist.CLASSES)


@pytest.mark.long
def test_a_swapped_label_would_be_noticed(fashion):
    """The sabotage of the test above: shifting the labels by one sample breaks the pairing."""
    pixels, labels = fashion_mnist.load()
    right = sorted((image.tobytes(), label) for image, label in zip(pixels, labels, strict=True))
    assert right != sorted((image.tobytes(), label) for image, label in zip(pixels, np.roll(labels, 1), strict=True))


def test_the_same_bytes_for_any_number_of_processes_and_packs(folder, tmp_path):
    options = {"size": 16, "held_out": 0.25, "samples_per_shard": 2}
    for name, jobs in (("a", 1), ("b", 2), ("c", 1)):
        pack(str(folder), tmp_path / name, PackOptions(**options, jobs=jobs))
    assert contents(tmp_path / "a") == contents(tmp_path / "b") == contents(tmp_path / "c")
    picture(99).save(folder / "zebra" / "0.png")
    pack(str(folder), tmp_path / "d", PackOptions(**options))
    assert contents(tmp_path / "a") != contents(tmp_path / "d")


def test_an_image_folder(folder, tmp_path):
    pack(str(folder), tmp_path / "out", PackOptions(size=16))
    shards = open_shards(tmp_path / "out")
    assert shards.manifest.classes == ["ant", "zebra"]
    labels = shards.labels(range(8))
    assert sorted(labels.tolist()) == [0] * 4 + [1] * 4
    assert labels.tolist() != sorted(labels.tolist())  # shuffled, for those who stream
    expected = {np.asarray(center_crop(picture(n), 16)).tobytes() for n in range(4)}
    stored = load_images(shards, np.nonzero(labels == 1)[0].tolist(), 16)
    assert {image.tobytes() for image in stored} == expected
    assert shards.manifest.image_size == 16
    assert shards.manifest.padding is None
    verify(shards)


def test_without_a_size_jpegs_are_kept_byte_for_byte(folder, tmp_path):
    pack(str(folder), tmp_path / "out", PackOptions())
    shards = open_shards(tmp_path / "out")
    assert shards.manifest.image_size is None
    kept = {shards.read(n, ".jpg") for n in range(8) if ".jpg" in shards.parts(n)}
    assert kept == {(folder / "ant" / f"{n}.jpg").read_bytes() for n in range(3)}
    assert sum(".png" in shards.parts(n) for n in range(8)) == 5


@pytest.mark.parametrize("key", ["arr_1", "labels"])
def test_an_npz_file(tmp_path, key):
    pixels = np.random.default_rng(0).integers(0, 256, (7, 20, 24, 3)).astype(np.uint8)
    labels = np.array([0, 2, 2, 0, 2, 0, 0])
    np.savez(tmp_path / "x.npz", arr_0=pixels, **{key: labels})
    manifest = pack(str(tmp_path / "x.npz"), tmp_path / "out", PackOptions(size=24))[""]
    assert manifest.classes == ["0", "1", "2"]
    assert manifest.padding == (0, 2, 0, 2)
    shards = open_shards(tmp_path / "out")
    stored = {image.tobytes() for image in load_images(shards, range(7), 24)[:, 2:22]}
    assert stored == {image.tobytes() for image in pixels}
    np.savez(tmp_path / "y.npz", arr_0=pixels[..., 0])
    manifest = pack(str(tmp_path / "y.npz"), tmp_path / "bare", PackOptions(size=8, held_out=2))["validation"]
    assert (manifest.classes, manifest.members, manifest.count) == (None, (".png",), 2)


def test_what_is_complete_is_left_alone_and_anything_else_refused(folder, tmp_path):
    out = tmp_path / "out"
    pack(str(folder), out, PackOptions(size=16))
    before = {path: path.stat().st_mtime_ns for path in out.iterdir()}
    pack(str(folder), out, PackOptions(size=16, skip_bad=True, jobs=2))
    assert {path: path.stat().st_mtime_ns for path in out.iterdir()} == before
    with pytest.raises(UserError, match=r"made in another way \(size: 16 -> 8\)"):
        pack(str(folder), out, PackOptions(size=8))
    with pytest.raises(UserError, match="another --held-out"):
        pack(str(folder), out, PackOptions(size=16, held_out=2))
    picture(5).save(folder / "zebra" / "new.png")
    with pytest.raises(UserError, match=r"fingerprint: .* -> .*; images: 8 -> 9\)"):
        pack(str(folder), out, PackOptions(size=16))
    assert {path: path.stat().st_mtime_ns for path in out.iterdir()} == before


def test_an_interrupted_pack_goes_on_to_the_same_bytes(folder, tmp_path, monkeypatch):
    options = PackOptions(size=16, samples_per_shard=2)
    pack(str(folder), tmp_path / "whole", options)

    class Killed(BaseException):
        pass

    calls = []

    def killed_at_the_third(image, size):
        calls.append(1)
        if len(calls) == 6:
            raise Killed
        return center_crop(image, size)

    monkeypatch.setattr("llamagen_dist.data.recipe.center_crop", killed_at_the_third)
    with pytest.raises(Killed):
        pack(str(folder), tmp_path / "cut", options)
    assert not (tmp_path / "cut" / "manifest.json").exists()
    assert not list((tmp_path / "cut").glob(".*.tmp"))
    kept = {path: path.stat().st_mtime_ns for path in (tmp_path / "cut").glob("*.tar")}
    assert len(kept) == 2
    monkeypatch.undo()
    pack(str(folder), tmp_path / "cut", options)
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    assert contents(tmp_path / "cut") == contents(tmp_path / "whole")


def test_corrupt_images_are_named_counted_and_skipped_only_when_asked(folder, tmp_path):
    whole = (folder / "zebra" / "2.png").read_bytes()
    (folder / "zebra" / "2.png").write_bytes(whole[: len(whole) // 2])
    (folder / "ant" / "1.jpg").write_bytes(b"not an image at all")
    for jobs in (1, 2):
        with pytest.raises(UserError, match=r"2 of 8 images cannot be read, the first is .*(2.png|1.jpg).*--skip-bad"):
            pack(str(folder), tmp_path / "out", PackOptions(size=16, samples_per_shard=3, jobs=jobs))
        assert not (tmp_path / "out" / "manifest.json").exists()
    manifest = pack(str(folder), tmp_path / "out", PackOptions(size=16, samples_per_shard=3, skip_bad=True))[""]
    assert manifest.skipped == ("ant/1.jpg", "zebra/2.png")
    assert manifest.count == 6
    assert json.loads((tmp_path / "out" / "manifest.json").read_text())["skipped"] == [
        "ant/1.jpg",
        "zebra/2.png",
    ]
    assert len(load_images(open_shards(tmp_path / "out"), range(6), 16)) == 6


def test_a_repaired_image_lets_the_pack_start_again(folder, tmp_path):
    whole = (folder / "zebra" / "2.png").read_bytes()
    (folder / "zebra" / "2.png").write_bytes(whole[:50])
    with pytest.raises(UserError, match="1 of 8"):
        pack(str(folder), tmp_path / "out", PackOptions(size=16, samples_per_shard=3))
    (folder / "zebra" / "2.png").write_bytes(whole)
    assert pack(str(folder), tmp_path / "out", PackOptions(size=16, samples_per_shard=3))[""].count == 8


def refusal(tmp_path, source, **options) -> str:
    with pytest.raises(UserError) as caught:
        pack(str(source), options.pop("out", tmp_path / "out"), PackOptions(**options))
    assert not (tmp_path / "out" / "manifest.json").exists()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_bad_sources_get_one_sentence(folder, tmp_path):
    assert "no such folder or file" in refusal(tmp_path, tmp_path / "nowhere")
    assert "builtin:fashion-mnist" in refusal(tmp_path, "builtin:cifar")
    (tmp_path / "empty" / "class").mkdir(parents=True)
    assert "no images found" in refusal(tmp_path, tmp_path / "empty")
    (tmp_path / "bare").mkdir()
    assert "no images found" in refusal(tmp_path, tmp_path / "bare")
    (folder / "void").mkdir()
    assert "void: no images in this class folder" in refusal(tmp_path, folder)
    (folder / "void").rmdir()
    picture(0).save(folder / "loose.png")
    text = refusal(tmp_path, folder)
    assert "1 images lie outside a class folder" in text
    assert "labels are missing" in text
    (tmp_path / "x.npz").write_bytes(b"PK nonsense")
    assert "not a readable .npz" in refusal(tmp_path, tmp_path / "x.npz")
    np.savez(tmp_path / "y.npz", arr_0=np.zeros((3, 8, 8, 3), np.float32))
    assert "arr_0 must be uint8" in refusal(tmp_path, tmp_path / "y.npz")
    np.savez(tmp_path / "z.npz", arr_0=np.zeros((3, 8, 8, 3), np.uint8), arr_1=np.zeros(2, np.int64))
    assert "labels must be 3 integers" in refusal(tmp_path, tmp_path / "z.npz")
    np.savez(tmp_path / "o.npz", arr_0=np.array([{"a": 1}], dtype=object))
    assert "not a readable .npz" in refusal(tmp_path, tmp_path / "o.npz")  # never unpickled


def test_bad_options_get_one_sentence(folder, tmp_path):
    assert "there are 8 images" in refusal(tmp_path, folder, size=16, held_out=9)
    assert "there are 8 images" in refusal(tmp_path, folder, size=16, held_out=8)
    assert "there are 8 images" in refusal(tmp_path, folder, size=16, held_out=0.001)
    assert "larger than --size 16" in refusal(tmp_path, folder, size=16, fit="pad")
    (tmp_path / "file").write_text("in the way")
    assert "cannot be written" in refusal(tmp_path, folder, out=tmp_path / "file" / "out")
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "mine.tar").write_text("precious")
    assert "did not write" in refusal(tmp_path, folder, out=tmp_path / "taken")
    assert (tmp_path / "taken" / "mine.tar").read_text() == "precious"


def test_padding_needs_equal_images(folder, tmp_path):
    shutil.rmtree(folder / "ant" / "deep")
    text = refusal(tmp_path, folder, size=64, fit="pad")
    assert "4 of 7 images cannot be read" in text
    assert "40 x 30 pixels, where the others are (64, 64)" in text
    shutil.rmtree(folder / "zebra")
    manifest = pack(str(folder), tmp_path / "padded", PackOptions(size=67, fit="pad"))[""]
    assert manifest.padding == (1, 1, 2, 2)


@settings(max_examples=40, deadline=None)
@given(labels=st.lists(st.integers(0, 6), min_size=2, max_size=300), share=st.floats(0.01, 0.99))
def test_held_out_is_exact_and_even(labels, share):
    labels, count = np.array(labels), len(labels)
    wanted = min(max(1, round(share * count)), count - 1)
    mask = held_out_mask(labels, count, wanted)
    assert mask.sum() == wanted
    for label in range(7):
        assert abs(mask[labels == label].sum() - wanted * (labels == label).sum() / count) < 1


def test_the_command(folder, tmp_path, capsys):
    out = tmp_path / "out"
    main(["pack", str(folder), "--out", str(out), "--size", "16", "--held-out", "2", "--jobs", "1"])
    assert "out/validation: 2 images in 1 shards, 2 classes" in capsys.readouterr().out
    main(["shards", "verify", str(out / "train")])
    assert "1 shards, 6 samples, every byte as recorded" in capsys.readouterr().out
    main(["shards", "stats", str(out / "train")])
    stats = capsys.readouterr().out
    assert "16 px" in stats
    assert "3  zebra" in stats
    (out / "train" / "manifest.json").unlink()
    names = tmp_path / "names.txt"
    names.write_text("ant\nzebra\n")
    main(["shards", "index", str(out / "train"), "--classes", str(names)])
    assert open_shards(out / "train").manifest.classes == ["ant", "zebra"]
    for wrong in (["--size", "0"], ["--held-out", "1.5"], ["--jobs", "0"]):
        with pytest.raises(UserError, match=wrong[0][2:].replace("-", "_")):
            main(["pack", str(folder), "--out", str(out), *wrong])


def test_the_embedded_file_is_small_licensed_and_checked(monkeypatch):
    folder = os.path.join(os.path.dirname(fashion_mnist.__file__), "embedded")
    assert sum(os.path.getsize(os.path.join(folder, name)) for name in os.listdir(folder)) < 5_000_000
    with open(os.path.join(folder, "LICENSE.fashion-mnist"), encoding="utf-8") as file:
        text = file.read()
    for part in ("Copyright (c) 2017 Zalando SE", "Permission is hereby granted", "TEST split"):
        assert part in text
    images, labels = fashion_mnist.load()
    assert images.shape == (10_000, 28, 28)
    assert np.bincount(labels).tolist() == [1000] * 10
    monkeypatch.setattr(fashion_mnist, "SHA256", "0" * 64)
    with pytest.raises(ValueError, match="unpacks to sha256"):
        fashion_mnist.load()
