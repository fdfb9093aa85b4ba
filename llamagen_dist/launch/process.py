"""Which process is which (a pid alone is reused), and one launcher per folder."""

import errno
import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from llamagen_dist.config import UserError

UNLOCKABLE = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS)  # what network disks without locks say


@dataclass(frozen=True)
class Identity:
    """A process: its pid and when it started (kernel ticks since boot; empty where /proc does not say)."""

    pid: int
    started: str

    def alive(self) -> bool:
        """Whether this very process still runs; a zombie has ended, a reused pid is another process."""
        if not _exists(self.pid):
            return False
        state, started = _proc_stat(self.pid)
        return state not in ("Z", "X") and started == self.started


def identify(pid: int | None = None) -> Identity:
    """The identity of a live process; of this one by default."""
    pid = os.getpid() if pid is None else pid
    return Identity(pid, _proc_stat(pid)[1])


def started_at(pid: int) -> float | None:
    """When a process of this machine began, in seconds since the epoch; None where it has ended, or without /proc."""
    ticks = _proc_stat(pid)[1]
    if not ticks:
        return None
    booted = next(line for line in Path("/proc/stat").read_text().splitlines() if line.startswith("btime "))
    return int(booted.split()[1]) + int(ticks) / os.sysconf("SC_CLK_TCK")


def _exists(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True  # somebody else's process
    return True


def _proc_stat(pid: int) -> tuple[str, str]:
    """State letter and start time from /proc/PID/stat (proc(5)); empty strings without /proc."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return "", ""
    fields = text.rpartition(")")[2].split()  # the command name before it may hold spaces and brackets
    return fields[0], fields[19]


def not_anothers(folder: Path) -> None:
    """Raises UserError for a folder that belongs to another user; one that does not exist is nobody's."""
    try:
        owner = folder.stat().st_uid
    except (FileNotFoundError, NotADirectoryError):
        return
    except PermissionError:
        raise UserError(f"{folder}: you may not look into it; choose another folder") from None
    if owner != os.getuid():
        raise UserError(f"{folder} belongs to another user (uid {owner}); choose another folder")


def own_folder(folder: Path) -> None:
    """Make the folder with mode 0700, or check that the one there is ours. Raises UserError."""
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise UserError(f"{folder}: this path, or one above it, is a file; choose another folder") from None
    except OSError as error:
        raise UserError(f"{folder}: cannot be made ({error.strerror}); choose another folder") from None
    not_anothers(folder)
    if not os.access(folder, os.W_OK | os.X_OK):
        raise UserError(f"{folder} is not writable; choose another folder or change its permissions")


@contextmanager
def only_launcher(lock: Path) -> Iterator[None]:
    """Hold the lock file of a folder; the kernel lets go of it when this process ends, however it ends.

    Raises UserError, naming the pid, while another launcher holds it. On a disk without locks nobody is kept out.
    """
    handle = os.open(lock, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            text = os.read(handle, 4096).decode("utf-8", "replace")
            who = f"process {json.loads(text)['pid']}" if text else "another process"
            raise UserError(
                f"{lock.parent} is in use by another launcher ({who}); wait until it has ended, or stop it"
            ) from None
        except OSError as error:
            if error.errno not in UNLOCKABLE:
                raise
        os.ftruncate(handle, 0)
        me = identify()
        os.pwrite(handle, json.dumps({"pid": me.pid, "started": me.started}).encode(), 0)
        yield
    finally:
        os.close(handle)
