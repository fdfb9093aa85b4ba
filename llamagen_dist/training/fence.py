"""Which incarnation of a job may write in a run directory: the one that the lock file names.

SLURM starts a job again elsewhere when it has lost a node, although processes there may live on; it wakes a stopped
process before it kills it; and a smaller job may have taken a run over. Whoever is not named any more must leave alone
what the run has become since then.
"""

import json
import os
import time
from pathlib import Path

from llamagen_dist.errors import Superseded
from llamagen_dist.program import LOCK, OWNER

GONE_PATIENCE_S = 5.0  # a lock is away for no longer than a rename takes, which a network disk may show late
_UNREADABLE = (OSError, ValueError, KeyError, TypeError)


class Fence:
    """One lock file, seen by one incarnation ("JOB.RESTART"); without a lock (outside a cluster's job) all is allowed.

    The file is opened again for every check: that is when a network disk asks its server whether it is still the same
    file. Between a check and the write after it another incarnation may still begin; it starts with seconds of imports,
    and removes what is half-written.
    """

    def __init__(self, lock: Path | None = None, owner: str = "") -> None:
        self._lock, self._owner = lock, owner

    @classmethod
    def of_environment(cls) -> "Fence":
        """From the variables that a cluster's job sets for its ranks; inactive elsewhere."""
        lock, owner = os.environ.get(LOCK), os.environ.get(OWNER)
        return cls(Path(lock), owner) if lock and owner else cls()

    @property
    def active(self) -> bool:
        """Whether there is a lock to look at."""
        return self._lock is not None

    def check(self) -> None:
        """Raises Superseded where the lock names another incarnation, or cannot be read for ``GONE_PATIENCE_S``."""
        deadline = time.monotonic() + GONE_PATIENCE_S
        while self._lock is not None:
            try:
                self._compare(self._lock)
                return
            except _UNREADABLE as error:
                if time.monotonic() > deadline:
                    raise Superseded(
                        f"{self._lock}: cannot be read any more ({error}), so job {self._owner} may have lost this "
                        "run; this process stops and writes nothing more"
                    ) from None
                time.sleep(0.1)

    def lost(self) -> str:
        """``check``'s sentence where the lock names another incarnation, else empty, also where it cannot be read.

        One look that never waits, for a thread that looks often.
        """
        try:
            if self._lock is not None:
                self._compare(self._lock)
        except Superseded as lost:
            return str(lost)
        except _UNREADABLE:
            pass
        return ""

    def _compare(self, lock: Path) -> None:
        owner = json.loads(lock.read_text(encoding="utf-8"))["owner"]
        if owner != self._owner:
            now = f"as job {owner}" if owner else "in a job that has not begun yet"
            raise Superseded(
                f"{lock.parent.parent}: this run continues {now}; this process, of job {self._owner}, stops and "
                "writes nothing more"
            )
