"""llamagen pack on the folders and files that people have: what is passed over is counted and named."""

import json

import pytest

from llamagen_dist.cli import main
from llamagen_dist.data.formats import count
from llamagen_dist.data.pack import PackOptions, pack
from llamagen_dist.errors import UserError
from tests.unit.picture_sources import APPLE, encoded, one_sentence, packed, samples, tar_bytes, write


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
