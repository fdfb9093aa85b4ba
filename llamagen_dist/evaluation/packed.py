"""Pictures of a compressed .npz, read through the compressed stream: in memory are those that are asked for.

A stream has no random access: whoever reads in ascending order unpacks the file once, and a step back starts it again.
The checksum of the whole is compared when the last picture is read.
"""

import math
import zipfile
import zlib
from pathlib import Path
from typing import IO, NamedTuple

import numpy as np
from numpy.typing import NDArray

from llamagen_dist.errors import UserError


class Header(NamedTuple):
    """Of an .npy member. start: the first byte of its numbers."""

    shape: tuple[int, ...]
    dtype: np.dtype
    start: int


class PackedPixels:
    """One array [n, ...] in row order. Raises ValueError where the member is not as long as its header says."""

    def __init__(self, path: Path, entry: zipfile.ZipInfo, header: Header) -> None:
        self.path, self._entry, self._start = path, entry, header.start
        self.shape, self.dtype = header.shape, header.dtype
        self._row = math.prod(self.shape[1:]) * self.dtype.itemsize
        if header.start + self.shape[0] * self._row != entry.file_size:
            raise ValueError(f"{entry.filename} ends too early")
        self._stream: IO[bytes] | None = None

    def __len__(self) -> int:
        return self.shape[0]

    def read(self, indices: NDArray[np.int64]) -> NDArray[np.uint8]:
        """[n, ...]. Raises UserError, naming the picture, where the stream is damaged."""
        rows = np.empty((len(indices), *self.shape[1:]), self.dtype)
        for row, index in sorted(enumerate(indices.tolist()), key=lambda pair: pair[1]):
            try:
                if self._stream is None:
                    self._stream = zipfile.ZipFile(self.path).open(self._entry)  # noqa: SIM115 - stays open between calls
                self._stream.seek(self._start + index * self._row)
                data = self._stream.read(self._row)
                if index == len(self) - 1:
                    self._stream.read(1)  # the end, where the checksum is compared
                rows[row] = np.frombuffer(data, self.dtype).reshape(self.shape[1:])
            except (OSError, ValueError, EOFError, zlib.error, zipfile.BadZipFile) as error:
                raise UserError(
                    f"{self.path}: picture {index} of {len(self)} cannot be unpacked ({error}); make or copy it again"
                ) from None
        return rows
