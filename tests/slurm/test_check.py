"""``llamagen check`` and ``llamagen status`` on the real cluster: checks that pass or must not, and a job's life."""

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from llamagen_dist.config import load
from llamagen_dist.launch.folder import JobSpec
from llamagen_dist.launch.slurm import queue
from llamagen_dist.launch.slurm.submit import Submission, size_of

ROOT = Path(__file__).resolve().parents[2]
WARNED = r"(\d+ warnings?, )?"  # a machine may be short of room, for example, which is not what is tested here


def llamagen(*words: str) -> list[str]:
    return [sys.executable, "-m", "llamagen_dist.cli", *words]


def profile(folder: Path, text: str) -> Path:
    """slurm/local.yaml with one rank per node, and more."""
    file = folder / "cluster.yaml"
    file.write_text((ROOT / "slurm/local.yaml").read_text().replace("ranks_per_node: 2", "ranks_per_node: 1") + text)
    return file


def status(folder: Path) -> dict[str, Any]:
    done = subprocess.run(
        llamagen("status", "--json", str(folder)), cwd=ROOT, capture_output=True, text=True, check=True
    )
    (row,) = json.loads(done.stdout)["runs"]
    return dict(row)


def wait_for(what: Callable[[], bool], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.5)


def test_a_good_cluster_is_ready_and_status_follows_the_job(tmp_path: Path) -> None:
    out, file = tmp_path / "check", profile(tmp_path, "")
    began = time.monotonic()
    check = subprocess.Popen(
        llamagen("check", "--cluster", str(file), "--out", str(out)), cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    wait_for(lambda: out.exists() and (out / "launch").exists() and status(out)["state"] == "running")
    assert status(out)["where"].startswith("n")
    printed, _ = check.communicate(timeout=180)
    assert check.returncode == 0, printed
    assert time.monotonic() - began < 120  # a two-minute job, on two cores too
    assert re.match(rf"READY: 2 nodes x 1 CPU rank: {WARNED}all-reduce ", printed.splitlines()[-1])
    found = json.loads((out / "check.json").read_text())
    assert found["ready"]
    assert len({report["where"] for report in found["ranks"]}) == 2
    assert all(report["step"]["equal"] and report["shared"]["winners"] == [1, 1] for report in found["ranks"])
    assert not list((out / "reports").glob("trials-*"))
    assert status(out)["state"] == "finished"


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        ("python: /nonexistent/python\n", "/nonexistent/python: No such file"),
        ("setup: ['export GLOO_SOCKET_IFNAME=nowhere0']\n", "Unable to find address for: nowhere0"),
    ],
)
def test_a_broken_cluster_is_not_ready_and_says_why(tmp_path: Path, more: str, sentence: str) -> None:
    out = tmp_path / "check"
    words = llamagen("check", "--cluster", str(profile(tmp_path, more)), "--out", str(out))
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=180, check=False)
    assert done.returncode == 1, done.stderr
    assert re.match(
        r"NOT READY: 2 nodes x 1 CPU rank: 1 problem(, \d+ warnings?)?; first: ", done.stdout.splitlines()[-1]
    )
    assert sentence in done.stdout
    assert not json.loads((out / "check.json").read_text())["ready"]


@pytest.fixture
def sleeper(tmp_path: Path) -> Iterator[tuple[Path, str]]:
    """A folder, and the job that sleeps in it: a module of the standard library, so that it starts at once."""
    cluster = load(profile(tmp_path, ""), ["nodes=1"], kind="cluster")
    folder = tmp_path / "sleeper"
    arguments = ("-n1", "-r1", "import time; time.sleep(100)")
    work = JobSpec("sleeper", "timeit", arguments, str(folder), str(ROOT))
    (job,) = Submission((work,), cluster, size_of(cluster)).submit()
    yield folder, job
    queue.cancel([job])


def test_status_tells_a_jobs_life(sleeper: tuple[Path, str]) -> None:
    folder, job = sleeper
    wait_for(lambda: status(folder)["state"] == "running")
    assert (status(folder)["job"], status(folder)["restarts"]) == (job, {})
    wait_for(lambda: any((folder / "log").rglob("*_0_log.out")))
    queue.requeue(job)  # by SLURM alone: no word of it in the history
    wait_for(lambda: status(folder)["reason"].startswith("requeued, waits for"))
    wait_for(lambda: status(folder)["restarts"] == {"slurm": 1})
    assert status(folder)["state"] == "running"
    conf = os.environ["SLURM_CONF"]
    os.environ["SLURM_CONF"] = "/nonexistent"
    try:
        assert status(folder)["state"] == "unknown"
    finally:
        os.environ["SLURM_CONF"] = conf
    queue.cancel([job])
    wait_for(lambda: status(folder)["state"] == "stopped")
    assert f"job {job} is over (CANCELLED)" in status(folder)["reason"]
