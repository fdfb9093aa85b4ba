"""Locks between the processes of one node: flock on a local disk, which the kernel takes back from the dead."""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from llamagen_dist.config import UserError


def private_folder(folder: Path, key: str) -> Path:
    """Create ``folder`` for this user alone. Raises UserError, naming the config key, where it is somebody else's."""
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = folder.lstat()
    except OSError as error:
        raise UserError(f"{key}: {folder} cannot be made ({error.strerror}); name another folder") from None
    if found.st_uid != os.getuid() or folder.is_symlink():
        raise UserError(f"{key}: {folder} belongs to another user, who could change what is read; name another folder")
    return folder


def take(path: Path, shared: bool = False, wait: bool = True) -> int | None:
    """A descriptor that holds the lock until it is closed; None where ``wait`` is off and it is held elsewhere.

    The file at ``path`` is created; whoever holds the lock alone may remove or rename it: those who waited notice.
    """
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | (0 if wait else fcntl.LOCK_NB))
            if os.path.samestat(os.fstat(descriptor), os.stat(path)):
                return descriptor
        except BlockingIOError:
            os.close(descriptor)
            return None
        except FileNotFoundError:
            pass
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)


@contextmanager
def alone(path: Path) -> Iterator[None]:
    """Hold the lock at ``path`` for the length of a block."""
    descriptor = take(path)
    assert descriptor is not None
    try:
        yield
    finally:
        os.close(descriptor)
