"""Pictures side by side: one row per class with its name, or a contact sheet with a few words under each."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo

from llamagen_dist.errors import UserError
from llamagen_dist.files import written_aside

SMALLEST_TILE = 72  # pixels; smaller pictures are enlarged by whole factors without smoothing
LARGEST_TILE = 256
MOST_CLASSES = 20
LARGEST_SHEET = 1600  # pixels across a contact sheet, unless four pictures need more
TEXT_LINES = 5
_WIDEST_NAME = 300  # pixels; longer names (captions) are broken into lines
_GAP, _MARGIN = 4, 10
_PAPER, _INK = (255, 255, 255), (24, 24, 27)


def class_grid(
    images: NDArray[np.uint8],
    labels: NDArray[np.int64],
    name: Callable[[int], str],
    per_class: int = 10,
    originals: Callable[[list[int]], NDArray[np.uint8] | None] = lambda labels: None,
) -> Image.Image:
    """One row per class or caption, in the order in which they first appear: its name, then its first ``per_class``
    pictures.

    At most MOST_CLASSES rows, evenly spread over the classes.
    images: uint8 [n, S, S, 3]; labels: int64 [n]; name: a label in words. originals: pictures (uint8 [rows, S, S, 3])
    to compare with, in a column of their own before the others; None: there are none.
    """
    present = shown_classes(list(dict.fromkeys(labels.tolist())))
    tile = tile_side(images.shape[1])
    letters = max(14, tile // 6)
    font = ImageFont.load_default(size=letters)
    rows = [(_lines(name(label), font), images[np.nonzero(labels == label)[0][:per_class]]) for label in present]
    compared = originals(present)
    gutter = max(int(font.getlength(line)) for lines, _ in rows for line in lines.split("\n")) + 2 * _MARGIN
    aside = 0 if compared is None else tile + 3 * _GAP
    header = 0 if compared is None else letters + _MARGIN
    columns = max(len(members) for _, members in rows)
    width = int(gutter + aside + columns * (tile + _GAP) - _GAP + _MARGIN)
    height = int(header + len(rows) * (tile + _GAP) - _GAP + 2 * _MARGIN)
    page = Image.new("RGB", (width, height), _PAPER)
    pen = ImageDraw.Draw(page)
    if compared is not None:
        pen.text((gutter, _MARGIN), "original", _INK, font)
        pen.text((gutter + aside, _MARGIN), "drawn", _INK, font)
    for row, (lines, members) in enumerate(rows):
        top = int(_MARGIN + header + row * (tile + _GAP))
        pen.multiline_text((gutter - _MARGIN, top + tile // 2), lines, _INK, font, anchor="rm", align="right")
        if compared is not None:
            page.paste(enlarged(compared[row], tile), (gutter, top))
        for column, image in enumerate(members):
            page.paste(enlarged(image, tile), (gutter + aside + column * (tile + _GAP), top))
    return page


def contact_sheet(pictures: Sequence[Image.Image], texts: Sequence[str], title: str = "") -> Image.Image:
    """Pictures of any sizes in reading order, ten or fewer to a row, each whole and with its text wrapped below it.

    texts: one for each picture; its first line is shortened to one, all of it to TEXT_LINES. title: above them all.
    """
    tile = max(tile_side(max(picture.size)) for picture in pictures)
    columns = min(10, max(4, LARGEST_SHEET // tile), len(pictures))
    size = max(11, tile // 10)
    font, line = ImageFont.load_default(size), round(1.25 * size)
    wrapped = [_wrapped(text, font, tile) for text in texts]
    across = tile + 3 * _GAP
    rows = [range(first, min(first + columns, len(pictures))) for first in range(0, len(pictures), columns)]
    below = [line * max(len(wrapped[number]) for number in row) + 3 * _GAP for row in rows]
    top = _MARGIN + (2 * line if title else 0)
    width = 2 * _MARGIN + max(columns * across - 3 * _GAP, int(font.getlength(title)))
    page = Image.new("RGB", (width, top + sum(below) + len(rows) * tile + _MARGIN), _PAPER)
    pen = ImageDraw.Draw(page)
    pen.text((_MARGIN, _MARGIN), title, _INK, font)
    for row, height in zip(rows, below, strict=True):
        for column, number in enumerate(row):
            left = _MARGIN + column * across
            shown = _fitted(pictures[number].convert("RGB"), tile)
            page.paste(shown, (left + (tile - shown.width) // 2, top + (tile - shown.height) // 2))
            for below_tile, words in enumerate(wrapped[number]):
                pen.text((left, top + tile + _GAP + below_tile * line), words, _INK, font)
        top += tile + height
    return page


def labelled_grid(
    cells: NDArray[np.uint8], row_names: Sequence[str], column_names: Sequence[str], title: str
) -> Image.Image:
    """Pictures in a table with a name before every row and above every column, and a title over all.

    cells: uint8 [rows, columns, S, S, 3]. A name that several columns beside each other have stands over them once, and
    there is more space before the next one.
    """
    tile = tile_side(cells.shape[2])
    font = ImageFont.load_default(size=max(14, tile // 10))
    line = round(1.4 * font.getbbox("Ag")[3])
    heading = _lines(title, font)
    gutter = int(max(font.getlength(name) for name in row_names)) + 2 * _MARGIN
    begins = [number == 0 or name != column_names[number - 1] for number, name in enumerate(column_names)]
    lefts = [
        gutter + number * (tile + _GAP) + 4 * _GAP * (sum(begins[: number + 1]) - 1) * (not all(begins))
        for number in range(len(column_names))
    ]
    top = _MARGIN + line * (heading.count("\n") + 2)
    width = max(lefts[-1] + tile, gutter + int(max(font.getlength(part) for part in heading.split("\n")))) + _MARGIN
    page = Image.new("RGB", (width, top + len(cells) * (tile + _GAP) - _GAP + _MARGIN), _PAPER)
    pen = ImageDraw.Draw(page)
    pen.multiline_text((gutter, _MARGIN), heading, _INK, font)
    for name, left, new in zip(column_names, lefts, begins, strict=True):
        if new:
            pen.text((left, top - line), name, _INK, font)
    for row, (name, pictures) in enumerate(zip(row_names, cells, strict=True)):
        upper = top + row * (tile + _GAP)
        pen.text((gutter - _MARGIN, upper + tile // 2), name, _INK, font, anchor="rm")
        for left, picture in zip(lefts, pictures, strict=True):
            page.paste(enlarged(picture, tile), (left, upper))
    return page


def _wrapped(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> list[str]:
    """Lines of at most ``width`` pixels; an ellipsis stands for what is left out."""
    heading, _, rest = text.partition("\n")
    lines, words = [heading], rest.split()
    while words and len(lines) < TEXT_LINES:
        line = words.pop(0)
        while words and font.getlength(f"{line} {words[0]}") <= width:
            line += f" {words.pop(0)}"
        lines.append(line)
    if words:
        lines[-1] += " …"
    return [_shortened(line, font, width) for line in lines]


def _shortened(line: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> str:
    if font.getlength(line) <= width:
        return line
    kept = line.removesuffix(" …")
    while kept and font.getlength(f"{kept}…") > width:
        kept = kept[:-1]
    return f"{kept.rstrip()}…"


def _lines(name: str, font: Any) -> str:
    """The name, broken so that no line is wider than _WIDEST_NAME."""
    return name if font.getlength(name) <= _WIDEST_NAME else "\n".join(_wrapped(f"\n{name}", font, _WIDEST_NAME)[1:])


def save(path: Path, draw: Callable[[], Image.Image], text: PngInfo | None = None) -> None:
    """Write what ``draw`` makes, aside and renamed. text: goes into a PNG; a JPEG has nowhere to put it.

    Raises UserError: an ending but .png or .jpg, or not writable.
    """
    form = picture_format(path)
    page = draw()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with written_aside(path) as aside:
            page.save(aside, form, **({"pnginfo": text} if form == "PNG" else {}))
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror or error})") from None


def picture_format(path: Path) -> str:
    """PNG or JPEG, by the file's ending. Raises UserError for any other."""
    form = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG"}.get(path.suffix.lower())
    if form is None:
        raise UserError(f"{path}: write the pictures to a file that ends in .png or .jpg")
    return form


def mosaic(rows: Sequence[NDArray[np.uint8]], columns: int, largest: int, gaps: int) -> NDArray[np.uint8]:
    """Pictures in rows with gaps between them, uint8 [H, W, 3]; grey tiles where a row has fewer than ``columns``.

    rows: uint8 [n, S, S, 3] each, n at most ``columns``.
    largest: pixels along a side above which they are shown smaller.
    gaps: how many gaps are as wide as a picture.
    """
    side = min(rows[0].shape[1], largest)
    gap = max(1, side // gaps)
    canvas = np.full((len(rows) * (side + gap) - gap, columns * (side + gap) - gap, 3), 160, np.uint8)
    for row, images in enumerate(rows):
        for column, image in enumerate(images):
            top, left = row * (side + gap), column * (side + gap)
            canvas[top : top + side, left : left + side] = np.asarray(enlarged(image, side))
    return canvas


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
    return _fitted(Image.fromarray(image), side)


def _fitted(picture: Image.Image, side: int) -> Image.Image:
    """The whole picture with its longer side at ``side`` pixels."""
    longer = max(picture.size)
    method = Image.Resampling.NEAREST if side >= longer else Image.Resampling.LANCZOS
    width, height = (max(1, round(pixels * side / longer)) for pixels in picture.size)
    return picture if side == longer else picture.resize((width, height), method)
