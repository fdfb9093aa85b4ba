"""Whole files or none: what is there stays until the new content is complete."""

from pathlib import Path

import pytest

from llamagen_dist.files import write_bytes, written_aside


def test_a_file_is_the_old_one_until_the_new_one_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "data.npz"
    write_bytes(path, b"old")
    with written_aside(path) as aside:
        aside.write_bytes(b"new")
        assert aside.suffix == ".npz", "writers and readers tell the format by it"
        assert path.read_bytes() == b"old"
    assert path.read_bytes() == b"new"
    assert list(tmp_path.iterdir()) == [path]


def test_a_failure_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "COMPLETE"
    write_bytes(path, b"old")

    def fail() -> None:
        with written_aside(path) as aside:
            aside.write_bytes(b"half")
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        fail()
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]
