"""slurm/plain.sbatch: the same programs without submitit, restarted by a few lines of shell."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from llamagen_dist.launch.slurm import queue
from tests.runs.checkout import ROOT, checkout
from tests.slurm.toy import wait_for


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkout(tmp_path_factory.mktemp("plain") / "checkout", "runs/toy_program.py", "runs/toy_run.py")


def submit(root: Path, *program: object, script: Path = ROOT / "slurm/plain.sbatch", **environment: str) -> str:
    """The job's id."""
    site = ["--nodes=2", "--ntasks-per-node=2", "--gpus-per-node=0", "--cpus-per-task=1", "--time=10"]
    done = subprocess.run(
        ["sbatch", "--parsable", *site, str(script), "tokenizer_training.toy_program", *map(str, program)],
        cwd=root,
        env={**os.environ, "PYTHON": sys.executable, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def ended(job: str) -> str:
    """Its last state."""
    wait_for(lambda: not queue.my_jobs()[job].alive, 90)
    return queue.my_jobs()[job].state


def output(root: Path, job: str) -> str:
    file = root / f"llamagen-{job}.out"
    return file.read_text() if file.exists() else ""


def count(root: Path, job: str) -> int:
    """Lines about counting: every rank writes one when it begins, by then listening to signals, and one at its end."""
    return output(root, job).count("counting")


def ranks(job: str) -> list[int]:
    """Processes of the job's ranks on this machine."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            environment = (folder / "environ").read_bytes()
            words = (folder / "cmdline").read_bytes()
        except OSError:
            continue
        if f"SLURM_JOB_ID={job}\0".encode() in environment and b"slurm.task\0" in words and b"srun" not in words:
            found.append(int(folder.name))
    return found


def test_a_signal_and_a_killed_rank_are_gone_on_from_and_the_end_is_the_end(root: Path, tmp_path: Path) -> None:
    job = submit(root, "work", tmp_path, 60, 0.1)
    wait_for(lambda: count(root, job) >= 4)
    queue.signal(job)
    wait_for(lambda: (tmp_path / "steps_0.txt").exists())
    before = len((tmp_path / "steps_0.txt").read_text().split())
    assert 0 < before < 60
    wait_for(lambda: count(root, job) >= 12 and len(ranks(job)) == 4, 60)
    os.kill(ranks(job)[0], signal.SIGKILL)
    assert ended(job) == "COMPLETED"
    assert (root / f".plain-{job}").exists() is False
    for rank in range(4):
        assert (tmp_path / f"steps_{rank}.txt").read_text().split() == [str(n) for n in range(60)]


def test_a_mistake_is_not_tried_again_and_faults_are_counted(root: Path, tmp_path: Path) -> None:
    mistake = submit(root, "refuse", tmp_path, 1)
    fatal = submit(root, "die", tmp_path, 1, RESTARTS="1")
    assert (ended(mistake), ended(fatal)) == ("FAILED", "FAILED")
    assert output(root, mistake).count("rank 1 was given nonsense") == 1
    assert output(root, fatal).count("about to die") == 2
    assert "1 restarts used up" in output(root, fatal)


def test_without_the_requeue_a_signal_would_be_the_end(root: Path, tmp_path: Path) -> None:
    broken = tmp_path / "plain.sbatch"
    text = (ROOT / "slurm/plain.sbatch").read_text()
    assert text.count("\nscontrol requeue") == 1
    broken.write_text(text.replace("\nscontrol requeue", "\ntrue"))
    job = submit(root, "work", tmp_path, 60, 0.1, script=broken)
    wait_for(lambda: count(root, job) >= 4)
    queue.signal(job)
    ended(job)
    assert len((tmp_path / "steps_0.txt").read_text().split()) < 60
