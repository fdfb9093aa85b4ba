"""A report as data: blocks that say what is shown, not how; html.py is one way to render them."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Markdown:
    """Text in the subset that report/html.py reads: paragraphs, ``##`` headings, ``-`` lists, ``**bold**``,
    `` `code` ``, fenced code and ``[text](https://…)``. Foreign words go through literal()."""

    text: str


@dataclass(frozen=True)
class Number:
    """One headline figure. ``note`` says in a few words how it was obtained."""

    label: str
    value: str
    note: str = ""


@dataclass(frozen=True)
class Numbers:
    items: tuple[Number, ...]


@dataclass(frozen=True)
class Table:
    """Plain-text cells (no Markdown); None is shown as a dash: not measured.

    numeric: indices of the columns that are aligned to the right. Raises ValueError for a ragged row (a bug).
    """

    columns: tuple[str, ...]
    rows: tuple[tuple[str | None, ...], ...]
    numeric: tuple[int, ...] = ()
    caption: str = ""

    def __post_init__(self) -> None:
        for number, row in enumerate(self.rows):
            if len(row) != len(self.columns):
                raise ValueError(f"row {number} has {len(row)} cells for {len(self.columns)} columns")


@dataclass(frozen=True)
class Figure:
    """A drawn plot together with the numbers in it, so that another renderer can draw it again.

    image: the encoded file. size: (width, height) in CSS pixels. alt: what the picture shows, in words.
    data: JSON-serialisable.
    """

    image: bytes
    format: Literal["svg", "png"]
    size: tuple[int, int]
    alt: str
    caption: str = ""
    data: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class ImageGrid:
    """images: uint8 [n, H, W, 3]; captions: n plain texts (or none at all). Shown with hard pixel edges.

    width: CSS pixels of one image; the grid wraps to the width of the page. note: stands under the grid.
    """

    images: NDArray[np.uint8]
    captions: tuple[str, ...] = ()
    width: int = 160
    note: str = ""

    def __post_init__(self) -> None:
        shape, kind = self.images.shape, self.images.dtype
        if kind != np.uint8 or len(shape) != 4 or shape[3] != 3:
            raise ValueError(f"an image grid takes uint8 [n, H, W, 3], not {kind} {list(shape)}")
        if self.captions and len(self.captions) != shape[0]:
            raise ValueError(f"{len(self.captions)} captions for {shape[0]} images")


@dataclass(frozen=True)
class Columns:
    """Blocks side by side where the page is wide enough, below one another where it is not."""

    blocks: tuple["Block", ...]


@dataclass(frozen=True)
class Details:
    """Blocks behind a line of text that opens them. title: plain text."""

    title: str
    blocks: tuple["Block", ...]


@dataclass(frozen=True)
class Section:
    """title: plain text. lead: one sentence under it (Markdown subset)."""

    title: str
    blocks: tuple["Block", ...]
    lead: str = ""


Block: TypeAlias = Markdown | Numbers | Table | Figure | ImageGrid | Columns | Details | Section


@dataclass(frozen=True)
class Report:
    """title and subtitle: plain text."""

    title: str
    blocks: tuple[Block, ...]
    subtitle: str = ""


_SPECIAL = frozenset("\\`*_[]()#-<>&")


def literal(text: str) -> str:
    """Foreign text (a class name, a run name) as Markdown that shows exactly these characters."""
    flat = " ".join(text.split())
    return "".join(f"\\{c}" if c in _SPECIAL else c for c in flat)


def describe(report: Report) -> dict[str, Any]:
    """The whole report as JSON-serialisable values; pictures as sizes and sha256, plots with data."""
    return {"title": report.title, "subtitle": report.subtitle, "blocks": _all(report.blocks)}


def _all(blocks: Sequence[Block]) -> list[dict[str, Any]]:
    return [_one(block) for block in blocks]


def _one(block: Block) -> dict[str, Any]:
    if isinstance(block, Markdown):
        return {"block": "markdown", "text": block.text}
    if isinstance(block, Numbers):
        items = [{"label": item.label, "value": item.value, "note": item.note} for item in block.items]
        return {"block": "numbers", "items": items}
    if isinstance(block, Table):
        rows = [list(row) for row in block.rows]
        return {"block": "table", "columns": list(block.columns), "rows": rows, "caption": block.caption}
    if isinstance(block, Figure):
        return {
            "block": "figure",
            "format": block.format,
            "size": list(block.size),
            "alt": block.alt,
            "caption": block.caption,
            "sha256": hashlib.sha256(block.image).hexdigest(),
            "data": dict(block.data),
        }
    if isinstance(block, ImageGrid):
        return {
            "block": "images",
            "shape": list(block.images.shape),
            "captions": list(block.captions),
            "sha256": hashlib.sha256(np.ascontiguousarray(block.images).tobytes()).hexdigest(),
            "note": block.note,
        }
    if isinstance(block, Columns):
        return {"block": "columns", "blocks": _all(block.blocks)}
    if isinstance(block, Details):
        return {"block": "details", "title": block.title, "blocks": _all(block.blocks)}
    return {"block": "section", "title": block.title, "lead": block.lead, "blocks": _all(block.blocks)}
