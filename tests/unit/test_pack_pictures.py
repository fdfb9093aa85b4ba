"""llamagen pack: what is kept, encoded, left out or refused, and that plain WebDataset reads the same."""

import json
import os
import signal
import struct
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
import webdataset

from llamagen_dist.cli import main
from llamagen_dist.data.decode import decode
from llamagen_dist.data.images import load_images
from llamagen_dist.data.pack import PackOptions, pack
from llamagen_dist.data.recipe import ImageRecipe
from llamagen_dist.data.shards import open_shards
from llamagen_dist.errors import UserError
from tests.unit import picture_sources
from tests.unit.picture_sources import contents, encoded, one_sentence, samples


@pytest.fixture
def mixed(tmp_path):
    return picture_sources.mixed(tmp_path / "photos")


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
    text = one_sentence(mixed, tmp_path / "out", max_pixels=400)
    assert "6 of 7 images cannot be read" in text
    assert "24 x 20 pixels, more than the limit of 400" in text
    assert pack(str(mixed), tmp_path / "out", PackOptions(max_pixels=480))[""].count == 7


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


def test_a_pack_that_is_killed_leaves_no_process_behind_and_goes_on(mixed, tmp_path, monkeypatch):
    """A real SIGKILL of the main process: its workers, which write into the folder, end by themselves."""
    options = PackOptions(samples_per_shard=1, jobs=2)
    stored, running = ImageRecipe.stored, tmp_path / "running"
    running.mkdir()

    def slow(recipe, picture):
        (running / str(os.getpid())).touch()
        time.sleep(0.1)
        return stored(recipe, picture)

    monkeypatch.setattr(ImageRecipe, "stored", slow)
    child = os.fork()
    if child == 0:
        try:
            pack(str(mixed), tmp_path / "cut", options)
        finally:
            os._exit(1)  # not reached before the kill
    wait_until(lambda: list((tmp_path / "cut").glob("*.tar")))
    os.kill(child, signal.SIGKILL)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL
    workers = [int(path.name) for path in running.iterdir()]
    assert len(workers) == 2
    try:
        wait_until(lambda: not any(alive(worker) for worker in workers))
    finally:
        for worker in filter(alive, workers):
            os.kill(worker, signal.SIGKILL)
    monkeypatch.undo()
    assert not (tmp_path / "cut" / "manifest.json").exists()
    kept = {path: path.stat().st_mtime_ns for path in (tmp_path / "cut").glob("*.tar") if part_of(path).exists()}
    assert kept
    pack(str(mixed), tmp_path / "cut", options)
    assert {path: path.stat().st_mtime_ns for path in kept} == kept  # what was finished was not made again
    pack(str(mixed), tmp_path / "whole", options)
    assert contents(tmp_path / "cut") == contents(tmp_path / "whole")


def part_of(shard: Path) -> Path:
    return shard.parent / ".parts" / f"{shard.name}.json"


def wait_until(condition) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def alive(pid: int) -> bool:
    """Whether a process still runs; one that only waits for its parent to ask does not."""
    try:
        with open(f"/proc/{pid}/stat", encoding="utf-8") as file:
            return file.read().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


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
    for wrong in (
        ["--quality", "0"],
        ["--max-pixels", "0"],
        ["--max-pixels", "999999999"],
        ["--max-pixels", "90000000"],
        ["--min-side", "-1"],
    ):
        with pytest.raises(UserError, match=wrong[0][2:].replace("-", "_")):
            main(["pack", str(foreign), "--out", str(tmp_path / "out"), *wrong])
