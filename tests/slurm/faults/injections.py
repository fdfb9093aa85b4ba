"""The twelve faults. Each waits until its run is in the middle, does the harm, and returns when the run goes on."""

import os
import signal
import subprocess
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llamagen_dist.checkpoint.folder import complete
from tests.slurm import local_cluster
from tests.slurm.faults.programs import SAVE_EVERY, STEPS
from tests.slurm.faults.trial import PATIENCE_S, TooLateError, Trial, slurm, wait_for

BESIDE = 3  # steps that are done while a checkpoint is being written
MIDDLE = STEPS // 3 + SAVE_EVERY // 2  # between two saves
# Nodes: faults that need certain ones free have them to themselves; one of the others is a spare.
NODES, COMMON, ELASTIC = 10, "n[1-7]", "n[8-10]"


def time_limit(trial: Trial) -> None:
    """SLURM's own signal before the end of a two-minute slice: it looks twice a minute, so after 60 to 90 s."""
    trial.at_step(1)
    first = trial.owner
    trial.goes_on(first)
    trial.fault_at = [step for step in trial.steps() if step.owner == first][-1].time


def preemption(trial: Trial) -> None:
    """A job of a higher partition takes both nodes."""
    trial.at_step(MIDDLE)
    before, nodes = trial.owner, trial.nodes()
    trial.fault_at = time.time()
    words = [
        "sbatch",
        "-p",
        "urgent",
        "-N2",
        "-w",
        ",".join(nodes),
        "--exclusive",
        "-o",
        "/dev/null",
        "--wrap",
        "sleep 3",
    ]
    job = slurm(*words).split()[-1]
    try:
        trial.goes_on(before)
    finally:
        slurm("scancel", "--quiet", job)


def usr2(trial: Trial) -> None:
    trial.at_step(MIDDLE)
    before = trial.owner
    trial.fault_at = time.time()
    slurm("scancel", "--signal=USR2", trial.job)
    trial.goes_on(before)


def scontrol_requeue(trial: Trial) -> None:
    trial.at_step(MIDDLE)
    before = trial.owner
    trial.fault_at = time.time()
    slurm("scontrol", "requeue", trial.job)
    trial.goes_on(before)


def kill_rank(trial: Trial) -> None:
    trial.at_step(MIDDLE)
    before = trial.owner
    trial.kill(1)
    trial.goes_on(before)


def node_failure(trial: Trial) -> None:
    """Of the tokenizer's nodes the first fails, which holds the batch script too; of the GPT's the second."""
    trial.at_step(MIDDLE)
    before, nodes = trial.owner, trial.nodes()
    victim = nodes[1 if trial.program.name == "gpt" else 0]
    trial.fault_at = time.time()
    local_cluster.call("node-down", victim)
    try:
        trial.goes_on(before)
    finally:
        local_cluster.call("node-up", victim)


@dataclass(frozen=True)
class Point:
    """A moment in the writing of a checkpoint, told by the names in its folder."""

    name: str
    now: Callable[[set[str]], bool]


POINTS = (
    Point("files begun", lambda names: not any(n.startswith("report-") for n in names)),
    Point("a rank has reported", lambda names: any(n.startswith("report-") for n in names)),
    Point("all but COMPLETE", lambda names: "index.json" in names or "state.json" in names),
)


def kill_in_save(trial: Trial) -> None:
    """All ranks die (rank 0 first) at each of the POINTS, in one run one after the other, with a save between."""
    hit: list[str] = []
    for point in POINTS:
        saved = complete(trial.folder)[-1:]
        wait_for(lambda saved=saved: complete(trial.folder)[-1:] not in ([], saved), "the next save")  # type: ignore[misc]
        before = trial.owner
        pids = [pid for _, pid in sorted(trial.pids().items())]
        left = _kill_at(trial, point, pids)
        hit.append(f"{point.name}: {left}")
        trial.goes_on(before)
    trial.remarks = "; ".join(hit)


def _kill_at(trial: Trial, point: Point, pids: list[int]) -> str:
    folder, deadline = trial.folder / "checkpoints", time.monotonic() + PATIENCE_S
    while time.monotonic() < deadline:
        if trial.steps()[-1].number % SAVE_EVERY not in (SAVE_EVERY - 1, 0):
            time.sleep(0.02)
            continue
        for _ in range(100):  # without a pause: a small checkpoint is written in milliseconds
            for name in os.listdir(folder):
                try:
                    names = set(os.listdir(folder / name))
                except FileNotFoundError:
                    continue
                if "COMPLETE" not in names and point.now(names):
                    for pid in pids:
                        os.kill(pid, signal.SIGKILL)
                    trial.fault_at = time.time()
                    return "half written" if not (folder / name / "COMPLETE").exists() else "just written"
    raise TooLateError(f"no save of {trial.folder.name} was seen at the point {point.name!r}")


def corrupted(trial: Trial) -> None:
    """The newest checkpoint loses a bit while nobody runs."""
    trial.at_step(MIDDLE)
    before = trial.owner
    trial.kill(1)
    wait_for(lambda: not trial.pids(), "the end of all ranks", 60)
    newest = complete(trial.folder)[-1]
    file = sorted(newest.glob("weights-*.safetensors"))[0]
    data = bytearray(file.read_bytes())
    data[-5] ^= 1
    file.write_bytes(data)
    trial.goes_on(before)
    assert f"checkpoint skipped: {file}" in trial.log(), "the damaged checkpoint was not noticed"


def disk_full(trial: Trial) -> None:
    """The run's checkpoints lie on a small disk that fills up: the run fails with a sentence, and the same command goes
    on once there is room."""
    trial.at_step(SAVE_EVERY + 1)
    before, folder = trial.owner, trial.folder / "checkpoints"
    newest = wait_for(lambda: complete(trial.folder)[-1:], "a first checkpoint")[0]
    size = sum(file.stat().st_size for file in newest.iterdir())
    status = os.statvfs(folder)
    filler = trial.folder / "checkpoints" / "filler"
    filler.write_bytes(bytes(max(status.f_bavail * status.f_frsize - size // 2, 0)))
    trial.fault_at = time.time()
    reason = trial.finish()
    assert "No space left on device" in reason, reason
    assert "is intact at" in reason, reason
    filler.unlink()
    trial.launch()
    trial.goes_on(before)


def fewer_nodes(trial: Trial) -> None:
    """Of three nodes two are drained, so the run goes on with one; then they come back and it grows again."""
    trial.at_step(MIDDLE)
    before, (kept, lost) = trial.owner, trial.nodes()
    spare = (set(slurm("scontrol", "show", "hostnames", ELASTIC).split()) - {kept, lost}).pop()
    drained = f"{lost},{spare}"
    trial.fault_at = time.time()
    slurm("scontrol", "update", f"NodeName={drained}", "State=DRAIN", "Reason=test")
    try:
        slurm("scancel", "--signal=USR2", trial.job)
        small = trial.goes_on(before)
        trial.at_step(min(small.number + 8, STEPS - 20))
        assert len(trial.pids()) == 2, "it goes on with one node of two ranks"
    finally:
        slurm("scontrol", "update", f"NodeName={drained}", "State=RESUME")
    trial.goes_on(small.owner)
    assert len(trial.pids()) == 4, "it has grown again"


def hung_rank(trial: Trial) -> None:
    trial.at_step(MIDDLE)
    before = trial.owner
    trial.kill(2, signal.SIGSTOP)
    trial.goes_on(before)


def two_launches(trial: Trial) -> None:
    """Two people give the same command at once, and a third a little later."""
    processes = [trial.start() for _ in range(2)]
    answers = [process.communicate(timeout=120) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], answers
    trial.at_step(MIDDLE)
    trial.launch()
    jobs = {event["job"] for event in trial.events("submitted")}
    assert len(jobs) == 1, f"{len(jobs)} jobs for one run: {jobs}"


@dataclass(frozen=True)
class Fault:
    number: int
    name: str
    inject: Callable[[Trial], None]
    most: int
    """Steps that a restart may do again."""
    profile: Mapping[str, Any] = field(default_factory=dict)
    pace_s: float = 0.1
    tolerance: float = 0.0
    launches: bool = True
    """Whether the run is launched before the injection."""
    small_disk: bool = False
    alone: bool = False
    """Not for two programs at a time: they would take each other's nodes."""


FAULTS = (
    Fault(1, "time limit", time_limit, 0, {"time": "2", "signal_delay_s": 30, "max_stuck": 4}, pace_s=0.8),
    Fault(2, "preemption", preemption, 0),
    Fault(3, "scancel --signal=USR2", usr2, 0),
    Fault(4, "scontrol requeue", scontrol_requeue, SAVE_EVERY),
    Fault(5, "kill -9 of a rank", kill_rank, SAVE_EVERY),
    Fault(6, "node down", node_failure, SAVE_EVERY),
    Fault(7, "kill during a save", kill_in_save, SAVE_EVERY + BESIDE),
    Fault(8, "newest checkpoint corrupted", corrupted, 2 * SAVE_EVERY),
    Fault(9, "disk full during a save", disk_full, SAVE_EVERY + BESIDE, small_disk=True),
    Fault(
        10,
        "half of the nodes",
        fewer_nodes,
        0,
        {"elastic": {"nodes": [1], "after_minutes": 0.2}, "sbatch": {"exclude": COMMON}},
        tolerance=1e-5,
        alone=True,
    ),
    Fault(11, "hung rank", hung_rank, SAVE_EVERY),
    Fault(12, "two launches at once", two_launches, 0, launches=False),
)


class SmallDisk:
    """A tmpfs of so many bytes at ``folder``, for as long as the block lasts."""

    def __init__(self, folder: Path, size: int) -> None:
        self._folder, self._size = folder, size

    def __enter__(self) -> None:
        self._folder.mkdir(parents=True)
        self._folder.parent.chmod(0o700)
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={self._size}", "tmpfs", str(self._folder)], check=True)

    def __exit__(self, *_: object) -> None:
        subprocess.run(["umount", "-l", str(self._folder)], check=True)
