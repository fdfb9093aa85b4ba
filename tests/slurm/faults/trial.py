"""One run in one folder on the cluster: launched through the command line, watched from outside, waited for."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import yaml

from llamagen_dist.launch.folder import JobFolder
from tests.slurm.faults.programs import Program
from tests.slurm.local_cluster import ROOT

PATIENCE_S = 600.0
T = TypeVar("T")


class TooLateError(Exception):
    """Something that had to happen did not, in its time."""


@dataclass(frozen=True)
class Step:
    """One step that rank 0 has done: when, as which JOB.RESTART, and its number (from 1)."""

    time: float
    owner: str
    number: int


@dataclass
class Trial:
    """The run of ``program`` in ``folder`` under a profile of its own.

    profile: laid over slurm/local.yaml. settings: ``key=value`` words for the config. pace_s: what
    a step takes longer, before the first restart.
    """

    program: Program
    config: Path
    checkout: Path
    folder: Path
    profile: dict[str, Any] = field(default_factory=dict)
    settings: tuple[str, ...] = ()
    pace_s: float = 0.1
    fault_at: float | None = None
    """When the fault came (Unix time); set by the injection."""
    remarks: str = ""
    """Of the injection, for the table."""

    def __post_init__(self) -> None:
        self._steps = self.folder.with_name(self.folder.name + "-steps.txt")
        self._profile = self.folder.with_name(self.folder.name + "-profile.yaml")
        exports = {"LLAMAGEN_TEST_STEPS": str(self._steps), "LLAMAGEN_TEST_PACE_S": str(self.pace_s)}
        own = {"base": str(ROOT / "slurm/local.yaml"), "exclusive": True, "exports": exports, **self.profile}
        self.folder.parent.mkdir(parents=True, exist_ok=True)
        self._profile.write_text(yaml.safe_dump(own))

    @property
    def words(self) -> list[str]:
        """The command, which is also how the run goes on."""
        config = [str(self.config), f"run_dir={self.folder}", *self.settings]
        launch = ["launch", self.program.module, *config, "--cluster", str(self._profile)]
        return [sys.executable, "-m", "llamagen_dist.cli", *launch]

    def start(self) -> "subprocess.Popen[str]":
        """One launch, under way."""
        return subprocess.Popen(
            self.words,
            cwd=self.checkout,
            env={**os.environ, "PYTHONPATH": str(self.checkout), "PYTHONDONTWRITEBYTECODE": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def launch(self) -> str:
        """One launch to its end, which is when the job is with SLURM; returns what it said. Raises AssertionError."""
        process = self.start()
        out, err = process.communicate(timeout=PATIENCE_S)
        assert process.returncode == 0, f"{out}\n{err}"
        return out

    # --- what goes on ---

    @property
    def place(self) -> JobFolder:
        return JobFolder.of(self.folder)

    def events(self, *names: str) -> list[dict[str, Any]]:
        return [event for event in self.place.events() if not names or event["event"] in names]

    @property
    def job(self) -> str:
        """The job that runs the folder now, or did last."""
        return str(self.events("started")[-1]["job"])

    @property
    def owner(self) -> str:
        """JOB.RESTART of whoever runs the folder now, or did last."""
        started = self.events("started")[-1]
        return f"{started['job']}.{started['restart']}"

    def steps(self) -> list[Step]:
        """All steps that were ever done, redone ones too, in order."""
        if not self._steps.exists():
            return []
        lines = [line.split() for line in self._steps.read_text().splitlines()]
        return [Step(float(words[0]), words[1], int(words[2])) for words in lines if len(words) == 3]

    def at_step(self, number: int) -> int:
        """Wait until the run has done so many steps; returns how many it had done then."""

        def reached() -> int | None:
            if self.ended():
                raise TooLateError(f"the run ended before step {number}: {self.events()[-1]}")
            steps = self.steps()
            return steps[-1].number if steps and steps[-1].number >= number else None

        return wait_for(reached, f"step {number} of {self.folder.name}")

    def goes_on(self, before: str) -> Step:
        """Wait for the first step of an incarnation after ``before`` (JOB.RESTART)."""

        def found() -> Step | None:
            owners = list(dict.fromkeys(step.owner for step in self.steps()))
            later = owners[owners.index(before) + 1 :] if before in owners else owners
            if not later and self.ended():
                raise TooLateError(f"the run ended without going on after {before}: {self.events()[-1]}")
            return next((step for step in self.steps() if step.owner in later), None)

        return wait_for(found, f"{self.folder.name} going on after {before}")

    def ended(self) -> str | None:
        """ "done", the reason of failure, or None while somebody goes on."""
        if self.events("done"):
            return "done"
        end = self.place.read(self.place.failed)
        return None if end is None else str(end.get("reason", end))

    def finish(self, patience_s: float = PATIENCE_S) -> str:
        """Wait for ``ended``."""
        return wait_for(self.ended, f"the end of {self.folder.name}", patience_s)

    def log(self) -> str:
        """Rank 0's output over all jobs and incarnations."""
        files = sorted(self.folder.glob("log/*/*_0_log.out"), key=lambda file: file.stat().st_mtime)
        return "".join(file.read_text(errors="replace") for file in files)

    def resumed(self) -> list[int]:
        """The steps that were gone on from."""
        return [int(step) for step in re.findall(r"resumed from .* \(step (\d+)\)", self.log())]

    def pids(self) -> dict[int, int]:
        """rank -> process of the job step that runs now."""
        found, job = {}, self.job
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                words = (folder / "environ").read_bytes().split(b"\0")
                status = (folder / "status").read_text()
            except OSError:
                continue
            told = dict(word.decode(errors="replace").partition("=")[::2] for word in words)
            if told.get("SLURM_JOB_ID") != job or "SLURM_STEP_ID" not in told or "\nState:\tZ" in status:
                continue
            parent = re.search(r"^PPid:\s+(\d+)", status, re.MULTILINE)
            if parent and _command(int(parent[1])) == "slurmstepd":
                found[int(told["SLURM_PROCID"])] = int(folder.name)
        return found

    def kill(self, rank: int, number: signal.Signals = signal.SIGKILL) -> None:
        pid = self.pids()[rank]
        self.fault_at = time.time()
        os.kill(pid, number)

    def nodes(self) -> list[str]:
        where = slurm("squeue", "-h", "-j", self.job, "-o", "%N").strip()
        return slurm("scontrol", "show", "hostnames", where).split()

    def metrics(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.folder / "metrics.jsonl").read_text().splitlines()]


def _command(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/comm").read_text().strip()
    except OSError:
        return ""


def slurm(*words: str) -> str:
    """stdout of one of SLURM's commands. Raises RuntimeError where it fails."""
    done = subprocess.run(words, capture_output=True, text=True, timeout=60, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(words)}: {done.stderr.strip()}")
    return done.stdout


def wait_for(what: Callable[[], T | None], name: str, patience_s: float = PATIENCE_S, poll_s: float = 0.1) -> T:
    """The first truthy answer. Raises TooLateError."""
    deadline = time.monotonic() + patience_s
    while True:
        found = what()
        if found:
            return found
        if time.monotonic() > deadline:
            raise TooLateError(f"{name}: not within {patience_s:.0f} s")
        time.sleep(poll_s)
