"""Pixels in memory: the embedded data set and .npz files."""

import os
import zipfile
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from llamagen_dist.data.sources.classes import ClassMap
from llamagen_dist.data.sources.source import Caption
from llamagen_dist.errors import UserError
from llamagen_dist.files import sha256_file

_ARRAYS = ("arr_0", "arr_1", "labels")


class ArraySource:
    """uint8 pixels: [n, H, W, 3] or [n, H, W] (grey)."""

    captioned = False
    repeats = 0

    def __init__(
        self, name: str, fingerprint: str, pixels: NDArray[np.uint8], labels: NDArray[np.int64] | None,
        classes: list[str] | None,
    ) -> None:  # fmt: skip
        self.name, self.fingerprint, self.pixels = name, fingerprint, pixels
        self.labels, self.classes = labels, classes
        self.uniform_size: tuple[int, int] | None = (pixels.shape[2], pixels.shape[1])

    def __len__(self) -> int:
        return len(self.pixels)

    def title(self, number: int) -> str:
        return f"{self.name}[{number}]"

    def picture(self, number: int) -> Image.Image:
        return Image.fromarray(self.pixels[number]).convert("RGB")

    def caption(self, number: int) -> Caption:
        raise ValueError("no caption")


def npz_source(path: Path, class_map: ClassMap | None) -> ArraySource:
    """arr_0 uint8 [n, H, W, 3] or [n, H, W], and arr_1 or labels: integers [n]. Raises UserError for anything else."""
    try:
        _check_memory(path)
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in _ARRAYS if name in file.files}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise UserError(f"{path}: not a readable .npz file ({error})") from None
    pixels = arrays.get("arr_0")
    shape = None if pixels is None else pixels.shape
    grey_or_rgb = shape is not None and (len(shape) == 3 or (len(shape) == 4 and shape[3] == 3))
    if pixels is None or pixels.dtype != np.uint8 or not grey_or_rgb:
        found = "nothing" if pixels is None else f"{pixels.dtype} {list(pixels.shape)}"
        raise UserError(f"{path}: arr_0 must be uint8 [images, height, width, 3], but it is {found}")
    if not pixels.size:
        raise UserError(f"{path}: no images found (arr_0 is empty)")
    labels = arrays.get("labels", arrays.get("arr_1"))
    if labels is None:
        if class_map is not None:
            raise UserError(f"{path}: a class map was given, but the file has no labels")
        return ArraySource(path.name, sha256_file(path), pixels, None, None)
    if labels.shape != (len(pixels),) or not np.issubdtype(labels.dtype, np.integer) or labels.min() < 0:
        raise UserError(
            f"{path}: the labels must be {len(pixels)} integers from 0 (one per image), but they are "
            f"{labels.dtype} {list(labels.shape)}"
        )
    labels, classes = labels.astype(np.int64), [str(label) for label in range(int(labels.max()) + 1)]
    if class_map is not None:
        labels, classes = class_map.numbers(labels, str(path))
    return ArraySource(path.name, sha256_file(path), pixels, labels, classes)


def _check_memory(path: Path) -> None:
    """A small .npz may unpack to any size, and all of it goes into memory."""
    with zipfile.ZipFile(path) as archive:
        needed = sum(item.file_size for item in archive.infolist() if item.filename.removesuffix(".npy") in _ARRAYS)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if needed > memory:
        raise UserError(
            f"{path}: unpacks to {needed / 1e9:,.1f} GB, more than this machine's {memory / 1e9:,.1f} GB of "
            "memory; cut it into several files, or pack a folder of images"
        )
