"""The state of a job's folder, as its files and SLURM's queue say: the one answer that everything here asks for."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from llamagen_dist.errors import UserError
from llamagen_dist.launch.folder import JobFolder
from llamagen_dist.launch.slurm import elastic, queue
from llamagen_dist.launch.slurm import lock as locks
from llamagen_dist.launch.slurm.lock import Lock
from llamagen_dist.launch.slurm.queue import QueuedJob


@dataclass(frozen=True)
class JobState:
    """waiting, running: in SLURM's queue; ending too, or never to start. open: all else that may be launched. unknown:
    SLURM does not say.

    job: the one that runs, waits, or ran last, with what squeue says of it; lock: the launch that it belongs to.
    """

    kind: Literal["open", "submitting", "waiting", "running", "finished", "failed", "unknown"]
    reason: str = ""
    job: str | None = None
    queued: QueuedJob | None = None
    lock: Lock | None = None

    @property
    def live(self) -> bool:
        """Whether a job runs, waits, or is just ending."""
        return self.kind in ("waiting", "running")

    @property
    def leaving(self) -> bool:
        """Whether its job will be gone in a moment."""
        job = self.queued
        return job is not None and job.alive and (job.state == "COMPLETING" or job.reason == "DependencyNeverSatisfied")


def state_of(folder: JobFolder, jobs: Mapping[str, QueuedJob] | None) -> JobState:
    """jobs: ``queue.my_jobs()``; empty where no cluster is to be asked, None where it gave no answer."""
    lock = locks.read(folder)
    first = lock.jobs[0] if lock is not None and lock.jobs else None
    if folder.is_done():
        return JobState("finished", job=first, lock=lock)
    if jobs is None:
        return JobState("unknown", job=first, lock=lock)
    ours = [] if lock is None else locks.jobs_of(lock, jobs)
    idle = [] if lock is None else elastic.left_over(folder, lock, jobs)
    alive = sorted((j for j in ours if j.alive and j.job not in idle), key=lambda j: (j.state != "RUNNING", j.job))
    if lock is not None and not lock.jobs and locks.submitting(folder, lock, bool(alive)):
        return JobState("submitting", lock=lock)
    if alive:
        kind: Literal["waiting", "running"] = "waiting" if alive[0].state == "PENDING" else "running"
        return JobState(kind, f"job {alive[0].job}", alive[0].job, alive[0], lock)
    failed = folder.read(folder.failed)
    if failed is not None:
        return JobState("failed", str(failed.get("reason", "")), first, None, lock)
    return JobState("open", "", first, next(iter(ours), None), lock)


def nothing_runs(folders: Sequence[Path]) -> None:
    """Before a launch on this machine: raises UserError where a cluster's job runs or waits in one of the folders."""
    locked = [job for job in map(JobFolder.of, folders) if job.lock.exists()]
    try:
        jobs = queue.my_jobs() if locked else {}
    except UserError as error:
        raise UserError(
            f"{locked[0].folder} was launched on a cluster, and whether its job still runs cannot be asked ({error}); "
            f"if it does not, delete {locked[0].lock}"
        ) from None
    for job in locked:
        state = state_of(job, jobs)
        if state.live or state.kind == "submitting":
            raise UserError(
                f"{job.folder}: job {state.job or '(just submitted)'} runs there; wait for it, or scancel it"
            )
