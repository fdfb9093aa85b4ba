"""``llamagen launch --cluster`` on a real SLURM: one job per run, whatever ends it, and no more restarts than help."""

import json
import subprocess
import time
from collections.abc import Callable
from typing import Any

import pytest

from llamagen_dist.launch.folder import JobFolder
from llamagen_dist.launch.slurm import lock, queue
from llamagen_dist.launch.slurm.task import first_host
from tests.slurm.toy import Toy, wait_for


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Toy:
    return Toy(tmp_path_factory.mktemp("toy"))


def ended(toy: Toy, name: str) -> Callable[[], bool]:
    return lambda: toy.last(name)["event"] in ("done", "failed", "handed_over")


def test_the_same_command_attaches_a_signal_costs_no_step_and_the_end_is_known(toy: Toy) -> None:
    first = toy.launch("signal", "40 0.1 100")
    assert first.returncode == 0, first.stderr
    again = toy.launch("signal", "40 0.1 100")
    assert f"job {toy.job('signal')} is" in again.stdout
    assert "attached" in again.stdout
    wait_for(lambda: len(toy.steps("signal")) > 5)
    queue.signal(toy.job("signal"))
    wait_for(lambda: toy.last("signal")["event"] == "requeued")
    follow = toy.launch("signal", "40 0.1 100", "--follow")
    assert follow.returncode == 0, follow.stdout + follow.stderr
    assert toy.steps("signal") == list(range(1, 41))  # none twice, none missed
    kinds = [event["event"] for event in toy.events("signal")]
    assert kinds == ["submitted", "started", "ended", "requeued", "started", "ended", "done"]
    assert len({event["job"] for event in toy.events("signal")}) == 1
    assert "finished" in toy.launch("signal", "40 0.1 100").stdout
    assert len(toy.events("signal")) == len(kinds)
    logs = {path.name for path in (toy.run("signal") / "log").rglob("*_log.out")}
    assert logs == {f"{toy.job('signal')}_{rank}_log.out" for rank in range(4)}


def test_what_goes_wrong_is_restarted_as_often_as_it_helps(toy: Toy) -> None:
    """Four runs at once, since each of them mostly waits."""
    small: dict[str, Any] = {"nodes": 1}
    for name, fault in [("killed", "die=8"), ("cursed", "dies=8"), ("mistake", "refuse=4"), ("nan", "nan=4")]:
        done = toy.launch(name, f"12 0.1 3 {fault}", **small)
        assert done.returncode == 0, done.stderr
    for name in ("killed", "cursed", "mistake", "nan"):
        wait_for(ended(toy, name), 120)

    # kill -9 of a rank: back to the last save, no further, then on to the end
    assert toy.last("killed")["event"] == "done"
    assert toy.steps("killed")[:7] == list(range(1, 8))
    assert toy.steps("killed")[-6:] == list(range(7, 13))
    requeues = [event for event in toy.events("killed") if event["event"] == "requeued"]
    assert [event["fault"] for event in requeues] == [True]

    # the same again at the same step: given up, and said why; once mended, the same command goes on
    assert toy.last("cursed")["event"] == "failed"
    end = json.loads((toy.run("cursed") / "launch/FAILED.json").read_text())
    assert "no progress in 2 restarts" in end["reason"]
    wait_for(lambda: not queue.my_jobs()[toy.job("cursed")].alive)
    assert queue.my_jobs()[toy.job("cursed")].state == "FAILED"
    mended = toy.launch("cursed", "12 0.1 3", **small)
    assert "failed (no progress" in mended.stdout
    wait_for(ended(toy, "cursed"))
    assert toy.last("cursed")["event"] == "done"
    assert toy.steps("cursed")[-6:] == list(range(7, 13))

    # what would only happen again is not tried again
    for name, reason in [("mistake", "rank 0: toy.yaml: step is nonsense"), ("nan", "not finite")]:
        assert [event["event"] for event in toy.events(name)] == ["submitted", "started", "ended", "failed"]
        assert reason in toy.last(name)["reason"]


def test_a_stop_before_the_program_listens_is_no_fault(toy: Toy) -> None:
    toy.launch("deaf", "5 0.1 1 deaf=4", nodes=1)
    wait_for(lambda: toy.last("deaf")["event"] == "started")
    time.sleep(2.0)  # in Python, not listening yet
    queue.signal(toy.job("deaf"))
    wait_for(ended(toy, "deaf"))
    requeues = [event for event in toy.events("deaf") if event["event"] == "requeued"]
    assert [event["fault"] for event in requeues] == [False]
    assert toy.steps("deaf") == [1, 2, 3, 4, 5]


def test_a_cancelled_run_stays_cancelled_until_it_is_launched_again(toy: Toy) -> None:
    toy.launch("cancelled", "20 0.1 100", nodes=1)
    wait_for(lambda: len(toy.steps("cancelled")) > 3)
    first = toy.job("cancelled")
    queue.cancel([first])
    wait_for(lambda: not queue.my_jobs()[first].alive)
    assert queue.my_jobs()[first].state == "CANCELLED"
    again = toy.launch("cancelled", "20 0.1 100", nodes=1)
    assert "job" in again.stdout
    assert toy.job("cancelled") != first
    wait_for(ended(toy, "cancelled"))
    assert toy.steps("cancelled") == list(range(1, 21))  # it had saved when it was cancelled


def test_a_job_whose_folder_belongs_to_another_launch_touches_nothing(toy: Toy) -> None:
    toy.launch("late", "3 0.1 1", nodes=1, sbatch={"hold": True})
    late, place = toy.job("late"), JobFolder.of(toy.run("late"))
    held = lock.read(place)
    assert held is not None
    lock.take(place, "another", held)  # as a second launch would, had it found the first one over
    subprocess.run(["scontrol", "release", late], check=True)
    wait_for(lambda: not queue.my_jobs()[late].alive)
    assert queue.my_jobs()[late].state == "FAILED"
    assert toy.steps("late") == []
    assert lock.owner(place) is None
    # sabotage: with the lock its own, that very job would have counted
    lock.take(place, held.token, lock.read(place))
    assert subprocess.run(["scontrol", "requeue", late], check=False).returncode == 0
    wait_for(ended(toy, "late"))
    assert toy.steps("late") == [1, 2, 3]


@pytest.mark.parametrize("nodelist", ["n[1-4]", "n[03-05,9],m1", "gpu-a[001,004-006]", "rack[2-3]n[1-4]", "a,b[1-2]"])
def test_the_first_host_is_slurms_first(nodelist: str) -> None:
    hosts = subprocess.run(["scontrol", "show", "hostnames", nodelist], capture_output=True, text=True, check=True)
    assert first_host(nodelist) == hosts.stdout.split()[0]
