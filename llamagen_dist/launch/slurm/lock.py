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
from dataclasses import asdict, dataclass

from llamagen_dist.files import seconds_old, sync_folder, write_text
from llamagen_dist.launch.slurm.records import Place, read_json

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


class TakenError(Exception):
    """Another launch holds the lock; ``lock`` is what it says."""

    def __init__(self, lock: Lock | None) -> None:
        super().__init__("the lock is taken")
        self.lock = lock


def read(place: Place) -> Lock | None:
    data = read_json(place.lock)
    return None if data is None else Lock(**data | {"jobs": tuple(data["jobs"])})


def take(place: Place, token: str, stale: Lock | None = None) -> None:
    """Make the lock ours. stale: the lock of a launch that is over, which the caller has made sure of.

    Raises TakenError where somebody else was quicker.
    """
    mine = Lock(token, (), getpass.getuser(), platform.node(), time.time())
    if stale is None:
        aside = place.lock.with_name(f".lock.{token}")
        write_text(aside, _text(mine))
        try:
            os.link(aside, place.lock)  # whole from the first moment, and an error where it exists
        except FileExistsError:
            raise TakenError(read(place)) from None
        finally:
            aside.unlink(missing_ok=True)
        sync_folder(place.path)
        return
    _claim(place, stale)
    write_text(place.lock, _text(mine))


def name_jobs(place: Place, token: str, jobs: tuple[str, ...]) -> None:
    """Say which jobs run under the lock that ``token`` holds."""
    lock = read(place)
    if lock is not None and lock.token == token:
        write_text(place.lock, _text(Lock(token, jobs, lock.user, lock.host, lock.since)))


def release(place: Place, token: str) -> None:
    """Give the lock back where nothing was submitted under it."""
    lock = read(place)
    if lock is not None and lock.token == token and not lock.jobs:
        place.lock.unlink(missing_ok=True)


def age(place: Place) -> float:
    """Seconds since the lock was last written; 0 where there is none."""
    return seconds_old(place.lock) if place.lock.exists() else 0.0


def own(place: Place, owner: str, **facts: object) -> None:
    """From now on the incarnation ``owner`` (JOB.RESTART) is the one that may write in the folder."""
    write_text(place.owner, json.dumps({"owner": owner, "since": time.time(), **facts}))


def owner(place: Place) -> str | None:
    data = read_json(place.owner)
    return None if data is None else str(data["owner"])


def _claim(place: Place, stale: Lock) -> None:
    """Of all that want to follow this very lock one may; a claim whose maker died is passed over after a while."""
    for number in range(100):
        claim = place.path / f"claim-{stale.token}-{number}"
        try:
            os.close(os.open(claim, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
        except FileExistsError:
            now = read(place)
            if now is None or now.token != stale.token:
                raise TakenError(now) from None
            if seconds_old(claim) < SUBMITTING_S:
                raise TakenError(None) from None
            continue
        now = read(place)
        if now is None or now.token != stale.token:  # it had been followed already
            raise TakenError(now)
        return
    raise TakenError(None)


def _text(lock: Lock) -> str:
    return json.dumps(asdict(lock), indent=1)
