"""What the model drew, class by class or caption by caption, and what the tokenizer keeps, as image grids."""

from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from llamagen_dist.data.images import load_images
from llamagen_dist.data.shards import open_shards
from llamagen_dist.errors import UserError
from llamagen_dist.report.blocks import ImageGrid
from llamagen_dist.report.collect import Pictures, Run
from llamagen_dist.sampling.grid import mosaic, shown_classes

ROWS, COLUMNS = 2, 4
PER_CLASS = 2
_LARGEST = 96  # pixels of a sample in the report, twice that of a reconstruction; larger ones are shown smaller


def condition(pictures: Pictures) -> str:
    return "caption" if "has caption" in str(pictures.record.get("conditions")) else "class"


def samples(pictures: Pictures) -> ImageGrid:
    """One tile per class or caption: its first ROWS x COLUMNS pictures, none left out."""
    images, what = pictures.images, condition(pictures)
    groups, number = _groups(pictures, ROWS * COLUMNS)
    tiles = []
    for _, members in groups:
        first = images.read(members)
        rows = [first[row * COLUMNS : (row + 1) * COLUMNS] for row in range(ROWS)]
        tiles.append(mosaic(rows, COLUMNS, _LARGEST, 16))
    plural = {"class": "classes", "caption": "captions"}[what]
    every = f"every {what}" if len(groups) == number else f"{len(groups)} of {number} {plural}"
    caption = (
        f"The first {ROWS * COLUMNS} samples of {every}, in the order in which they were drawn and without a choice; "
        f"{_size(pictures, _LARGEST)}."
    )
    return ImageGrid(np.stack(tiles), _names(pictures, groups, what), width=240, caption=caption)


def reconstructions(rebuilt: Pictures, held_out: Path | None) -> ImageGrid:
    """One tile per class: originals on top, reconstructions below.

    held_out: image shards of the originals; None: they are gone, which is said.
    """
    groups, number = _groups(rebuilt, PER_CLASS)
    tiles = []
    for _, members in groups:
        rows = [rebuilt.images.read(members)]
        if held_out is not None:
            rows.insert(0, load_images(open_shards(held_out, "images"), members.tolist(), rebuilt.images.height))
        tiles.append(mosaic(rows, PER_CLASS, 2 * _LARGEST, 28))
    every = "every class" if len(groups) == number else f"{len(groups)} classes"
    order = (
        "Decoded from their tokens; the shards of the originals are not there to stand above them."
        if held_out is None
        else "Upper row of each tile: the original; lower row: decoded from its tokens."
    )
    caption = f"The first held-out images of {every}, {_size(rebuilt, 2 * _LARGEST)}. {order}"
    return ImageGrid(np.stack(tiles), _names(rebuilt, groups, "class"), width=176, caption=caption)


def validated(run: Run) -> ImageGrid | None:
    """The reconstructions that a tokenizer's run drew last; None without any."""
    drawn = sorted(run.folder.glob("pictures/step_*/reconstructions.png"))
    if not drawn:
        return None
    try:
        pixels = np.asarray(Image.open(drawn[-1]).convert("RGB"))
    except (OSError, ValueError) as error:
        raise UserError(f"{drawn[-1]}: cannot be read ({error}); delete it") from None
    step = int(drawn[-1].parent.name.removeprefix("step_"))
    caption = f"Held-out images (upper row) and their reconstructions (lower row) after step {step:,}."
    return ImageGrid(pixels[None], width=1024, caption=caption)


def _groups(pictures: Pictures, each: int) -> tuple[list[tuple[int, NDArray[np.int64]]], int]:
    """[(label, numbers of its first pictures)] of at most MOST_CLASSES labels, and of how many there are.

    Without labels consecutive pictures stand together.
    """
    labels = pictures.images.labels
    if labels is None:
        labels = np.arange(pictures.images.count) // each
    present = sorted(set(labels.tolist()))
    return [(label, np.flatnonzero(labels == label)[:each]) for label in shown_classes(present)], len(present)


def _names(pictures: Pictures, groups: list[tuple[int, NDArray[np.int64]]], what: str) -> tuple[str, ...]:
    if pictures.images.labels is None:
        return ()
    return tuple(pictures.names[n] if n < len(pictures.names) else f"{what} {n}" for n, _ in groups)


def _size(pictures: Pictures, largest: int) -> str:
    height, width = pictures.images.height, pictures.images.width
    return f"{height} × {width} pixels" + (f", shown at {largest}" if height > largest else "")
