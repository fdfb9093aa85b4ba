"""Ways to the files of a folder: a local one, a web server, an object store, a command.

Each streams a file from a given byte on; nobody here tries twice or checks anything (remote.py does). Errors are
``Refused`` where trying again would not help, and OSError or http.client's elsewhere.
"""

import os
import selectors
import shlex
import signal
import subprocess
import tempfile
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, BinaryIO, Protocol
from urllib.parse import quote, urlsplit, urlunsplit

from llamagen_dist.config import is_remote
from llamagen_dist.errors import UserError

_BLOCK = 1 << 20
_SILENCE_S = 120.0  # a source that sends nothing for so long is given up for this try
_WORTH_A_RETRY = (408, 425, 429)  # of the 4xx; all 5xx are


class Refused(Exception):
    """The source answered, and will answer the same again. ``missing``: there is no such file."""

    def __init__(self, text: str, missing: bool = False) -> None:
        super().__init__(text)
        self.missing = missing


class Busy(OSError):
    """The source asks to be tried again after ``wait_s`` seconds."""

    def __init__(self, text: str, wait_s: float) -> None:
        super().__init__(text)
        self.wait_s = wait_s


class Transport(Protocol):
    location: str
    """The folder as messages show it, without passwords or signatures."""

    def shown(self, name: str) -> str:
        """One of its files, as messages show it."""

    def stream(self, name: str, start: int) -> AbstractContextManager[tuple[int, Iterator[bytes]]]:
        """(first byte's number, blocks). The first is ``start``, or 0 where the source cannot begin in the middle."""


def transport(location: str | Path, allow_pipe: bool) -> Transport:
    """The way to ``location``. Raises UserError for ``pipe:`` without permission and for a URL with a password."""
    if not is_remote(location):
        return Local(Path(location))
    location = str(location)
    if location.startswith("pipe:"):
        if not allow_pipe:
            raise UserError(
                f"{location}: runs a command, which is only done on request: set data.allow_pipe=true, or give "
                "--allow-pipe, if you trust it"
            )
        return Pipe(location)
    if urlsplit(location).password is not None:
        raise UserError(
            f"{_without_secrets(location)}: a password in a URL ends up in logs and snapshots; use a signed URL, or "
            "the credentials that the object store's client reads from the environment"
        )
    return Http(location) if location.startswith(("http://", "https://")) else ObjectStore(location)


def _without_secrets(url: str) -> str:
    parts = urlsplit(url)
    host = parts.netloc.rpartition("@")[2]
    return urlunsplit((parts.scheme, host, parts.path, "…" if parts.query else "", ""))


def _joined(url: str, name: str) -> str:
    """The URL of a file in a folder; a query, such as a signature, stays at the end."""
    parts = urlsplit(url)
    return urlunsplit((parts.scheme, parts.netloc, f"{parts.path.rstrip('/')}/{quote(name)}", parts.query, ""))


def _blocks(file: BinaryIO) -> Iterator[bytes]:
    while block := file.read(_BLOCK):
        yield block


class Local:
    """A mounted folder."""

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


class Http:
    """``http(s)://``, proxies as the environment names them."""

    def __init__(self, url: str) -> None:
        self._url, self.location = url, _without_secrets(url)

    def shown(self, name: str) -> str:
        return _without_secrets(_joined(self._url, name))

    @contextmanager
    def stream(self, name: str, start: int) -> Iterator[tuple[int, Iterator[bytes]]]:
        headers = {"User-Agent": "llamagen-dist", "Accept-Encoding": "identity"}
        if start:
            headers["Range"] = f"bytes={start}-"
        request = urllib.request.Request(_joined(self._url, name), headers=headers)
        try:
            response = urllib.request.urlopen(request, timeout=_SILENCE_S)
        except urllib.error.HTTPError as error:
            text = f"HTTP {error.code} {error.reason}"
            if error.code < 500 and error.code not in _WORTH_A_RETRY:
                raise Refused(text, missing=error.code in (404, 410)) from None
            after = error.headers.get("Retry-After", "")
            raise Busy(text, float(after) if after.isdigit() else 0.0) from None
        with response:
            resumed = response.status == 206
            if resumed and not response.headers.get("Content-Range", "").startswith(f"bytes {start}-"):
                raise OSError("the server answered with another range of bytes than it was asked for")
            yield start if resumed else 0, _blocks(response)


class ObjectStore:
    """Every other ``scheme://`` that fsspec knows: ``s3://`` with s3fs installed, ``gs://`` with gcsfs, …"""

    def __init__(self, url: str) -> None:
        self._url, self.location = url, _without_secrets(url)
        self._store: Any = None
        self._process = 0  # whose connections these are: they do not survive a fork

    def shown(self, name: str) -> str:
        return _without_secrets(_joined(self._url, name))

    def _opened(self, name: str) -> Any:
        import fsspec  # type: ignore[import-untyped]

        if self._process != os.getpid():
            try:
                self._store, self._process = fsspec.core.url_to_fs(self._url), os.getpid()
            except (ImportError, ValueError) as error:
                raise UserError(
                    f"{self.location}: cannot be reached ({error}); for s3:// install the extra: "
                    "pip install 'llamagen-dist[remote]'"
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


class Pipe:
    """``pipe:COMMAND``: what a shell command writes, with {name} replaced by the (quoted) file name."""

    def __init__(self, location: str) -> None:
        self._command, self.location = location.removeprefix("pipe:").strip(), location
        if "{name}" not in self._command:
            raise UserError(
                f"{location}: write {{name}} where the name of the file goes, as in pipe:cat /data/{{name}}"
            )

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
            said = " ".join(complaints.read(2000).decode(errors="replace").split())
            raise OSError(f"the command ended with status {status}: {said}" if said else f"exit status {status}")
