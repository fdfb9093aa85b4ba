"""The launcher through its real command line: ranks, failures, stops, resumes, refusals, snapshots."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from tests.runs.checkout import checkout

ALIVE_S = 30.0


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkout(tmp_path_factory.mktemp("checkout"), "runs/toy_program.py")


def stage(name: str, *arguments: str, ranks: int = 1, **more: object) -> dict[str, object]:
    return {
        "name": name,
        "why": "a test",
        "module": "tokenizer_training.toy_program",
        "ranks": ranks,
        "arguments": [arguments[0], "{out}/work", *arguments[1:]],
        **more,
    }


def pipeline(folder: Path, *stages: dict[str, object], title: str = "toy") -> Path:
    file = folder / "toy.yaml"
    file.write_text(yaml.safe_dump({"kind": "pipeline", "title": title, "stages": list(stages)}))
    return file


def words(root: Path, file: Path, out: Path, *more: str) -> list[str]:
    return [sys.executable, "-m", "llamagen_dist.cli", "pipeline", str(file), "--out", str(out), *more]


def environment(root: Path) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(root), "PYTHONDONTWRITEBYTECODE": "1"}


def launch(root: Path, file: Path, out: Path, *more: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        words(root, file, out, *more),
        cwd=root,
        env=environment(root),
        capture_output=True,
        text=True,
        timeout=90,
        check=False,
    )


def start(root: Path, file: Path, out: Path) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        words(root, file, out),
        cwd=root,
        env=environment(root),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def wait_for(what: Callable[[], object], seconds: float = ALIVE_S) -> None:
    deadline = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.05)


def rank_pids(out: Path, name: str) -> list[int]:
    notes = [json.loads(p.read_text()) for p in (out / "stages" / name / "launch/ranks/here").glob("rank_*.json")]
    return [note["pid"] for note in notes]


def running(pid: int) -> bool:
    stat = Path(f"/proc/{pid}/stat")
    return stat.exists() and stat.read_text().rpartition(")")[2].split()[0] != "Z"


def counting(out: Path, name: str, ranks: int = 1) -> Callable[[], bool]:
    """True once every rank is known and rank 0 counts."""
    return lambda: len(rank_pids(out, name)) == ranks and (out / "stages" / name / "launch/progress.json").exists()


def test_two_ranks_meet_and_everything_is_recorded(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    monkeypatch.setenv("OMP_NUM_THREADS", "7")  # of the shell, for one process: two ranks share the cores
    done = launch(root, pipeline(tmp_path, stage("meet", "join", ranks=2, produces=["{out}/work/joined_1.txt"])), out)
    assert done.returncode == 0, done.stderr
    assert "[1/1] meet — a test (2 ranks)" in done.stdout
    for rank in (0, 1):
        facts = dict(line.split("=", 1) for line in (out / f"work/joined_{rank}.txt").read_text().splitlines())
        assert facts["total"] == "3"
        assert facts["world"] == "2"
        assert facts["LOCAL_RANK"] == str(rank)
        assert facts["OMP_NUM_THREADS"] == str(max(1, len(os.sched_getaffinity(0)) // 2))
        assert facts["MASTER_ADDR"] == "127.0.0.1"
        snapshot = next((out / "code").iterdir())
        assert facts["cwd"] == facts["PYTHONPATH"] == str(snapshot)
        assert facts["file"] == str(snapshot / "tokenizer_training/toy_program.py")
        assert (facts["progress"] == "none") == (rank == 1)
    record = json.loads((out / "stages/meet/launch/DONE.json").read_text())
    assert {
        "name",
        "why",
        "seconds",
        "started",
        "peak_rss_gb",
        "ranks",
        "module",
        "config_sha256",
    } <= record.keys()
    assert record["ranks"] == 2
    assert 0.05 < record["peak_rss_gb"] < 5
    assert out.stat().st_mode & 0o777 == 0o700
    assert json.loads((snapshot / "record.json").read_text())["versions"]["torch"]


def all_stamped(text: str, rank: int) -> bool:
    """Whether every line (of ours: submitit writes some too) begins with a time and the rank."""
    lines = [line for line in text.splitlines() if not line.startswith("submitit ")]
    stamp = re.compile(rf"\d{{4}}-\d\d-\d\d \d\d:\d\d:\d\d rank {rank} \| counting: ")
    return bool(lines) and all(stamp.match(line) for line in lines)


def test_every_line_of_a_ranks_log_carries_time_and_rank(root: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = launch(root, pipeline(tmp_path, stage("count", "work", "3", "0.01", ranks=2)), out)
    assert done.returncode == 0, done.stderr
    for rank in (0, 1):
        (log,) = (out / "stages/count/log").rglob(f"*_{rank}_log.out")
        assert all_stamped(log.read_text(), rank)
        assert not all_stamped(log.read_text(), 1 - rank)
    program = [sys.executable, "-m", "tokenizer_training.toy_program", "work", str(tmp_path), "3", "0.01"]
    alone = {**environment(root), "RANK": "0", "WORLD_SIZE": "1"}
    plain = subprocess.run(program, cwd=root, env=alone, capture_output=True, text=True, check=True).stdout
    assert plain.startswith("counting: 0/3 (0 %)\n"), "twin: one process that nobody launched writes plain lines"
    assert not all_stamped(plain, 0)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_users_mistake_on_one_rank_is_one_sentence_and_no_hang(root: Path, tmp_path: Path, rank: int) -> None:
    done = launch(root, pipeline(tmp_path, stage("bad", "refuse", str(rank), ranks=2)), tmp_path / "out")
    assert done.returncode == 2
    assert done.stderr == f"llamagen: error: stage bad: toy.yaml: rank {rank} was given nonsense; give it sense\n"
    assert not any(running(pid) for pid in rank_pids(tmp_path / "out", "bad"))
    assert not (tmp_path / "out/stages/bad/launch/DONE.json").exists()


def test_a_bug_on_one_rank_shows_its_traceback_and_log(root: Path, tmp_path: Path) -> None:
    done = launch(root, pipeline(tmp_path, stage("bug", "crash", "1", ranks=2)), tmp_path / "out")
    assert done.returncode == 1
    assert "stage bug: rank 1 failed" in done.stderr
    assert "IndexError: list index out of range" in done.stderr
    assert "[][RANK]" in done.stderr
    assert "runpy" not in done.stderr
    log = Path(done.stderr.rpartition("full log: ")[2].strip())
    assert "IndexError" in log.read_text()
    assert not any(running(pid) for pid in rank_pids(tmp_path / "out", "bug"))


def test_a_killed_rank_takes_the_others_along(root: Path, tmp_path: Path) -> None:
    done = launch(root, pipeline(tmp_path, stage("oom", "die", "0", ranks=2)), tmp_path / "out")
    assert done.returncode == 1
    assert "rank 0 died without a message" in done.stderr
    assert "about to die" in done.stderr
    assert not any(running(pid) for pid in rank_pids(tmp_path / "out", "oom"))


def test_finished_stages_are_skipped_until_they_lose_something(root: Path, tmp_path: Path) -> None:
    out, touched = tmp_path / "out", tmp_path / "out/work/touched.txt"
    file = pipeline(tmp_path, stage("a", "touch", produces=["{out}/work/touched.txt"]), stage("b", "work", "1", "0"))
    assert launch(root, file, out).returncode == 0
    again = launch(root, file, out)
    assert again.returncode == 0
    assert again.stdout.count("finished earlier") == 2
    assert touched.read_text() == "x"
    touched.write_text("kept")
    (out / "stages/b/launch/DONE.json").unlink()
    assert launch(root, file, out).stdout.count("finished earlier") == 1
    assert touched.read_text() == "kept"
    touched.unlink()  # and so the stages after it are looked at again too
    assert launch(root, file, out).stdout.count("finished earlier") == 0
    assert touched.read_text() == "x"


@pytest.mark.parametrize("number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.long)])
def test_a_stopped_stage_saves_and_goes_on(root: Path, tmp_path: Path, number: signal.Signals) -> None:
    out = tmp_path / "out"
    file = pipeline(tmp_path, stage("count", "work", "60", "0.05", ranks=2), stage("after", "touch"))
    first = start(root, file, out)
    wait_for(counting(out, "count", ranks=2))
    os.killpg(first.pid, number)  # as a terminal's Ctrl-C: to the launcher and submitit's controller alike
    stdout, stderr = first.communicate(timeout=30)
    assert first.returncode == 130, stderr
    assert "progress is saved" in stdout
    assert f"pipeline {file} --out {out}" in stdout
    assert "after" not in stdout
    before = (out / "work/steps_0.txt").read_text().split()
    assert 0 < len(before) < 60
    second = launch(root, file, out)
    assert second.returncode == 0, second.stderr
    assert (out / "work/steps_0.txt").read_text().split() == [str(n) for n in range(60)]
    assert (out / "work/touched.txt").exists()


def test_a_stop_before_the_program_listens_ends_at_once(root: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    first = start(root, pipeline(tmp_path, stage("deaf", "refuse", "9")), out)
    wait_for(lambda: rank_pids(out, "deaf"))
    began = time.monotonic()
    first.send_signal(signal.SIGINT)
    stdout, _ = first.communicate(timeout=30)
    assert first.returncode == 130
    assert time.monotonic() - began < 10
    assert "resumes from what it last saved" in stdout


def test_another_config_is_refused_with_the_difference(root: Path, tmp_path: Path) -> None:
    out, product = tmp_path / "out", {"produces": ["{out}/work/steps_0.txt"]}
    assert launch(root, pipeline(tmp_path, stage("count", "work", "3", "0", **product)), out).returncode == 0
    kept = {p: p.read_bytes() for p in sorted(out.rglob("*")) if p.is_file()}
    done = launch(root, pipeline(tmp_path, stage("count", "work", "4", "0", **product)), out)
    assert done.returncode == 2
    assert "stage count was started with another config" in done.stderr
    assert "'3', '0'] -> ['work'" in done.stderr
    assert f"choose another --out, or delete {out / 'stages/count'} and {out / 'work'}" in done.stderr
    assert {p: p.read_bytes() for p in sorted(out.rglob("*")) if p.is_file()} == kept
    other = launch(root, pipeline(tmp_path, stage("count", "work", "3", "0", **product), title="other"), out)
    assert other.returncode == 2
    assert "holds another pipeline ('toy')" in other.stderr


def test_a_foreign_folder_is_left_alone(root: Path, tmp_path: Path) -> None:
    file = pipeline(tmp_path, stage("a", "touch"))
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis/chapter.txt").write_text("mine")
    done = launch(root, file, tmp_path / "thesis")
    assert (done.returncode, "is not empty and holds no pipeline" in done.stderr) == (2, True)
    assert [p.name for p in (tmp_path / "thesis").iterdir()] == ["chapter.txt"]
    below_a_file = launch(root, file, tmp_path / "thesis/chapter.txt/out")
    assert below_a_file.returncode == 2
    assert below_a_file.stderr.count("\n") == 1
    assert "is a file" in below_a_file.stderr


def test_ranks_stop_when_their_launcher_is_killed_and_a_new_launch_takes_over(root: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    file = pipeline(tmp_path, stage("count", "work", "100", "0.05", ranks=2))
    first = start(root, file, out)
    wait_for(counting(out, "count", ranks=2))
    refused = launch(root, file, out)
    assert refused.returncode == 2
    assert f"in use by another launcher (process {first.pid})" in refused.stderr
    pids = rank_pids(out, "count")
    first.kill()
    first.wait()
    assert all(running(pid) for pid in pids)
    second = launch(root, file, out)  # it waits for the orphans to save, then goes on
    assert not any(running(pid) for pid in pids)
    assert second.returncode == 0, second.stderr
    for rank in (0, 1):
        assert (out / f"work/steps_{rank}.txt").read_text().split() == [str(n) for n in range(100)]


def test_dry_run_starts_and_writes_nothing(root: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    file = pipeline(tmp_path, stage("a", "touch"), stage("b", "work", "1", "0", images="9000"))
    done = launch(root, file, out, "--dry-run")
    assert done.returncode == 0, done.stderr
    assert "9,000 images" in done.stdout
    assert "Nothing was started" in done.stdout
    assert not out.exists()
    missing = pipeline(tmp_path, {**stage("a", "touch"), "module": "tokenizer_training.absent"})
    refused = launch(root, missing, out, "--dry-run")
    assert (refused.returncode, "no such program" in refused.stderr) == (2, True)


@pytest.mark.long
def test_an_edit_does_not_reach_a_running_job_but_the_next_launch(tmp_path: Path, root: Path) -> None:
    mine = tmp_path / "checkout"
    shutil.copytree(root, mine)
    subprocess.run(
        "git init -q . && git add . && git -c user.name=t -c user.email=t@t commit -qm t",
        shell=True,
        cwd=mine,
        check=True,
    )
    out, toy = tmp_path / "out", mine / "tokenizer_training/toy_program.py"
    file = pipeline(
        tmp_path,
        stage("long", "work", "1", "0"),
        stage("slow", "work", "60", "0.05"),
        stage("late", "work", "60", "0"),
    )
    first = start(mine, file, out)
    wait_for(counting(out, "slow"))
    edited = toy.read_text().replace("as launched", "edited")
    toy.write_text(edited)
    _, stderr = first.communicate(timeout=60)
    assert first.returncode == 0, stderr
    assert (out / "work/version_0.txt").read_text() == "as launched"
    (out / "stages/late/launch/DONE.json").unlink()
    again = launch(mine, file, out)
    assert again.returncode == 0, again.stderr
    assert "the code has changed" in again.stdout
    assert (out / "work/version_0.txt").read_text() == "edited"
    records = [json.loads(p.read_text()) for p in (out / "code").glob("*/record.json")]
    assert len(records) == 2
    assert sum("edited" in (r["diff"] or "") for r in records) == 1
    assert all(len(r["commit"]) == 40 for r in records)


def sabotaged(root: Path, folder: Path, file: str, good: str, bad: str) -> Path:
    """A checkout in which one thing is broken."""
    broken = folder / "sabotaged"
    shutil.copytree(root, broken)
    text = (broken / file).read_text()
    assert text.count(good) == 1
    (broken / file).write_text(text.replace(good, bad))
    return broken


def test_without_the_watch_an_orphan_would_run_on(root: Path, tmp_path: Path) -> None:
    broken = sabotaged(root, tmp_path, "llamagen_dist/launch/rank.py", "        watch_launcher(self.launcher)\n", "")
    out = tmp_path / "out"
    first = start(broken, pipeline(tmp_path, stage("count", "work", "1000", "0.05")), out)
    wait_for(counting(out, "count"))
    (pid,) = rank_pids(out, "count")
    first.kill()
    first.wait()
    time.sleep(2.5)  # five times as long as the watch needs
    assert running(pid)
    os.kill(pid, signal.SIGKILL)


def test_without_the_grace_period_the_other_rank_would_hang(root: Path, tmp_path: Path) -> None:
    file, good = "llamagen_dist/launch/local.py", "COMPANION_GRACE_S = 2.0"
    broken = sabotaged(root, tmp_path, file, good, "COMPANION_GRACE_S = 1e9")
    out = tmp_path / "out"
    first = start(broken, pipeline(tmp_path, stage("bad", "refuse", "0", ranks=2)), out)
    wait_for((out / "stages/bad/launch/ranks/here/error_0.txt").exists)
    time.sleep(3)
    assert first.poll() is None
    first.send_signal(signal.SIGINT)
    _, stderr = first.communicate(timeout=30)
    assert first.returncode == 2
    assert "rank 0 was given nonsense" in stderr
