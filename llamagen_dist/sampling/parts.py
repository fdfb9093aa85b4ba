"""Work cut into chunks that any number of ranks share out, kept one by one until all are there.

A chunk is what one fixed batch shape holds, so its bytes depend neither on the number of ranks nor on where an earlier
process was cut off. Finished chunks lie in OUT/.parts as .npz files, whose checksums are tested when they are read;
record.json is written last and says what OUT was made from.
"""

import io
import json
import shutil
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from llamagen_dist.errors import UserError
from llamagen_dist.files import as_json, write_bytes, written_aside

RECORD = "record.json"
T = TypeVar("T")


class Parts:
    """The chunks of one job. identity: everything that decides their bytes; another one in OUT is refused."""

    def __init__(self, out: Path, identity: Mapping[str, Any], results: Sequence[str]) -> None:
        self.out, self.identity, self.results = out, as_json(identity), tuple(results)
        self._folder = out / ".parts"

    def complete(self) -> bool:
        """Whether OUT holds all results of this very job. Creates OUT otherwise. Rank 0 only.

        Raises UserError where it holds those of another one, naming what differs, or cannot be written.
        """
        found = _json(self.out / RECORD)
        if found is not None:
            self._same({key: found.get(key) for key in self.identity}, "holds results")
            if all((self.out / name).exists() for name in self.results):
                return True
        started = _json(self._folder / "job.json")
        if started is not None:
            self._same(started, "holds an unfinished job")
        elif found is None and (there := [name for name in self.results if (self.out / name).exists()]):
            raise UserError(f"out: {self.out} holds {', '.join(there)}, but no {RECORD}; choose another folder")
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            write_bytes(self._folder / "job.json", json.dumps(self.identity).encode())
        except OSError as error:
            raise UserError(f"out: {self.out} cannot be written ({error.strerror}); choose another folder") from None
        return False

    def _same(self, old: Mapping[str, Any], what: str) -> None:
        keys = [*self.identity, *(key for key in old if key not in self.identity)]
        changed = [f"{k}: {old.get(k)} -> {self.identity.get(k)}" for k in keys if old.get(k) != self.identity.get(k)]
        if changed:
            raise UserError(
                f"out: {self.out} {what} of another config ({'; '.join(changed)}); choose another folder, or use the "
                "old values"
            )

    def missing(self, names: Iterable[str]) -> list[str]:
        """The names of chunks that are not there or damaged, in order. Rank 0 only: it reads what is there."""
        return [name for name in names if self._intact(name) is None]

    def save(self, name: str, **arrays: NDArray[Any]) -> None:
        """Keep one chunk: written aside, synced, renamed."""
        content = io.BytesIO()
        np.savez(content, **arrays)  # type: ignore[arg-type]
        write_bytes(self._folder / f"{name}.npz", content.getvalue())

    def load(self, name: str) -> dict[str, NDArray[Any]]:
        """The arrays of one chunk. Raises UserError when it is gone or damaged."""
        arrays = self._intact(name)
        if arrays is None:
            raise UserError(f"{self._folder / name}.npz: missing or damaged; run the same command again")
        return arrays

    def _intact(self, name: str) -> dict[str, NDArray[Any]] | None:
        path = self._folder / f"{name}.npz"
        if not path.exists():
            return None
        try:
            with np.load(path, allow_pickle=False) as file:
                return {key: file[key] for key in file.files}
        except (OSError, ValueError, EOFError, zipfile.BadZipFile):
            return None

    def finish(self, record: Mapping[str, Any]) -> None:
        """Write record.json (identity first) and forget the chunks. Rank 0 only, after the results."""
        content = self.identity | as_json(record)
        write_bytes(self.out / RECORD, (json.dumps(content, indent=1, ensure_ascii=False) + "\n").encode())
        shutil.rmtree(self._folder)


def _json(path: Path) -> dict[str, Any] | None:
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({error}); choose another folder for the results") from None


def write_npz(path: Path, labels: NDArray[np.int64] | None, count: int, blocks: Iterable[NDArray[np.uint8]]) -> None:
    """``arr_0`` uint8 [count, H, W, 3] from consecutive blocks, one in memory at a time, and ``labels`` int64 [count].

    Written aside and renamed; the same content gives the same bytes. ValueError when the blocks do not add up.
    """
    with written_aside(path) as aside, zipfile.ZipFile(aside, "w", zipfile.ZIP_STORED, allowZip64=True) as archive:
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
        if labels is not None:
            with archive.open(zipfile.ZipInfo("labels.npy"), "w") as file:
                np.lib.format.write_array(file, labels, allow_pickle=False)
