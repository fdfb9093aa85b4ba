"""llamagen pack on damaged links, arrays and lines: one sentence each, and no traceback."""

import json
import os
import struct
import zipfile

import numpy as np
import pytest

from llamagen_dist.cli import main
from llamagen_dist.data.formats import count, open_source
from llamagen_dist.data.manifest import read_manifest
from llamagen_dist.errors import UserError
from tests.unit.picture_sources import one_sentence, packed, write


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
