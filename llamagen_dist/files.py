"""Files that are the old one or the new one, never half; JSON, locks, and folders of results. Imports nothing heavy."""

import errno
import fcntl
import hashlib
import json
import math
import os
import pickletools
import shutil
import socket
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from llamagen_dist.errors import UserError
from llamagen_dist.process import identify

UNLOCKABLE = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS)  # what network disks without locks say


@contextmanager
def written_aside(path: Path) -> Iterator[Path]:
    """Where to write the content of ``path``; at the end of the block it is synced and renamed.

    ``path`` is either the old file or the whole new one, after a power cut too. An exception leaves nothing behind.
    The name keeps the suffix, by which some writers and readers tell the format.
    """
    aside = path.with_name(f".{path.stem}.{socket.gethostname()}.{os.getpid()}.tmp{path.suffix}")
    try:
        yield aside
        with open(aside, "rb") as file:
            os.fsync(file.fileno())
        os.replace(aside, path)
        sync_folder(path.parent)
    finally:
        aside.unlink(missing_ok=True)


def remove_asides(folder: Path) -> None:
    """Delete what killed writers of files in ``folder`` left. Only while nobody else writes there."""
    for left in folder.glob(".*.tmp*"):
        left.unlink(missing_ok=True)


def write_bytes(path: Path, data: bytes) -> None:
    """A whole small file; see ``written_aside``."""
    with written_aside(path) as aside:
        aside.write_bytes(data)


def write_text(path: Path, text: str) -> None:
    """``write_bytes`` of UTF-8."""
    write_bytes(path, text.encode())


def sync_folder(folder: Path) -> None:
    """Make renames in ``folder`` survive a power cut, where its disk can."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP):  # what disks say that sync files only
            raise
    finally:
        os.close(descriptor)


def disk_time(folder: Path) -> float:
    """Seconds since the epoch by the clock of the disk that holds ``folder``, which must be writable.

    On a network disk that is the server's clock, the only one that the times of all hosts' files can be compared with.
    """
    now = folder / f".now.{socket.gethostname()}.{os.getpid()}"
    try:
        now.touch()
        return now.stat().st_mtime
    finally:
        now.unlink(missing_ok=True)


def seconds_old(path: Path) -> float:
    """Since a file was last written, by ``disk_time``; infinite where it is missing."""
    try:
        return disk_time(path.parent) - path.stat().st_mtime
    except FileNotFoundError:
        return math.inf


def sha256_file(path: Path) -> str:
    """sha256 (hex) of a file."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


_TORCH_LEGACY = (
    b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19."  # the pickled magic number that torch.save began with before 1.6
)


def cut_short(path: Path) -> bool:
    """Whether a weights file (.safetensors, or what torch.save writes) plainly ends before its own format says.

    Looked at without the libraries that read them, for a sentence on why those refused it.
    """
    size = path.stat().st_size
    with open(path, "rb") as file:
        start = file.read(len(_TORCH_LEGACY))
        if path.suffix == ".safetensors":  # uint64 length of a JSON header, which names where each tensor ends
            length = int.from_bytes(start[:8], "little")
            if size < 8 or length > 100 << 20:  # the format's own bound; beyond it this is no such file
                return size < 8
            file.seek(8)
            try:
                ends = [v["data_offsets"][1] for k, v in json.loads(file.read(length)).items() if k != "__metadata__"]
            except (ValueError, TypeError, KeyError, AttributeError, IndexError):
                return size < 8 + length
            return size < 8 + length + max(ends, default=0)
        if start.startswith(b"PK\x03\x04"):  # a zip's directory is its last part
            return not zipfile.is_zipfile(path)
        if start == _TORCH_LEGACY:  # five pickles; the storages behind them do not say how long they are
            file.seek(0)
            try:
                for _ in range(5):
                    for _operation in pickletools.genops(file):
                        pass
            except ValueError:
                return True
            return False
        return _TORCH_LEGACY.startswith(start) or b"PK\x03\x04".startswith(start)


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises UserError, naming the file, where it is missing, damaged or no object."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    except ValueError as error:
        raise UserError(f"{path}: is not valid JSON ({error}); the file is damaged") from None
    if not isinstance(value, dict):
        raise UserError(f"{path}: holds {type(value).__name__}, not a JSON object; the file is damaged")
    return value


def json_if_there(path: Path) -> dict[str, Any] | None:
    """``read_json`` for files that another process may be about to write: None where that would refuse."""
    try:
        return read_json(path)
    except UserError:
        return None


def read_jsonl(path: Path, strict: bool = False) -> list[dict[str, Any]]:
    """The objects in a file of JSON lines. A last line without its end is a killed writer's, and left out.

    strict: what to do at another line that is no JSON object: raise UserError, naming it, for files whose numbers are
    computed with; or stop reading there.
    """
    values = []
    with open(path, encoding="utf-8", errors="replace") as file:
        for number, line in enumerate(file, 1):
            try:
                value = json.loads(line)
            except ValueError as error:
                if strict and line.endswith("\n"):
                    raise UserError(f"{path}, line {number}: is not valid JSON ({error}); restore the file") from None
                break
            if isinstance(value, dict):
                values.append(value)
            elif strict:
                raise UserError(f"{path}, line {number}: is not a JSON object; restore the file")
    return values


def own_folder(folder: Path, key: str = "", follow: bool = True) -> Path:
    """Make ``folder`` with mode 0700, or check that the one there is ours and writable; returns it.

    key: the config key that names it, for messages.
    follow: whether a link will do; not below a folder where others write, who could turn it elsewhere.
    Raises UserError.
    """
    shown = f"{key}: {folder}" if key else str(folder)
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise UserError(f"{shown} cannot be made: this path, or one above it, is a file") from None
    except OSError as error:
        raise UserError(f"{shown} cannot be made ({error.strerror}); choose another folder") from None
    if not follow and folder.is_symlink():
        raise UserError(f"{shown} is a link, so it may be one that belongs to another user; choose another folder")
    not_anothers(folder, shown)
    if not os.access(folder, os.W_OK | os.X_OK):
        raise UserError(f"{shown} is not writable; choose another folder or change its permissions")
    return folder


def not_anothers(folder: Path, shown: str = "") -> None:
    """Raises UserError for a folder that belongs to another user; one that does not exist is nobody's.

    shown: what to call it (default: its path).
    """
    try:
        owner = folder.stat().st_uid
    except (FileNotFoundError, NotADirectoryError):
        return
    except PermissionError:
        raise UserError(f"{shown or folder}: you may not look into it; choose another folder") from None
    if owner != os.getuid():
        raise UserError(f"{shown or folder} belongs to another user (uid {owner}); choose another folder")


@contextmanager
def only_launcher(lock: Path) -> Iterator[None]:
    """Lock a folder for one launcher; the kernel releases the lock when this process ends, however it ends.

    lock: the lock file, in the folder.

    Raises UserError, naming the pid, while another launcher has it. On a disk without locks nobody is kept out.
    """

    def refuse() -> None:
        holder = json_if_there(lock)
        who = f"process {holder['pid']}" if holder else "another process"
        raise UserError(f"{lock.parent} is in use by another launcher ({who}); wait until it ends, or stop it")

    with locked_where_possible(lock, refuse):
        me = identify()
        lock.write_text(json.dumps({"pid": me.pid, "started": me.started}))
        yield


def take_lock(path: Path, shared: bool = False, wait: bool = True) -> int | None:
    """A descriptor that locks ``path`` until it is closed; None where ``wait`` is off and another process has the lock.

    The file is created. The owner of an exclusive lock may remove or rename it: those who waited notice.

    shared: together with other shared locks, for readers.
    wait: until the lock is free.
    """
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | (0 if wait else fcntl.LOCK_NB))
            # the one that was waited for may have been removed or renamed meanwhile: then this locks nothing
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
def locked(path: Path) -> Iterator[None]:
    """Lock ``path`` for the length of a block."""
    descriptor = take_lock(path)
    assert descriptor is not None
    try:
        yield
    finally:
        os.close(descriptor)


@contextmanager
def locked_where_possible(path: Path, taken: Callable[[], None]) -> Iterator[None]:
    """Lock ``path`` for the length of a block; on a disk without locks nobody is kept out.

    taken: called while another process has the lock, before each further attempt: it waits, or raises.
    """
    with ExitStack() as stack:
        try:
            while (handle := take_lock(path, wait=False)) is None:
                taken()
            stack.callback(os.close, handle)
        except OSError as error:
            if error.errno not in UNLOCKABLE:
                raise
        yield


class OutputFolder:
    """A folder of results that belongs to one identity: resumed after any death, refused to every other identity.

    Under way it holds ``.parts``: job.json with the identity, and what ``keep`` was given for each finished part. When
    it is finished the record file, which names the identity, is written; it comes last, so that a folder with a record
    is whole; then ``.parts`` goes. Only one process (the main rank) may begin, discard and finish; any may ``keep``.
    """

    def __init__(
        self,
        folder: Path,
        identity: Mapping[str, Any],
        record: str = "record.json",
        under: str | None = None,
        what: str = "results",
        key: str = "",
    ) -> None:
        """
        folder: need not exist yet.
        identity: everything that decides the results, as JSON can hold it.
        record: the name of the file that is written last.
        under: the key of the record that holds the identity; None: the record's own keys.
        what: what to call the results in messages.
        key: the config key that names the folder, for messages.
        """
        self.folder, self.identity, self.what = folder, as_json(identity), what
        self._named = f"{key}: {folder}" if key else f"{folder}"
        self.record, self._under = folder / record, under
        self.parts = folder / ".parts"
        self._job = self.parts / "job.json"

    def finished(self, results: Iterable[Path] = ()) -> dict[str, Any] | None:
        """The record, if the folder is finished and none of ``results`` is gone since. Raises UserError where it is
        another identity's, with the difference, or damaged."""
        if not os.path.lexists(self.record):
            return None
        record = read_json(self.record)
        earlier = record.get(self._under) if self._under else {key: record.get(key) for key in self.identity}
        self._refuse_unless_same(earlier if isinstance(earlier, dict) else {}, f"already holds {self.what}")
        return record if all(path.exists() for path in results) else None

    def begin(
        self, foreign: Iterable[Path] = (), discard: Callable[[], None] | None = None, refuse_empty: bool = False
    ) -> None:
        """Create the folder, or take up an unfinished job of the same identity.

        foreign: files that only this job may have written; they are refused where there is neither job nor record.
        discard: removes the results of an unfinished job of another identity, which is refused without it (and is
            thrown away without it too, where it has kept nothing yet).
        refuse_empty: refuse it there too: its process may be alive, and would keep its parts in this job.
        Raises UserError, also where the folder cannot be written.
        """
        try:
            if self._job.exists():
                earlier = read_json(self._job)
                if earlier == self.identity:
                    return
                if discard is not None:
                    discard()
                elif refuse_empty or any(
                    not part.name.startswith(".") and part != self._job for part in self.parts.iterdir()
                ):
                    self._refuse_unless_same(earlier, f"holds unfinished {self.what}")
                # job.json goes last: whoever is killed before that finds the other job again and discards the rest
                for part in self.parts.iterdir():
                    if part != self._job:
                        part.unlink()
                self._job.unlink()
            taken = None if self.record.exists() else next((path for path in foreign if path.exists()), None)
            if taken is not None:
                raise UserError(
                    f"{self._named}: holds {taken.name}, which this command did not write; choose an empty folder"
                )
            self.parts.mkdir(parents=True, exist_ok=True)
            write_text(self._job, json.dumps(self.identity))
        except OSError as error:
            raise UserError(f"{self._named}: cannot be written ({error.strerror}); choose another folder") from None

    def keep(self, part: str, content: Mapping[str, Any]) -> None:
        """Remember a finished part, after its results are on the disk."""
        write_text(self.parts / f"{part}.json", json.dumps(content))

    def kept(self, part: str) -> dict[str, Any] | None:
        """What ``keep`` was given for a part; None where it is not finished (or what is there is damaged)."""
        return json_if_there(self.parts / f"{part}.json")

    def finish(self, record: Mapping[str, Any]) -> None:
        """Write the record (with the identity) and forget the parts."""
        content = {**as_json(record), self._under: self.identity} if self._under else self.identity | as_json(record)
        write_text(self.record, json.dumps(content, indent=1, ensure_ascii=False) + "\n")
        self.forget_parts()

    def forget_parts(self) -> None:
        """Remove ``.parts`` of a finished folder."""
        shutil.rmtree(self.parts, ignore_errors=True)

    def _refuse_unless_same(self, earlier: Mapping[str, Any], holds: str) -> None:
        keys = dict.fromkeys((*self.identity, *earlier))
        different = [key for key in keys if earlier.get(key) != self.identity.get(key)]
        if different:
            changes = "; ".join(
                f"{key}: {_short(earlier.get(key))} -> {_short(self.identity.get(key))}" for key in different
            )
            raise UserError(
                f"{self._named}: {holds} made in another way ({changes}); use the old values, choose another folder, "
                "or delete this one"
            )


def as_json(value: Any) -> Any:
    """``value`` as JSON gives it back (tuples become lists), for comparisons with what a file holds."""
    return json.loads(json.dumps(value))


def _short(value: Any, most: int = 40) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= most else f"{text[: most - 1]}…"
