"""Bringing files here from a mounted folder, a web server, an object store or a command: resumed and checked.

A ``Source`` streams a file from a given byte on; what is wrong with one attempt is ``Refused`` where trying again would
not help, else OSError or one of http.client's errors. ``Source.fetch`` tries again and checks what arrived.
"""

import hashlib
import http.client
import io
import os
import random
import selectors
import shlex
import signal
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import IO, Any, BinaryIO
from urllib.parse import quote, urlsplit, urlunsplit

from llamagen_dist.config import is_remote
from llamagen_dist.data.manifest import MANIFEST, Manifest, parse_manifest
from llamagen_dist.errors import UserError

FIRST_PAUSE_S = 1.0
"""Between the first two tries; it doubles each time."""
_LONGEST_PAUSE_S = 60.0
_LARGEST_MANIFEST = 256 << 20
_BLOCK = 1 << 20
_SILENCE_S = 120.0  # a source that sends nothing for so long is given up for this try
_WORTH_A_RETRY = (408, 425, 429)  # of the 4xx; all 5xx are

Blocks = AbstractContextManager[tuple[int, Iterator[bytes]]]


class Refused(Exception):
    """The source answered, and will answer the same again. ``missing``: there is no such file."""

    def __init__(self, text: str, missing: bool = False) -> None:
        super().__init__(text)
        self.missing = missing


class NotThere(UserError):
    """The source works, but has no such file."""


class _Busy(OSError):
    """The source asks to be tried again after ``wait_s`` seconds."""

    def __init__(self, text: str, wait_s: float) -> None:
        super().__init__(text)
        self.wait_s = wait_s


class _Incomplete(Exception):
    """What arrived is not the file; it may be at the next try."""


class Source(ABC):
    """A folder of files, wherever it is."""

    location: str
    """The folder as messages show it, without passwords or signatures."""
    _tries = 5

    @abstractmethod
    def shown(self, name: str) -> str:
        """One of its files, as messages show it."""

    @abstractmethod
    def stream(self, name: str, start: int) -> Blocks:
        """(number of the first byte, blocks). The first is ``start``, or 0 where it cannot begin in the middle; no
        blocks where the file ends at ``start`` or before."""

    def fetch(self, name: str, into: IO[bytes], limit: int, size: int | None = None, sha256: str | None = None) -> None:
        """Fill a file with the file ``name``.

        into: open for reading and writing; what it contains already is taken for the beginning. Left at its beginning.
        limit: bytes after which the source is not believed.
        size, sha256: what must have arrived, where that is known.
        Raises UserError naming the file and the tries; NotThere where it does not exist.
        """
        began, problem = time.monotonic(), Exception()
        for number in range(self._tries):
            if number:
                into.flush()  # a process that is ended in the pause leaves what it has to the next one
                asked = problem.wait_s if isinstance(problem, _Busy) else 0.0
                pause = FIRST_PAUSE_S * 2 ** (number - 1) * random.uniform(0.75, 1.25)  # ranks should not be in step
                time.sleep(min(max(asked, pause), _LONGEST_PAUSE_S))
            try:
                self._try(name, into, limit, size, sha256)
                into.seek(0)
                return
            except Refused as error:
                kind = NotThere if error.missing else UserError
                raise kind(f"{self.shown(name)}: cannot be fetched ({error}); is this the whole folder?") from None
            except (OSError, http.client.HTTPException, _Incomplete) as error:
                problem = error
        raise UserError(
            f"{self.shown(name)}: could not be fetched in {self._tries} tries over {time.monotonic() - began:.0f} s "
            f"({problem or type(problem).__name__}); check the source, then run the same command again"
        )

    def _try(self, name: str, into: IO[bytes], limit: int, size: int | None, sha256: str | None) -> None:
        # What an earlier try or process left is read again rather than trusted: the sha256 is of the whole file.
        digest, length = hashlib.sha256(), 0
        into.seek(0)
        while block := into.read(_BLOCK):
            digest.update(block)
            length += len(block)
        if size is None or length < size:
            with self.stream(name, length) as (first, blocks):
                if first != length:
                    digest, length = hashlib.sha256(), first
                    into.seek(first)
                    into.truncate()
                for block in blocks:
                    length += len(block)
                    if length > limit:
                        break
                    _write(into, block)
                    digest.update(block)
        if length > limit or (size is not None and length > size):
            into.truncate(0)
            raise _Incomplete(f"it is longer than {size or limit:,} bytes, which is all that {MANIFEST} allows")
        if size is not None and length < size:
            raise _Incomplete(f"it ended after {length:,} of the {size:,} bytes that {MANIFEST} records")
        if sha256 is not None and digest.hexdigest() != sha256:
            into.truncate(0)
            raise _Incomplete(f"sha256 {digest.hexdigest()}, but {MANIFEST} records {sha256}")

    def manifest(self) -> Manifest:
        """The folder's manifest. Raises UserError: it cannot be fetched, or is not a shard manifest."""
        memory = io.BytesIO()
        try:
            self.fetch(MANIFEST, memory, _LARGEST_MANIFEST)
        except NotThere:
            raise UserError(
                f"{self.location}: no shards here ({MANIFEST} is missing); copy it there with the shards"
            ) from None
        return parse_manifest(memory.getvalue(), self.shown(MANIFEST))


def source_at(location: str | Path, allow_pipe: bool = False) -> Source:
    """The source at a folder or URL. Raises UserError for ``pipe:`` without permission, a URL with a password."""
    if not is_remote(location):
        return LocalSource(Path(location))
    location = str(location)
    if location.startswith("pipe:"):
        if not allow_pipe:
            raise UserError(
                f"{location}: runs a command: if you trust it, set data.allow_pipe=true or give --allow-pipe"
            )
        return PipeSource(location)
    if urlsplit(location).password is not None:
        raise UserError(
            f"{_without_secrets(location)}: a password in a URL ends up in logs; use a signed URL, or the credentials "
            "that the store's client reads from the environment"
        )
    return HttpSource(location) if location.startswith(("http://", "https://")) else ObjectStoreSource(location)


def _write(into: IO[bytes], block: bytes) -> None:
    """A full disk here is not the source's fault, and does not get better by fetching again."""
    try:
        into.write(block)
    except OSError as error:
        name = getattr(into, "name", "memory")
        raise UserError(
            f"{name}: cannot be written ({error.strerror}); make room, or name another data.cache or data.stage"
        ) from None


def _without_secrets(url: str) -> str:
    parts = urlsplit(url)
    host = parts.netloc.rpartition("@")[2]
    return urlunsplit((parts.scheme, host, parts.path, "…" if parts.query else "", ""))


def _blocks(file: BinaryIO) -> Iterator[bytes]:
    while block := file.read(_BLOCK):
        yield block


class LocalSource(Source):
    """A mounted folder."""

    _tries = 2

    def __init__(self, folder: Path) -> None:
        self.folder, self.location = folder, str(folder)

    def shown(self, name: str) -> str:
        return str(self.folder / name)

    @contextmanager
    def stream(self, name: str, start: int) -> Iterator[tuple[int, Iterator[bytes]]]:
        try:
            file = open(self.folder / name, "rb")  # noqa: SIM115 - closed below
        except (FileNotFoundError, PermissionError) as error:
            raise Refused(str(error.strerror), isinstance(error, FileNotFoundError)) from None
        with file:
            file.seek(start)
            yield start, _blocks(file)


class _UrlSource(Source):
    def __init__(self, url: str) -> None:
        self._url, self.location = url, _without_secrets(url)

    def shown(self, name: str) -> str:
        return _without_secrets(self._joined(name))

    def _joined(self, name: str) -> str:
        """The URL of a file in the folder; a query, such as a signature, stays at the end."""
        parts = urlsplit(self._url)
        path = f"{parts.path.rstrip('/')}/{quote(name)}"
        return urlunsplit((parts.scheme, parts.netloc, path, parts.query, ""))


class HttpSource(_UrlSource):
    """``http(s)://``, proxies as the environment names them."""

    @contextmanager
    def stream(self, name: str, start: int) -> Iterator[tuple[int, Iterator[bytes]]]:
        headers = {"User-Agent": "llamagen-dist", "Accept-Encoding": "identity"}
        if start:
            headers["Range"] = f"bytes={start}-"
        request = urllib.request.Request(self._joined(name), headers=headers)
        try:
            response = urllib.request.urlopen(request, timeout=_SILENCE_S)
        except urllib.error.HTTPError as error:
            if error.code != 416 or not start:
                raise _problem(error) from None
            response = None
        if response is None:
            # 416 (RFC 9110, 15.5.17): no range begins at the end of a file or behind it. This is how servers answer
            # where an earlier download was complete when its process died; whether it is the file, its sha256 tells.
            yield start, iter(())
            return
        with response:
            resumed = response.status == 206
            if resumed and not response.headers.get("Content-Range", "").startswith(f"bytes {start}-"):
                raise OSError("the server answered with another range of bytes than the request's")
            yield start if resumed else 0, _blocks(response)


def _problem(error: urllib.error.HTTPError) -> Exception:
    text = f"HTTP {error.code} {error.reason}"
    if error.code < 500 and error.code not in _WORTH_A_RETRY:
        return Refused(text, missing=error.code in (404, 410))
    after = error.headers.get("Retry-After", "")
    return _Busy(text, float(after) if after.isdigit() else 0.0)


class ObjectStoreSource(_UrlSource):
    """Every other ``scheme://`` that fsspec knows: ``s3://`` with s3fs installed, ``gs://`` with gcsfs, …"""

    def __init__(self, url: str) -> None:
        super().__init__(url)
        self._store: Any = None
        self._process = 0  # whose connections these are: they do not survive a fork

    def _opened(self, name: str) -> Any:
        import fsspec  # type: ignore[import-untyped]

        if self._process != os.getpid():
            try:
                self._store, self._process = fsspec.core.url_to_fs(self._url), os.getpid()
            except (ImportError, ValueError) as error:
                raise UserError(
                    f"{self.location}: cannot be reached ({error}); s3:// needs pip install 'llamagen-dist[remote]'"
                ) from None
        store, folder = self._store
        return store.open(f"{folder.rstrip('/')}/{name}", "rb", block_size=8 * _BLOCK, cache_type="readahead")

    @contextmanager
    def stream(self, name: str, start: int) -> Iterator[tuple[int, Iterator[bytes]]]:
        with self._translated():
            file = self._opened(name)
        with file:
            with self._translated():
                file.seek(start)
            yield start, self._read(file)

    def _read(self, file: Any) -> Iterator[bytes]:
        with self._translated():
            yield from _blocks(file)

    @staticmethod
    @contextmanager
    def _translated() -> Iterator[None]:
        """Every store's client has errors of its own, which all mean that the file did not come."""
        try:
            yield
        except (UserError, GeneratorExit):
            raise
        except (FileNotFoundError, PermissionError) as error:
            raise Refused(str(error), isinstance(error, FileNotFoundError)) from None
        except Exception as error:
            raise OSError(f"{type(error).__name__}: {error}") from error


class PipeSource(Source):
    """``pipe:COMMAND``: what a shell command writes, with {name} replaced by the (quoted) file name."""

    def __init__(self, location: str) -> None:
        self._command, self.location = location.removeprefix("pipe:").strip(), location
        if "{name}" not in self._command:
            raise UserError(f"{location}: write {{name}} where the file's name goes, as in pipe:cat /data/{{name}}")

    def shown(self, name: str) -> str:
        return f"pipe:{self._filled(name)}"

    def _filled(self, name: str) -> str:
        return self._command.replace("{name}", shlex.quote(name))

    @contextmanager
    def stream(self, name: str, start: int) -> Iterator[tuple[int, Iterator[bytes]]]:
        with tempfile.TemporaryFile() as complaints:
            process = subprocess.Popen(
                self._filled(name),
                shell=True,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=complaints,
                start_new_session=True,  # so that all of a pipeline can be ended
            )
            try:
                yield 0, self._read(process, complaints)
            finally:
                if process.returncode is None:  # not even waited for: the group's number is still its own
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
                assert process.stdout is not None
                process.stdout.close()

    @staticmethod
    def _read(process: "subprocess.Popen[bytes]", complaints: BinaryIO) -> Iterator[bytes]:
        assert process.stdout is not None
        with selectors.DefaultSelector() as selector:
            selector.register(process.stdout, selectors.EVENT_READ)
            while True:
                if not selector.select(_SILENCE_S):
                    raise TimeoutError(f"the command wrote nothing for {_SILENCE_S:.0f} s")
                block = os.read(process.stdout.fileno(), _BLOCK)
                if not block:
                    break
                yield block
        if status := process.wait(_SILENCE_S):
            complaints.seek(0)
            text = " ".join(complaints.read(2000).decode(errors="replace").split())
            raise OSError(f"the command ended with status {status}: {text}" if text else f"exit status {status}")
