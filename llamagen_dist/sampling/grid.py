"""Pictures side by side, one row or column per class, with the class names written beside them."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from llamagen_dist.config import UserError
from llamagen_dist.files import written_aside

SMALLEST_TILE = 72  # pixels; smaller pictures are enlarged by whole factors without smoothing
LARGEST_TILE = 256
MOST_CLASSES = 20
_GAP, _MARGIN = 4, 10
_PAPER, _INK = (255, 255, 255), (24, 24, 27)


def class_grid(
    images: NDArray[np.uint8], labels: NDArray[np.int64], classes: Sequence[str], per_class: int = 10
) -> Image.Image:
    """One row per class, in the order in which they first appear: its name, then its first ``per_class`` pictures.

    At most MOST_CLASSES rows, evenly spread over the classes.
    images: uint8 [n, S, S, 3]; labels: int64 [n]; classes: names by label.
    """
    present = shown_classes(list(dict.fromkeys(labels.tolist())))
    rows = [(classes[label], images[np.nonzero(labels == label)[0][:per_class]]) for label in present]
    tile = tile_side(images.shape[1])
    font = ImageFont.load_default(size=max(14, tile // 6))
    gutter = max(int(font.getlength(name)) for name, _ in rows) + 2 * _MARGIN
    columns = max(len(members) for _, members in rows)
    width = gutter + columns * (tile + _GAP) - _GAP + _MARGIN
    height = len(rows) * (tile + _GAP) - _GAP + 2 * _MARGIN
    page = Image.new("RGB", (width, height), _PAPER)
    pen = ImageDraw.Draw(page)
    for row, (name, members) in enumerate(rows):
        top = _MARGIN + row * (tile + _GAP)
        pen.text((gutter - _MARGIN, top + tile // 2), name, _INK, font, anchor="rm")
        for column, image in enumerate(members):
            page.paste(enlarged(image, tile), (gutter + column * (tile + _GAP), top))
    return page


def save(
    path: Path, images: NDArray[np.uint8], labels: NDArray[np.int64], classes: Sequence[str], per_class: int = 10
) -> None:
    """Write ``class_grid`` of these, aside and renamed. Raises UserError: another ending, or not writable."""
    form = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG"}.get(path.suffix.lower())
    if form is None:
        raise UserError(f"{path}: write the pictures to a file that ends in .png or .jpg")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with written_aside(path) as aside:
            class_grid(images, labels, classes, per_class).save(aside, form)
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror or error})") from None


def shown_classes(labels: Sequence[int]) -> list[int]:
    """All of them, or MOST_CLASSES evenly spread over the list."""
    if len(labels) <= MOST_CLASSES:
        return list(labels)
    return [labels[i * len(labels) // MOST_CLASSES] for i in range(MOST_CLASSES)]


def tile_side(size: int) -> int:
    """Pixels along a side at which a picture of ``size`` pixels is shown."""
    return min(size * max(1, -(-SMALLEST_TILE // size)), LARGEST_TILE)


def enlarged(image: NDArray[np.uint8], side: int) -> Image.Image:
    """uint8 [S, S, 3] at ``side`` x ``side`` pixels: nearest neighbour upwards, Lanczos downwards."""
    picture = Image.fromarray(image)
    method = Image.Resampling.NEAREST if side >= picture.width else Image.Resampling.LANCZOS
    return picture if side == picture.width else picture.resize((side, side), method)
