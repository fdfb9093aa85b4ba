"""Sets of samples made chunk by chunk on any number of ranks, and kept until all are there.

A chunk is what one fixed batch shape makes, so its bytes depend neither on the number of ranks nor on where an earlier
process was cut off. Finished chunks wait in OUT/.parts as .npz files, whose checksums are tested when they are read.
"""

import io
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from llamagen_dist.console import main_rank_progress
from llamagen_dist.errors import UserError
from llamagen_dist.files import OutputFolder, write_bytes, written_aside
from llamagen_dist.parallel.topology import Topology

Arrays = Mapping[str, NDArray[Any]]


class Chunk(NamedTuple):
    """The samples of one set that are computed together; the last chunk of a set may have fewer than a batch."""

    set: str
    number: int
    samples: range

    @property
    def file(self) -> str:
        return f"{self.set}-{self.number:06d}.npz"


class ChunkFolder(OutputFolder):
    """A folder of results made from chunks: ``count`` samples of each of ``sets``, ``batch`` at a time.

    out: the folder, which the config key ``out`` names.
    identity: everything that decides the chunks' bytes; results of another one in ``out`` are refused.
    results: the files that are written into ``out`` in the end, before ``finish``.
    """

    def __init__(
        self,
        out: Path,
        identity: Mapping[str, Any],
        results: Sequence[str],
        topology: Topology,
        sets: Sequence[str],
        count: int,
        batch: int,
    ) -> None:
        super().__init__(out, identity, key="out")
        self._results, self._topology, self._several = [out / name for name in results], topology, len(sets) > 1
        spans = [range(first, min(first + batch, count)) for first in range(0, count, batch)]
        self._chunks = [Chunk(name, number, span) for name in sets for number, span in enumerate(spans)]

    def missing(self) -> list[Chunk] | None:
        """The chunks to make; None, which is said, where all results of this very job are there (collective).

        Raises UserError on every rank where they are those of another job, naming what differs, or OUT cannot be
        written.
        """
        missing = self._topology.broadcast_from_rank0(self._missing)
        if missing is None:
            self._topology.log0(f"{self.folder}: complete already")
        return missing

    def _missing(self) -> list[Chunk] | None:
        if self.finished(self._results) is not None:
            return None
        self.begin(self._results, refuse_empty=True)
        return [chunk for chunk in self._chunks if self._intact(chunk) is None]

    def make(
        self, chunks: Sequence[Chunk], label: str, made: Callable[[Sequence[Chunk]], Iterable[tuple[Chunk, Arrays]]]
    ) -> None:
        """Compute and keep these chunks; returns when all are done (collective).

        made: chunks -> each with its arrays, which are kept before the next is asked for.
        They are shared out over the data-parallel ranks: those that share a model compute the same chunks together.
        """
        topology = self._topology
        mine = chunks[topology.dp_rank :: topology.dp]
        total = sum(len(chunk.samples) for chunk in mine)
        with main_rank_progress(label, total, topology.rank, topology.world) as progress:
            for chunk, arrays in made(mine):
                if topology.tp_rank == 0:
                    content = io.BytesIO()
                    np.savez(content, **arrays)  # type: ignore[arg-type]
                    write_bytes(self.parts / chunk.file, content.getvalue())
                if progress is not None:
                    progress.advance(len(chunk.samples), chunk.set if self._several else None)
        topology.barrier()

    def load(self, name: str) -> Iterator[tuple[Chunk, Arrays]]:
        """The chunks of one set with their arrays, in order. Raises UserError when one is gone or damaged."""
        for chunk in self._chunks:
            if chunk.set == name:
                arrays = self._intact(chunk)
                if arrays is None:
                    raise UserError(f"{self.parts / chunk.file}: missing or damaged; run the same command again")
                yield chunk, arrays

    def _intact(self, chunk: Chunk) -> Arrays | None:
        try:
            with np.load(self.parts / chunk.file, allow_pickle=False) as file:
                return {key: file[key] for key in file.files}
        except (OSError, ValueError, EOFError, zipfile.BadZipFile):
            return None  # it is simply made again


def write_npz(
    path: Path,
    labels: NDArray[np.int64] | None,
    count: int,
    blocks: Iterable[NDArray[np.uint8]],
    more: Arrays = MappingProxyType({}),
) -> None:
    """``arr_0`` uint8 [count, H, W, 3] from consecutive blocks, one in memory at a time, and ``labels`` int64 [count].

    more: other arrays by name. With a count of 0 there is no ``arr_0``.
    Written aside and renamed; the same content gives the same bytes. ValueError when the blocks do not add up.
    """
    with written_aside(path) as aside, zipfile.ZipFile(aside, "w", zipfile.ZIP_STORED, allowZip64=True) as archive:
        if count:
            _write_pictures(archive, count, blocks)
        others = more if labels is None else {"labels": labels, **more}
        for name, array in others.items():
            with archive.open(zipfile.ZipInfo(f"{name}.npy"), "w") as file:
                np.lib.format.write_array(file, array, allow_pickle=False)


def _write_pictures(archive: zipfile.ZipFile, count: int, blocks: Iterable[NDArray[np.uint8]]) -> None:
    with archive.open(zipfile.ZipInfo("arr_0.npy"), "w", force_zip64=True) as file:
        written = 0
        for block in blocks:
            if written == 0:
                header = {"descr": "|u1", "fortran_order": False, "shape": (count, *block.shape[1:])}
                np.lib.format.write_array_header_1_0(file, header)
            file.write(np.ascontiguousarray(block).data)
            written += len(block)
        if written != count:
            raise ValueError(f"{written} pictures for {count}")
