"""A folder with one sub-folder per class."""

import hashlib
import os
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from llamagen_dist.data.index import printable
from llamagen_dist.data.sources.classes import ClassMap, folder_classes
from llamagen_dist.data.sources.source import ENDINGS, Caption
from llamagen_dist.errors import UserError


class FolderSource:
    """Labels in the order of the sorted class names, or of the class map; files may lie deeper.

    Raises UserError: no images, images outside a class folder, a class folder without images.
    """

    uniform_size: tuple[int, int] | None = None
    captioned = False
    repeats = 0

    def __init__(self, folder: Path, class_map: ClassMap | None = None) -> None:
        self.name, self._folder = str(folder), folder
        entries = sorted(entry for entry in folder.iterdir() if not entry.name.startswith("."))
        loose = [entry for entry in entries if entry.is_file() and entry.suffix.lower() in ENDINGS]
        if loose:
            raise UserError(
                f"{folder}: {len(loose)} images lie outside a class folder, the first is {printable(loose[0].name)}: "
                "their labels are missing; move each into a sub-folder named after its class"
            )
        names = [entry.name for entry in entries if entry.is_dir()]
        label_of, classes = folder_classes(names, class_map, str(folder))
        self.classes: list[str] | None = classes
        self._paths: list[str] = []
        labels: list[int] = []
        digest = hashlib.sha256()
        for name in names:
            found = sorted(_images_below(folder / name))
            if not found and len(names) > 1:
                raise UserError(f"{folder / name}: no images in this class folder; remove it, or put images there")
            for path, size in found:
                relative = os.path.relpath(path, folder)
                digest.update(f"{relative}\0{size}\0".encode(errors="surrogateescape"))
                self._paths.append(relative)
                labels.append(label_of[name])
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
        return printable(self._paths[number])

    def picture(self, number: int) -> bytes:
        return (self._folder / self._paths[number]).read_bytes()

    def caption(self, number: int) -> Caption:
        raise ValueError("no caption")


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
