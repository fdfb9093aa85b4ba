"""Going on with fewer nodes and growing again, on the real cluster. Fault 10 of tests/slurm/faults does the same with
training and compares the losses; here a program counts, so that every turn of the jobs can be looked at."""

import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from llamagen_dist.launch.folder import JobFolder
from llamagen_dist.launch.slurm import lock, queue
from tests.slurm.toy import Toy, wait_for

ELASTIC: dict[str, Any] = {"elastic": {"nodes": [1], "after_minutes": 0.1}}


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Toy:
    return Toy(tmp_path_factory.mktemp("elastic"))


@pytest.fixture(autouse=True)
def whole_cluster() -> Iterator[None]:
    """No test may leave a node drained or a job behind for the next one."""
    yield
    subprocess.run(["scancel", "-u", "root"], check=True)
    wait_for(lambda: not any(job.alive for job in queue.my_jobs().values()))
    for node in ("n2", "n4"):
        subprocess.run(["scontrol", "update", f"NodeName={node}", "State=RESUME"], check=False, capture_output=True)


def drain(node: str) -> None:
    subprocess.run(["scontrol", "update", f"NodeName={node}", "State=DRAIN", "Reason=test"], check=True)


def resume(node: str) -> None:
    subprocess.run(["scontrol", "update", f"NodeName={node}", "State=RESUME"], check=True)


def jobs(toy: Toy, name: str) -> tuple[str, ...]:
    held = lock.read(JobFolder.of(toy.run(name)))
    return held.jobs if held is not None else ()


def told(toy: Toy, name: str, *kinds: str) -> list[tuple[str, str]]:
    return [(event["event"], event["job"]) for event in toy.events(name) if not kinds or event["event"] in kinds]


def test_a_run_shrinks_when_a_node_goes_and_grows_when_it_is_back(toy: Toy) -> None:
    """Two runs at once: nodes that a job has for itself alone have to be given back, shared ones are left running until
    the larger job is there."""
    names = {"alone": "n4", "shared": "n2"}
    kinds: dict[str, dict[str, Any]] = {"alone": {"exclusive": True, "sbatch": {"exclude": "n[1-2]"}}}
    kinds["shared"] = {"sbatch": {"exclude": "n[3-4]"}}
    for name in names:
        assert toy.launch(name, "160 0.2 1000", **ELASTIC, **kinds[name]).returncode == 0
        assert len(jobs(toy, name)) == 2
    for name in names:
        wait_for(lambda name=name: len(toy.steps(name)) > 40)  # longer than after_minutes: it is held back
        assert [event for event, _ in told(toy, name)] == ["submitted", "stands_by", "started"]
    for name, node in names.items():
        drain(node)
        queue.signal(jobs(toy, name)[0])
    for name, node in names.items():
        wanted, small = jobs(toy, name)
        wait_for(lambda name=name: len(told(toy, name, "started")) == 2)
        assert told(toy, name, "started")[-1] == ("started", small)
        at = len(toy.steps(name))
        wait_for(lambda name=name, at=at: len(toy.steps(name)) > at + 20)
        assert queue.my_jobs()[wanted].state == "PENDING"
        resume(node)
    for name in names:
        wanted, small = jobs(toy, name)
        wait_for(lambda name=name: len(told(toy, name, "started")) == 3)
        assert told(toy, name, "started")[-1] == ("started", wanted)
        assert ("handed_over", small) in told(toy, name)
        wait_for(lambda name=name: toy.last(name)["event"] == "done", 90)
        assert toy.steps(name) == list(range(1, 161))  # a signal each time: no step twice, none missed
        wait_for(lambda small=small: queue.my_jobs()[small].state == "CANCELLED")  # nothing left for it to do
    assert told(toy, "alone", "makes_room") == [("makes_room", jobs(toy, "alone")[1])]
    assert told(toy, "shared", "takes_over") == [("takes_over", jobs(toy, "shared")[0])]


def test_a_cancelled_run_does_not_rise_again_and_its_command_starts_anew(toy: Toy) -> None:
    for name in ("given up", "again"):
        toy.launch(name, "100 0.2 1000", nodes=2, **ELASTIC)
        wait_for(lambda name=name: len(toy.steps(name)) > 3)
        queue.cancel(jobs(toy, name)[:1])
    wanted, small = jobs(toy, "again")
    wait_for(lambda: not queue.my_jobs()[wanted].alive)
    before = len(toy.steps("again"))
    again = toy.launch("again", f"{before + 3} 0.1 1000", nodes=2, **ELASTIC)
    assert "attached" not in again.stdout, "the stand-by of a cancelled run is no run"
    assert wanted not in jobs(toy, "again")
    wait_for(lambda: toy.last("again")["event"] == "done")
    assert queue.my_jobs()[small].state == "CANCELLED"
    wait_for(lambda: ("gave_up", jobs(toy, "given up")[1]) in told(toy, "given up"), 40)
    assert len(told(toy, "given up", "started")) == 1


def test_without_the_keeper_a_stand_by_begins_beside_the_run_and_steps_back(toy: Toy, tmp_path: Path) -> None:
    """Sabotage of the first test: a keeper that pushes nothing. Then the stand-by's own look at the queue must do."""
    broken = Toy(tmp_path)
    keeper = broken.root / "llamagen_dist/launch/slurm/elastic.py"
    text = keeper.read_text()
    good = "_ask(functools.partial(queue.delay_start, other, seconds))"
    assert text.count(good) == 1
    keeper.write_text(text.replace(good, "pass"))
    broken.launch("deaf", "90 0.2 1000", **ELASTIC)
    wait_for(lambda: ("waits", jobs(broken, "deaf")[1]) in told(broken, "deaf"), 40)
    wait_for(lambda: broken.last("deaf")["event"] == "done")
    assert len(told(broken, "deaf", "started")) == 1
    assert broken.steps("deaf") == list(range(1, 91))
    assert told(toy, "shared", "waits") == []


def test_sizes_that_cannot_share_the_batch_are_refused_before_anything_is_submitted(toy: Toy) -> None:
    done = toy.launch("odd", "5 0.1 1", "train.global_batch=8", "train.images=800", nodes=4, elastic={"nodes": [3]})
    assert done.returncode == 2
    assert "elastic.nodes: 3: train.global_batch: 8 images cannot be shared equally by 6" in done.stderr
    assert not toy.run("odd").exists()
