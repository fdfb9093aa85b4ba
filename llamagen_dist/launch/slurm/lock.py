"""One launch per folder: a lock file with the job's id, checked against SLURM's queue. flock is not to be trusted on
network disks; making a file that must not exist, and renaming, are.

lock.json is written only by the launch that holds it (``token``); owner.json only by the batch script of the job that
runs. Ranks compare owner.json with their own incarnation before they write what counts.
"""

import getpass
import json
import os
import platform
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from llamagen_dist.files import json_if_there, seconds_old, sync_folder, write_text
from llamagen_dist.launch.folder import JobFolder
from llamagen_dist.launch.slurm.queue import QueuedJob
from llamagen_dist.process import Identity, identify

SUBMITTING_S = 90.0
"""A launch that holds the lock for so long without a job has died between the two."""


@dataclass(frozen=True)
class Lock:
    token: str
    jobs: tuple[str, ...]
    """Empty while it is being submitted. The first is the wanted one, the others are its smaller stand-bys."""
    user: str
    host: str
    since: float
    item: int | None = None
    """Which item of the submitted array runs in this folder; None: the whole job does."""
    pid: int = 0
    started: str = ""
    """The launch's process, on ``host``."""


class TakenError(Exception):
    """Another launch holds the lock; ``lock`` is what it says."""

    def __init__(self, lock: Lock | None) -> None:
        super().__init__("the lock is taken")
        self.lock = lock


def read(job_folder: JobFolder) -> Lock | None:
    """None where there is none, or none that is whole."""
    data = json_if_there(job_folder.lock)
    try:
        return None if data is None else Lock(**data | {"jobs": tuple(data["jobs"])})
    except (KeyError, TypeError):
        return None


def take(job_folder: JobFolder, token: str, stale: Lock | None = None, item: int | None = None) -> None:
    """Make the lock ours. stale: the lock of a launch that is over, which the caller has made sure of.

    Raises TakenError where somebody else was quicker.
    """
    me = identify()
    mine = Lock(token, (), getpass.getuser(), platform.node(), time.time(), item, me.pid, me.started)
    if stale is None:
        aside = job_folder.lock.with_name(f".lock.{token}")
        write_text(aside, _text(mine))
        try:
            os.link(aside, job_folder.lock)  # whole from the first moment, and an error where it exists
        except FileExistsError:
            raise TakenError(read(job_folder)) from None
        finally:
            aside.unlink(missing_ok=True)
        sync_folder(job_folder.path)
        return
    claim(job_folder, stale)
    write_text(job_folder.lock, _text(mine))


def name_jobs(job_folder: JobFolder, token: str, jobs: tuple[str, ...]) -> None:
    """Say which jobs run under the lock that ``token`` holds."""
    lock = read(job_folder)
    if lock is not None and lock.token == token:
        write_text(job_folder.lock, _text(replace(lock, jobs=jobs)))


def name_submitted(job_folder: JobFolder, token: str, job: str, **facts: Any) -> None:
    """Write down that a job was submitted. The event comes first: how a run has ended is read from what comes last."""
    job_folder.tell("submitted", job=job, restart=0, token=token, **facts)
    name_jobs(job_folder, token, (job,))


def adopt(job_folder: JobFolder, stale: Lock, job: str) -> None:
    """Name the job of a launch that was killed between sbatch and the lock. Raises TakenError where another does so at
    this moment."""
    claim(job_folder, stale, "adopt")
    name_submitted(job_folder, stale.token, job)


def release(job_folder: JobFolder, token: str) -> None:
    """Give the lock back where nothing was submitted under it."""
    lock = read(job_folder)
    if lock is not None and lock.token == token and not lock.jobs:
        job_folder.lock.unlink(missing_ok=True)


def jobs_of(lock: Lock, known: Mapping[str, QueuedJob]) -> list[QueuedJob]:
    """What SLURM knows of the jobs under a lock: those it names; before it names any, those that carry its token."""
    if lock.jobs:
        return [known[job] for job in lock.jobs if job in known]
    # of an array only this folder's own item: its siblings say nothing about it
    item = "" if lock.item is None else f"_{lock.item}"
    return [job for job in known.values() if job.comment == lock.token and job.job.endswith(item)]


def submitting(job_folder: JobFolder, lock: Lock, submitted: bool) -> bool:
    """Whether the launch that holds the lock, which names no job yet, is still at it.

    submitted: SLURM has its job. Then it is over when its process is; until then a child of a killed launch may still
    be talking to SLURM, and only time tells.
    """
    mine = lock.host == platform.node() and lock.pid != 0
    if submitted and mine and not Identity(lock.pid, lock.started).alive():
        return False
    try:
        age = seconds_old(job_folder.lock) if job_folder.lock.exists() else 0.0  # by the clock of its disk
    except OSError:  # a folder that may only be read: by this host's clock
        age = time.time() - job_folder.lock.stat().st_mtime
    return age < SUBMITTING_S


def own(job_folder: JobFolder, owner: str, **facts: object) -> None:
    """From now on the incarnation ``owner`` (JOB.RESTART) is the one that may write in the folder."""
    write_text(job_folder.owner, json.dumps({"owner": owner, "since": time.time(), **facts}))


def owner(job_folder: JobFolder) -> str | None:
    data = json_if_there(job_folder.owner)
    return None if data is None else str(data["owner"])


def last_job(job_folder: JobFolder) -> str | None:
    """The job of the incarnation that owns the folder, or owned it last."""
    return (owner(job_folder) or "").partition(".")[0] or None


def claim(job_folder: JobFolder, stale: Lock, what: str = "claim") -> None:
    """Of all that want to follow this very lock one may; a claim whose maker died is passed over after a while.

    what: the name of the claim; "adopt": not to follow it, but to name the job that its launch has left. Raises
    TakenError.
    """
    for number in range(100):
        claim = job_folder.path / f"{what}-{stale.token}-{number}"
        try:
            os.close(os.open(claim, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
        except FileExistsError:
            now = read(job_folder)
            if now is None or now.token != stale.token:
                raise TakenError(now) from None
            if seconds_old(claim) < SUBMITTING_S:
                raise TakenError(None) from None
            continue
        now = read(job_folder)
        if now is None or now.token != stale.token:  # it had been followed already
            raise TakenError(now)
        return
    raise TakenError(None)


def _text(lock: Lock) -> str:
    return json.dumps(asdict(lock), indent=1)
