"""Never two jobs in one run directory: launches at once, launches killed half way, a queue that does not answer."""

import json
import os
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from llamagen_dist.launch.folder import JobFolder
from llamagen_dist.launch.slurm import lock, queue
from tests.slurm.toy import Toy, wait_for


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Toy:
    return Toy(tmp_path_factory.mktemp("lock"))


def jobs_of(toy: Toy, name: str) -> list[str]:
    """Every job that SLURM knows of this run, under whatever lock it was submitted."""
    scripts = toy.run(name).glob("log/*/*_submission.sh")
    known = {path.parent.name for path in scripts}
    return sorted(job for job, state in queue.my_jobs().items() if state.name == name or job in known)


def at_once(toy: Toy, name: str, count: int = 6) -> list["subprocess.CompletedProcess[str]"]:
    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(lambda _: toy.launch(name, "100 0.1 1000", nodes=1), range(count)))


def test_of_six_launches_at_once_one_submits_and_five_attach(toy: Toy) -> None:
    done = at_once(toy, "six")
    assert [launch.returncode for launch in done] == [0] * 6, [launch.stderr for launch in done]
    assert sum("attached" in launch.stdout for launch in done) == 5
    first = jobs_of(toy, "six")
    assert len(first) == 1
    # and again when the lock is that of a job which is over
    queue.cancel(first)
    wait_for(lambda: not queue.my_jobs()[first[0]].alive)
    done = at_once(toy, "six", 3)
    assert [launch.returncode for launch in done] == [0] * 3, [launch.stderr for launch in done]
    assert sum("attached" in launch.stdout for launch in done) == 2
    assert len(jobs_of(toy, "six")) == 2
    queue.cancel(jobs_of(toy, "six"))


def test_a_launch_that_another_has_outrun_waits_for_it_and_does_not_give_up(toy: Toy) -> None:
    """The other one has claimed the lock of a run that is over and has not written its own yet."""
    toy.launch("outrun", "100 0.1 1000", nodes=1)
    (job,) = jobs_of(toy, "outrun")
    queue.cancel([job])
    wait_for(lambda: not queue.my_jobs()[job].alive)
    folder = JobFolder.of(toy.run("outrun"))
    held = lock.read(folder)
    assert held is not None
    lock.claim(folder, held)
    (claim,) = folder.path.glob("claim-*")
    with ThreadPoolExecutor(1) as pool:
        second = pool.submit(toy.launch, "outrun", "100 0.1 1000", nodes=1)
        time.sleep(6)
        assert not second.done(), "it waits"
        claim.unlink()  # as if the other had not come to its lock
        assert second.result().returncode == 0, second.result().stderr
    queue.cancel(jobs_of(toy, "outrun"))


def broken(toy: Toy, folder: Path, good: str, bad: str) -> Toy:
    """A checkout whose launch is killed at a certain line."""
    other = Toy(folder)
    file = other.root / "llamagen_dist/launch/slurm/submit.py"
    text = file.read_text()
    assert text.count(good) == 1
    file.write_text(text.replace(good, bad))
    other.folder = toy.folder  # the same runs
    return other


def test_a_launch_killed_after_sbatch_has_left_a_job_and_the_next_attaches(toy: Toy, tmp_path: Path) -> None:
    good = "        for folder, job in zip(folders, jobs, strict=True):\n"
    killed = broken(toy, tmp_path, good, "        os.kill(os.getpid(), 9)\n" + good)
    assert killed.launch("after", "60 0.1 1000", nodes=1).returncode == -9
    held = lock.read(JobFolder.of(toy.run("after")))
    assert held is not None
    assert held.jobs == ()
    again = toy.launch("after", "60 0.1 1000", nodes=1)
    assert "attached" in again.stdout, again.stderr
    assert len(jobs_of(toy, "after")) == 1
    wait_for(lambda: toy.last("after")["event"] == "done")
    assert toy.steps("after") == list(range(1, 61))
    held = lock.read(JobFolder.of(toy.run("after")))
    assert held is not None
    assert list(held.jobs) == jobs_of(toy, "after"), "the job has named itself"
    assert "finished" in toy.launch("after", "60 0.1 1000", nodes=1).stdout
    assert len(jobs_of(toy, "after")) == 1


def test_a_launch_killed_before_sbatch_holds_the_folder_for_a_while_only(toy: Toy, tmp_path: Path) -> None:
    good = "            jobs = mine._enqueue("
    killed = broken(toy, tmp_path, good, "            os.kill(os.getpid(), 9)\n" + good)
    assert killed.launch("before", "5 0.1 1000", nodes=1).returncode == -9
    file = JobFolder.of(toy.run("before")).lock
    assert jobs_of(toy, "before") == []
    # half an hour ahead, as the clock of the launch's host may be: only the disk's own clock counts
    file.write_text(json.dumps({**json.loads(file.read_text()), "since": time.time() + 1800}))
    old = time.time() - lock.SUBMITTING_S + 5
    os.utime(file, (old, old))
    began = time.monotonic()
    again = toy.launch("before", "5 0.1 1000", nodes=1)
    assert again.returncode == 0, again.stderr
    assert time.monotonic() - began > 3, "it has waited for the other launch"
    assert len(jobs_of(toy, "before")) == 1
    assert "None" not in again.stdout
    wait_for(lambda: toy.last("before")["event"] == "done")


def test_a_queue_that_does_not_answer_is_no_reason_for_a_second_job(
    toy: Toy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    toy.launch("silent", "200 0.1 1000", nodes=1)
    (job,) = jobs_of(toy, "silent")
    kept = {path: path.read_bytes() for path in JobFolder.of(toy.run("silent")).path.glob("*.json")}
    for command in ("sbatch", "squeue", "scontrol", "scancel", "sinfo"):
        (tmp_path / command).write_text("#!/bin/sh\necho 'slurm_load_jobs error: Unable to contact' >&2\nexit 1\n")
        (tmp_path / command).chmod(0o755)
    with monkeypatch.context() as patched:
        patched.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
        refused = toy.launch("silent", "200 0.1 1000", nodes=1)
        fresh = toy.launch("fresh", "200 0.1 1000", nodes=1)
    assert refused.returncode == fresh.returncode == 2
    assert refused.stderr.count("\n") == fresh.stderr.count("\n") == 1
    assert "squeue failed (slurm_load_jobs error: Unable to contact)" in refused.stderr
    assert {path: path.read_bytes() for path in kept} == kept
    assert jobs_of(toy, "silent") == [job]
    # sabotage: had "no answer" been read as "no job", there would be two
    sabotaged = Toy(tmp_path / "sabotaged")
    file = sabotaged.root / "llamagen_dist/launch/slurm/launch.py"
    text = file.read_text()
    good = "known = queue.my_jobs() if any("
    assert text.count(good) == 1
    file.write_text(text.replace(good, "known = {} if any("))
    sabotaged.folder = toy.folder
    sabotaged.launch("silent", "200 0.1 1000", nodes=1)
    assert len(jobs_of(toy, "silent")) == 2
    queue.cancel(jobs_of(toy, "silent"))
    # where nothing was ever submitted, neither lock nor half of a submission stays behind
    assert "SLURM refused the job" in fresh.stderr
    left = {path.name for folder in ("launch", "log") for path in (toy.run("fresh") / folder).iterdir()}
    assert left == {"config.yaml"}
