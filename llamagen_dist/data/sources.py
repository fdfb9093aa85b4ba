"""Where packed images come from: the embedded data set, a folder with one sub-folder per class, or an .npz
file.
"""

import hashlib
import os
import zipfile
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from llamagen_dist.config import UserError
from llamagen_dist.data import fashion_mnist
from llamagen_dist.data.images import decode
from llamagen_dist.files import sha256_file

ENDINGS = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")
_KEPT_FORMATS = {".jpg": ".jpg", ".jpeg": ".jpg"}  # stored as they are when nothing is resized


class Source(Protocol):
    """Labelled images by number."""

    name: str
    fingerprint: str
    """Changes when the images do (for a folder: when their names or sizes in bytes do)."""
    classes: list[str] | None
    labels: NDArray[np.int64] | None
    uniform_size: tuple[int, int] | None
    """(width, height) where all images are known to share it."""

    def __len__(self) -> int: ...

    def title(self, number: int) -> str:
        """How to name image ``number`` to a person."""
        ...

    def image(self, number: int) -> Image.Image:
        """RGB. Raises one of images.DECODE_ERRORS when it cannot be decoded."""
        ...

    def original(self, number: int) -> tuple[str, bytes] | None:
        """(member, bytes) to store when nothing is resized; None: store it as PNG."""
        ...


class ArraySource:
    """uint8 pixels in memory: [n, H, W, 3] or [n, H, W] (grey)."""

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

    def image(self, number: int) -> Image.Image:
        return Image.fromarray(self.pixels[number]).convert("RGB")

    def original(self, number: int) -> None:
        return None


class FolderSource:
    """One sub-folder per class, labels in the order of the sorted class names; files may lie deeper."""

    uniform_size: tuple[int, int] | None = None

    def __init__(self, folder: Path) -> None:
        self.name, self._folder = str(folder), folder
        entries = sorted(entry for entry in folder.iterdir() if not entry.name.startswith("."))
        loose = [entry for entry in entries if entry.is_file() and entry.suffix.lower() in ENDINGS]
        if loose:
            raise UserError(
                f"{folder}: {len(loose)} images lie outside a class folder, the first is {loose[0].name}: "
                "their labels are missing; move each into a sub-folder named after its class"
            )
        self.classes: list[str] | None = [entry.name for entry in entries if entry.is_dir()]
        self._paths: list[str] = []
        labels: list[int] = []
        digest = hashlib.sha256()
        for label, name in enumerate(self.classes or []):
            found = sorted(_images_below(folder / name))
            if not found and len(self.classes or []) > 1:
                raise UserError(f"{folder / name}: no images in this class folder; remove it, or put images there")
            for path, size in found:
                relative = os.path.relpath(path, folder)
                digest.update(f"{relative}\0{size}\0".encode(errors="surrogateescape"))
                self._paths.append(relative)
                labels.append(label)
        if not self._paths:
            raise UserError(
                f"{folder}: no images found; expected one sub-folder per class with files ending in "
                f"{', '.join(ENDINGS)}"
            )
        self.labels: NDArray[np.int64] | None = np.array(labels, np.int64)
        self.fingerprint = digest.hexdigest()

    def __len__(self) -> int:
        return len(self._paths)

    def title(self, number: int) -> str:
        return self._paths[number]

    def image(self, number: int) -> Image.Image:
        return decode((self._folder / self._paths[number]).read_bytes())

    def original(self, number: int) -> tuple[str, bytes] | None:
        path = self._folder / self._paths[number]
        member = _KEPT_FORMATS.get(path.suffix.lower())
        return (member, path.read_bytes()) if member and path.read_bytes()[:2] == b"\xff\xd8" else None


def _images_below(folder: Path) -> list[tuple[str, int]]:
    """(path, bytes) of every image file at any depth; hidden files and folders are left out."""
    found = []
    for root, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in names:
            if not name.startswith(".") and name.lower().endswith(ENDINGS):
                path = os.path.join(root, name)
                found.append((path, os.path.getsize(path)))
    return found


def _npz_source(path: Path) -> ArraySource:
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in ("arr_0", "arr_1", "labels") if name in file.files}
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
        return ArraySource(path.name, sha256_file(path), pixels, None, None)
    if labels.shape != (len(pixels),) or not np.issubdtype(labels.dtype, np.integer) or labels.min() < 0:
        raise UserError(
            f"{path}: the labels must be {len(pixels)} integers from 0 (one per image), but they are "
            f"{labels.dtype} {list(labels.shape)}"
        )
    classes = [str(label) for label in range(int(labels.max()) + 1)]
    return ArraySource(path.name, sha256_file(path), pixels, labels.astype(np.int64), classes)


def open_source(source: str) -> Source:
    """``builtin:fashion-mnist``, a folder or an .npz file. Raises UserError for anything else, or without
    images.
    """
    if source.startswith("builtin:"):
        if source != f"builtin:{fashion_mnist.NAME}":
            raise UserError(f"{source}: unknown; the one embedded data set is builtin:{fashion_mnist.NAME}")
        pixels, labels = fashion_mnist.load()
        return ArraySource(source, fashion_mnist.SHA256, pixels, labels, list(fashion_mnist.CLASSES))
    path = Path(source)
    if path.is_dir():
        return FolderSource(path)
    if path.is_file() and path.suffix == ".npz":
        return _npz_source(path)
    what = "not a folder or an .npz file" if path.exists() else "no such folder or file"
    raise UserError(
        f"{source}: {what}; give a folder with one sub-folder per class, an .npz file with arr_0, or "
        f"builtin:{fashion_mnist.NAME}"
    )
