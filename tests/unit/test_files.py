"""Whole files or none: what is there stays until the new content is complete."""

import json
import os
import sys
from pathlib import Path

import pytest

from llamagen_dist.errors import UserError
from llamagen_dist.files import OutputFolder, write_bytes, written_aside


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


# --- folders of results


def work(folder: Path, seed: int, discard: bool = False) -> dict[str, object] | None:
    """Two results of a seed, made in one folder, as a program does it: what is finished is not made again."""
    output = OutputFolder(folder, {"made_by": "a test", "seed": seed}, what="numbers")
    if (record := output.finished()) is not None:
        return record
    results = [folder / f"{n}.txt" for n in range(2)]

    def remove() -> None:
        for result in results:
            result.unlink(missing_ok=True)

    output.begin(results, remove if discard else None)
    for result in results:
        if output.kept(result.name) is None:
            write_bytes(result, f"{seed}".encode())
            output.keep(result.name, {"bytes": 1})
    output.finish({"count": 2})
    return output.finished()


def killed_at(event: int, folder: Path, seed: int, discard: bool) -> bool:
    """Whether a process that works in the folder was ended, without any clean-up, at its n-th step on files."""
    child = os.fork()
    if child == 0:
        steps = iter(range(event))

        def end_at_the_step(name: str, _: object) -> None:
            if name in ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir") and next(steps, None) is None:
                os._exit(9)

        sys.addaudithook(end_at_the_step)
        work(folder, seed, discard)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9


@pytest.mark.parametrize("earlier", [pytest.param(None, marks=pytest.mark.long), 1])
def test_a_folder_of_results_survives_a_kill_at_every_step(tmp_path: Path, earlier: int | None) -> None:
    """Alone, and where it first throws away what another identity left unfinished."""
    event, killed = 0, True
    while killed:
        folder = tmp_path / f"{event}"
        if earlier is not None:
            assert killed_at(18, folder, earlier, False), "the earlier work is to be left unfinished"
        killed = killed_at(event, folder, 2, True)
        assert work(folder, 2, True) == {"made_by": "a test", "seed": 2, "count": 2}
        assert [(folder / f"{n}.txt").read_text() for n in range(2)] == ["2"] * 2
        event += 1
    assert event > 15


def test_results_of_another_identity_are_refused_with_the_difference(tmp_path: Path) -> None:
    work(tmp_path / "whole", 1)
    with pytest.raises(UserError, match=r"already holds numbers made in another way \(seed: 1 -> 2\)"):
        work(tmp_path / "whole", 2)
    assert killed_at(18, tmp_path / "half", 1, False)
    with pytest.raises(UserError, match=r"holds unfinished numbers made in another way \(seed: 1 -> 2\)"):
        work(tmp_path / "half", 2)
    assert work(tmp_path / "half", 1) is not None
    write_bytes(tmp_path / "whole" / "record.json", json.dumps({"seed": 1}).encode())
    with pytest.raises(UserError, match="made_by: null -> "):
        work(tmp_path / "whole", 1)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "1.txt").write_text("precious")
    with pytest.raises(UserError, match=r"holds 1\.txt, which this command did not write"):
        work(tmp_path / "mine", 1)
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot be written"):
        work(tmp_path / "file" / "out", 1)


def test_a_lost_result_reopens_a_finished_folder(tmp_path: Path) -> None:
    """Twin: the same files where there is no record are somebody else's."""
    output = OutputFolder(tmp_path, {"seed": 1}, key="out")
    results = [tmp_path / "a.npz", tmp_path / "b.npz"]
    for result in results:
        result.touch()
    with pytest.raises(UserError, match=r"^out: .* holds a\.npz, which this command did not write"):
        output.begin(results)
    output.begin()
    output.finish({})
    assert output.finished(results) == {"seed": 1}
    results[1].unlink()
    assert output.finished(results) is None
    with pytest.raises(UserError, match=r"^out: .* already holds results made in another way"):
        OutputFolder(tmp_path, {"seed": 2}, key="out").finished(results)
    output.begin(results)
    assert output.parts.exists()


def test_an_empty_job_is_refused_only_where_its_process_could_still_add_to_it(tmp_path: Path) -> None:
    OutputFolder(tmp_path, {"seed": 1}).begin()
    other = OutputFolder(tmp_path, {"seed": 2})
    with pytest.raises(UserError, match=r"holds unfinished results made in another way \(seed: 1 -> 2\)"):
        other.begin(refuse_empty=True)
    other.begin()
    with pytest.raises(UserError, match=r"\(seed: 2 -> 1\)"):
        OutputFolder(tmp_path, {"seed": 1}).begin(refuse_empty=True)
