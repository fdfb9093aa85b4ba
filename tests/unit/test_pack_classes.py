"""llamagen pack and class labels: names that are numbers, parts of a data set, class maps."""

import numpy as np
import pytest

from llamagen_dist.data.formats import count
from llamagen_dist.data.pack import PackOptions, pack
from tests.unit.picture_sources import encoded, one_sentence, packed, tar_bytes, write


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
