"""Writing shards: the same bytes every time, nothing half-written, finished shards kept when a job is cut off.

Tars follow WebDataset's conventions and hold no time, user or host. A shard is written aside, synced,
renamed; then its record goes to the folder ``.parts``; the manifest comes last and ``.parts`` is removed.
"""

import errno
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from llamagen_dist.data.index import index_bytes, index_name, scan
from llamagen_dist.data.manifest import MANIFEST, Manifest, ShardRecord, shard_record, write_manifest
from llamagen_dist.data.shards import open_shards
from llamagen_dist.errors import UserError
from llamagen_dist.files import OutputFolder, remove_asides, sha256_file, sync_folder, write_bytes

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
        raise UserError(f"{folder}: {error.strerror}; make room and run the same command again") from None


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
        index = scan(aside).columns(tuple(members))
        stride, index_sha256, layout = index.stride(), None, None
        if stride is None:
            with refused_when_full(folder):
                write_bytes(folder / index_name(name), index_bytes(index))
            index_sha256 = sha256_file(folder / index_name(name))
        else:
            layout = tuple((int(offset), int(length)) for offset, length in index.spans[0])
        record = ShardRecord(name, len(index.spans), size, digest, stride, layout, index_sha256)
        os.replace(aside, path)
        sync_folder(folder)
    finally:
        aside.unlink(missing_ok=True)
    return record


class ShardJob:
    """A folder of shards in the making. ``source`` says what it is made from; other contents are refused."""

    def __init__(self, folder: Path, source: Mapping[str, Any]) -> None:
        self._output = OutputFolder(folder, source, MANIFEST, under="source", what="shards")
        self.folder, self.source = folder, self._output.identity

    def completed(self) -> Manifest | None:
        """The manifest, if the folder is already complete and made from the same source.

        Raises UserError when it holds anything else.
        """
        if self._output.finished() is None:
            return None
        return open_shards(self.folder).manifest

    def begin(self, restart: bool = False) -> None:
        """Create the folder, or take up an unfinished job. Main rank only.

        restart: throw an unfinished job with another source away instead of refusing. Raises UserError.
        """
        self._output.begin(self.folder.glob("*.tar"), self._discard if restart else None)

    def _discard(self) -> None:
        for part in self._output.parts.glob("*.tar.json"):
            name = part.stem
            for file in (name, index_name(name)):
                (self.folder / file).unlink(missing_ok=True)

    def finished(self, name: str) -> tuple[ShardRecord, dict[str, Any]] | None:
        """(record, extra) of a shard that an earlier process finished and that is intact, else None."""
        data = self._output.kept(name)
        if data is None:
            return None
        try:
            record = shard_record(data["record"])
            intact = sha256_file(self.folder / name) == record.sha256
            if record.index_sha256 is not None:
                intact &= sha256_file(self.folder / index_name(name)) == record.index_sha256
        except (OSError, ValueError, KeyError, TypeError):
            return None  # it is simply written again
        return (record, data["extra"]) if intact else None

    def write(
        self, name: str, samples: Iterable[Sample], members: Sequence[str], extra: Mapping[str, Any] | None = None
    ) -> ShardRecord:
        """Write one shard and remember it. ``extra`` is read after the samples are exhausted, and kept as JSON."""
        record = write_shard(self.folder, name, samples, members)
        with refused_when_full(self.folder):
            self._output.keep(name, {"record": asdict(record), "extra": dict(extra or {})})
        return record

    def finish(self, manifest: Manifest) -> None:
        """Write the manifest and forget the parts. Main rank only, after all shards."""
        remove_asides(self.folder)
        with refused_when_full(self.folder):
            write_manifest(self.folder, manifest)
        self._output.forget_parts()
