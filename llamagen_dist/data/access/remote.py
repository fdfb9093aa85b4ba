"""Fetching a file from wherever it is: again after a failure, going on where it was cut, checked on arrival."""

import hashlib
import http.client
import io
import random
import time
from typing import IO

from llamagen_dist.data.access.transport import Busy, Local, Refused, Transport
from llamagen_dist.data.manifest import MANIFEST, Manifest, parse_manifest
from llamagen_dist.errors import UserError

TRIES = 5
FIRST_PAUSE_S = 1.0
"""Between the first two tries; it doubles each time."""
_LONGEST_PAUSE_S = 60.0
_LARGEST_MANIFEST = 256 << 20


class NotThere(UserError):
    """The source works, but has no such file."""


class _Failed(Exception):
    """What arrived is not the file; it may be at the next try."""


def fetch(
    source: Transport,
    name: str,
    file: IO[bytes],
    limit: int,
    size: int | None = None,
    sha256: str | None = None,
) -> None:
    """Fill ``file`` with the file ``name``; what it holds already is taken for the beginning and goes on from there.

    limit: bytes after which the source is not believed. size, sha256: what must have arrived, where that is known.
    Raises UserError naming the file and the tries: NotThere
    where it does not exist. ``file`` is left at its beginning.
    """
    began, tries = time.monotonic(), 2 if isinstance(source, Local) else TRIES
    problem: Exception = _Failed("")
    for number in range(tries):
        if number:
            file.flush()  # a process that is ended in the pause leaves what it has to the next one
            asked = problem.wait_s if isinstance(problem, Busy) else 0.0
            pause = FIRST_PAUSE_S * 2 ** (number - 1) * random.uniform(0.75, 1.25)  # ranks should not come in step
            time.sleep(min(max(asked, pause), _LONGEST_PAUSE_S))
        try:
            _try(source, name, file, limit, size, sha256)
            file.seek(0)
            return
        except Refused as error:
            kind = NotThere if error.missing else UserError
            raise kind(f"{source.shown(name)}: cannot be fetched ({error}); is this the whole folder?") from None
        except (OSError, http.client.HTTPException, _Failed) as error:
            problem = error
    raise UserError(
        f"{source.shown(name)}: could not be fetched in {tries} tries over {time.monotonic() - began:.0f} s "
        f"({problem or type(problem).__name__}); check the source, then run the same command again"
    )


def _try(
    source: Transport,
    name: str,
    file: IO[bytes],
    limit: int,
    size: int | None,
    sha256: str | None,
) -> None:
    digest, held = hashlib.sha256(), 0
    file.seek(0)
    while block := file.read(1 << 20):
        digest.update(block)
        held += len(block)
    if size is None or held < size:
        with source.stream(name, held) as (first, blocks):
            if first != held:
                digest, held = hashlib.sha256(), first
                file.seek(first)
                file.truncate()
            for block in blocks:
                held += len(block)
                if held > limit:
                    break
                _write(file, block)
                digest.update(block)
    if held > limit or (size is not None and held > size):
        file.truncate(0)
        raise _Failed(f"it is longer than {size or limit:,} bytes, which is all that {MANIFEST} allows")
    if size is not None and held < size:
        raise _Failed(f"it ended after {held:,} of the {size:,} bytes that {MANIFEST} records")
    if sha256 is not None and digest.hexdigest() != sha256:
        text = f"sha256 {digest.hexdigest()}, but {MANIFEST} records {sha256}"
        file.truncate(0)
        raise _Failed(text)


def _write(file: IO[bytes], block: bytes) -> None:
    """A full disk here is not the source's fault, and does not get better by fetching again."""
    try:
        file.write(block)
    except OSError as error:
        name = getattr(file, "name", "memory")
        raise UserError(
            f"{name}: cannot be written ({error.strerror}); make room there, or name another folder as data.cache or "
            "data.stage"
        ) from None


def fetch_manifest(source: Transport) -> Manifest:
    """The folder's manifest. Raises UserError: it cannot be fetched, or is none of ours."""
    memory = io.BytesIO()
    try:
        fetch(source, MANIFEST, memory, _LARGEST_MANIFEST)
    except NotThere:
        raise UserError(
            f"{source.location}: no shards here ({MANIFEST} is missing); copy it there with the shards, which llamagen "
            "pack, tokenizer_training.extract or llamagen shards index make"
        ) from None
    return parse_manifest(memory.getvalue(), source.shown(MANIFEST))
