"""Folders and zips of PNG and JPEG pictures as image sets: sorted by name, eight-bit RGB, one size.

Only the header of every file is read when a set is opened. What would have to be converted by some rule (grey, alpha,
16 bits) is refused: another rule makes another score.
"""

import io
import os
import zipfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFile

from llamagen_dist.config.pack import MOST_PIXELS
from llamagen_dist.data.decode import DECODE_ERRORS
from llamagen_dist.data.images import center_crop
from llamagen_dist.errors import UserError

ENDINGS = (".png", ".jpg", ".jpeg")
_OTHERS = (".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".npy")
_CONVERT = "convert it to 8-bit RGB, or pack the pictures (llamagen pack), which says what it converts"


class PictureFiles:
    """The pictures of a folder (and its sub-folders) or of a zip, in the order of their relative names.

    Raises UserError: no pictures, pictures of other kinds among them, grey, alpha or 16 bits, other than one size where
    image_size does not say to which size they are centre-cropped.
    """

    def __init__(self, path: Path, image_size: int | None = None) -> None:
        self.path, self.crop = path, image_size
        self._zip = _opened_zip(path) if path.is_file() else None
        every = sorted(self._zip.namelist() if self._zip is not None else _below(path))
        shown = [name for name in every if not any(part.startswith(".") for part in Path(name).parts)]
        self.names = [name for name in shown if name.lower().endswith(ENDINGS)]
        """Relative to the folder, or in the zip."""
        if others := [name for name in shown if name.lower().endswith(_OTHERS)]:
            raise UserError(f"{path}: holds {others[0]}, but only PNG and JPEG pictures are read from folders and zips")
        if not self.names:
            raise UserError(f"{path}: holds no PNG or JPEG pictures")
        self.height, self.width = self._one_size()

    def __len__(self) -> int:
        return len(self.names)

    def read(self, indices: NDArray[np.int64]) -> NDArray[np.uint8]:
        """uint8 [n, H, W, 3]. Raises UserError, naming the file, for one that cannot be decoded."""
        pixels = np.empty((len(indices), self.height, self.width, 3), np.uint8)
        for row, index in enumerate(indices.tolist()):
            name = self.names[index]
            try:
                with Image.open(io.BytesIO(self._bytes(name))) as image:
                    rgb = image.convert("RGB")  # of a palette; RGB stays as it is
                pixels[row] = np.asarray(rgb if self.crop is None else center_crop(rgb, self.crop))
            except (*DECODE_ERRORS, zipfile.BadZipFile) as error:
                raise UserError(f"{self.path}: {name} cannot be decoded ({error})") from None
        return pixels

    def _bytes(self, name: str) -> bytes:
        return self._zip.read(name) if self._zip is not None else (self.path / name).read_bytes()

    def _one_size(self) -> tuple[int, int]:
        first: tuple[int, int] | None = None
        for name in self.names:
            try:
                source = io.BytesIO(self._zip.read(name)) if self._zip is not None else self.path / name
                with Image.open(source) as image:
                    if (why := _unlike_rgb(image)) is not None:
                        raise UserError(f"{self.path}: {name} {why}; {_CONVERT}")
                    size = image.size
            except (*DECODE_ERRORS, zipfile.BadZipFile) as error:
                raise UserError(f"{self.path}: {name} cannot be decoded ({error})") from None
            first = first or size
            if self.crop is None and size != first:
                raise UserError(
                    f"{self.path}: {self.names[0]} has {first[0]} x {first[1]} pixels and {name} has {size[0]} x "
                    f"{size[1]}; set image_size, to which they are centre-cropped"
                )
        assert first is not None
        return (self.crop, self.crop) if self.crop is not None else (first[1], first[0])


def _below(folder: Path) -> Iterator[str]:
    for where, _, files in os.walk(folder, followlinks=True):
        for file in files:
            yield os.path.relpath(os.path.join(where, file), folder)


def _opened_zip(path: Path) -> zipfile.ZipFile:
    try:
        return zipfile.ZipFile(path)
    except (OSError, zipfile.BadZipFile) as error:
        raise UserError(f"{path}: cannot be read as a zip ({error}); make or copy it again") from None


def _unlike_rgb(image: ImageFile.ImageFile) -> str | None:
    """What makes a picture (its header is read) more or less than 8-bit RGB; None for nothing."""
    if image.width * image.height > MOST_PIXELS:
        return f"has {image.width} x {image.height} pixels, more than the limit of {MOST_PIXELS:,}"
    layout = str(image.tile[0].args) if image.tile else ""  # PIL cuts 16-bit colours to 8 and shows it only here
    if ";16" in layout or image.mode.startswith(("I", "F")):
        return "has 16 bits per value"
    if image.has_transparency_data:
        return "has an alpha channel"
    if image.mode in ("1", "L"):
        return "is grey"
    return None if image.mode in ("RGB", "P") else f"is {image.mode}"
