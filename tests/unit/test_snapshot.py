"""The code that jobs run, taken by several launches at once."""

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from llamagen_dist.launch import snapshot


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    (tmp_path / "root/llamagen_dist").mkdir(parents=True)
    (tmp_path / "root/llamagen_dist/program.py").write_text("print(1)\n")
    return tmp_path / "root"


def test_two_at_once_get_the_same_whole_copy(checkout, tmp_path, monkeypatch):
    """Both have copied before either has put its copy in place."""
    both, real = threading.Barrier(2), snapshot.record

    def record(root: Path) -> dict:
        both.wait(timeout=20)
        return real(root)

    monkeypatch.setattr(snapshot, "record", record)
    with ThreadPoolExecutor(2) as pool:
        taken = {pool.submit(snapshot.take, checkout, tmp_path / "code") for _ in range(2)}
        folders = {future.result() for future in taken}
    assert len(folders) == 1
    assert list((tmp_path / "code").iterdir()) == list(folders), "the copy of the slower one is gone"
    assert (folders.pop() / "llamagen_dist/program.py").read_text() == "print(1)\n"


def test_a_copy_that_cannot_be_put_in_place_is_an_error(checkout, tmp_path, monkeypatch):
    def refuse(self: Path, target: Path) -> Path:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "rename", refuse)
    with pytest.raises(PermissionError):
        snapshot.take(checkout, tmp_path / "code")
    assert list((tmp_path / "code").iterdir()) == []
