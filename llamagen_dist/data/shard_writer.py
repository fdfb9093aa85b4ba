"""Writing shards: the same bytes every time, nothing half-written, finished shards kept when a job is cut
off.

Tars follow WebDataset's conventions and hold no time, user or host. A shard is written aside, synced,
renamed; then its record goes to the folder ``.parts``; the manifest comes last and ``.parts`` is removed.
"""

import errno
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from llamagen_dist.data.checksums import checksum_name, checksums, starts
from llamagen_dist.data.index import index_bytes, index_name, scan
from llamagen_dist.data.manifest import (
    MANIFEST,
    Manifest,
    ShardRecord,
    plain,
    shard_record,
    write_manifest,
)
from llamagen_dist.data.shards import open_shards
from llamagen_dist.errors import UserError
from llamagen_dist.files import sha256_file, sync_folder, write_bytes

_PARTS = ".parts"
Sample = tuple[str, Mapping[str, bytes]]
"""(key, {member: bytes}), for example ("000000007", {".png": b"…", ".cls": b"3"})."""


def label_text(label: int, classes: int) -> bytes:
    """A class label as ``.cls`` holds it: digits, padded with zeros so that every record is equally long."""
    return str(label).zfill(len(str(classes - 1))).encode()


def shard_name(number: int) -> str:
    return f"shard-{number:06d}.tar"


@contextmanager
def refused_when_full(folder: Path) -> Iterator[None]:
    """Turn "no space left" and its kin into a UserError; every other error passes."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        raise UserError(
            f"{folder}: {error.strerror}; make room and run the same command again (what is finished is kept)"
        ) from None


def write_shard(folder: Path, name: str, samples: Iterable[Sample], members: Sequence[str]) -> ShardRecord:
    """Write one tar (and its index, where records differ in length).

    members: every member that may occur, the same for all shards of the folder. Raises UserError where the disk is
    full.
    """
    from webdataset.writer import TarWriter

    path = folder / name
    aside = folder / f".{name}.{os.getpid()}.tmp"
    try:
        with refused_when_full(folder), open(aside, "wb") as file:
            with TarWriter(file, encoder=False, mtime=0, user="", group="", mode=0o444) as tar:
                for key, parts in samples:
                    tar.write({"__key__": key} | {member.removeprefix("."): data for member, data in parts.items()})
            file.flush()
            os.fsync(file.fileno())
        digest, size = sha256_file(aside), aside.stat().st_size
        found = scan(aside)
        index = found.columns(tuple(members))
        stride, index_sha256, layout = index.stride(), None, None
        if stride is None:
            with refused_when_full(folder):
                write_bytes(folder / index_name(name), index_bytes(index))
            index_sha256 = sha256_file(folder / index_name(name))
        else:
            layout = tuple((int(offset), int(length)) for offset, length in index.spans[0])
        record = ShardRecord(name, len(index.spans), size, digest, stride, layout, index_sha256)
        sums = checksums(aside, starts(record, index.spans))
        with refused_when_full(folder):
            write_bytes(folder / checksum_name(name), sums.tobytes())
        os.replace(aside, path)
        sync_folder(folder)
    finally:
        aside.unlink(missing_ok=True)
    return record


class ShardJob:
    """A folder of shards in the making. ``source`` says what it is made from; other contents are refused."""

    def __init__(self, folder: Path, source: Mapping[str, Any]) -> None:
        self.folder, self.source, self._parts = folder, plain(source), folder / _PARTS

    def completed(self) -> Manifest | None:
        """The manifest, if the folder is already complete and made from the same source.

        Raises UserError when it holds anything else.
        """
        if not (self.folder / MANIFEST).exists():
            return None
        manifest = open_shards(self.folder).manifest
        if plain(manifest.source) != self.source:
            changed = sorted(
                key for key in {*manifest.source, *self.source} if manifest.source.get(key) != self.source.get(key)
            )
            raise UserError(
                f"{self.folder}: already holds shards made in another way (different: {', '.join(changed)}); "
                "choose another folder, or delete this one"
            )
        return manifest

    def begin(self, restart: bool = False) -> None:
        """Create the folder, or take up an unfinished job. Main rank only.

        restart: throw an unfinished job with another source away instead of refusing. Raises UserError.
        """
        job = self._parts / "job.json"
        try:
            if job.exists():
                if json.loads(job.read_text(encoding="utf-8")) == self.source:
                    return
                if not restart and any(self._parts.glob("*.tar.json")):
                    raise UserError(
                        f"{self.folder}: holds an unfinished job with another source or other options; "
                        "finish that one with its own command, or delete the folder"
                    )
                for part in self._parts.glob("*.tar.json"):
                    (self.folder / part.stem).unlink(missing_ok=True)
                    (self.folder / index_name(part.stem)).unlink(missing_ok=True)
                    (self.folder / checksum_name(part.stem)).unlink(missing_ok=True)
                shutil.rmtree(self._parts)
            if any(self.folder.glob("*.tar")):
                raise UserError(
                    f"{self.folder}: holds tar files that this command did not write; choose an empty folder"
                )
            self._parts.mkdir(parents=True, exist_ok=True)
            write_bytes(job, json.dumps(self.source).encode())
        except OSError as error:
            raise UserError(f"{self.folder}: cannot be written ({error.strerror}); choose another folder") from None

    def finished(self, name: str) -> tuple[ShardRecord, dict[str, Any]] | None:
        """(record, extra) of a shard that an earlier process finished and that is intact, else None."""
        try:
            data = json.loads((self._parts / f"{name}.json").read_text(encoding="utf-8"))
            record = shard_record(data["record"])
            intact = sha256_file(self.folder / name) == record.sha256
            if record.index_sha256 is not None:
                intact &= sha256_file(self.folder / index_name(name)) == record.index_sha256
        except (OSError, ValueError, KeyError):
            return None  # it is simply written again
        return (record, data["extra"]) if intact else None

    def write(
        self,
        name: str,
        samples: Iterable[Sample],
        members: Sequence[str],
        extra: Mapping[str, Any] | None = None,
    ) -> ShardRecord:
        """Write one shard and remember it. ``extra`` is read after the samples are exhausted, and kept as
        JSON.
        """
        record = write_shard(self.folder, name, samples, members)
        data = {"record": asdict(record), "extra": dict(extra or {})}
        with refused_when_full(self.folder):
            write_bytes(self._parts / f"{name}.json", json.dumps(data).encode())
        return record

    def finish(self, manifest: Manifest) -> None:
        """Write the manifest and forget the parts. Main rank only, after all shards."""
        for leftover in self.folder.glob(".*.tmp*"):
            leftover.unlink(missing_ok=True)
        with refused_when_full(self.folder):
            write_manifest(self.folder, manifest)
        shutil.rmtree(self._parts, ignore_errors=True)
