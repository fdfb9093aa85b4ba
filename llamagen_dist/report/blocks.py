"""A report as data: blocks that say what is shown, not how. page.py, files.py and wandb_spec.py render them."""

import re
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

Style = (
    Literal["line", "thin", "wide", "faint", "dashed", "dotted line", "band"]
    | Literal["dots", "points", "crosses", "rings", "diamonds"]
)
Colour = str | float
"""A name of plots.THEME, or a share from 0 (pale) to 1 (strong) for the members of an ordered family."""


class Block:
    """What a report consists of."""

    @property
    def kind(self) -> str:
        return type(self).__name__.lower()


@dataclass(frozen=True)
class Markdown(Block):
    """Text: paragraphs, headings, lists, tables, emphasis, code, links. No HTML. Foreign words go through literal()."""

    text: str


@dataclass(frozen=True)
class Numbers(Block):
    """Headline figures: (label, value, how it was obtained) each, plain text."""

    rows: tuple[tuple[str, str, str], ...]


@dataclass(frozen=True)
class Bars(Block):
    """Horizontal bars, the first on top: (name, value, the value in words) each."""

    title: str
    rows: tuple[tuple[str, float, str], ...]
    colour: str = "blue"


@dataclass(frozen=True, eq=False)
class Series:
    """Points of one kind.

    x, y: float64, 1-d, equally long; a band reaches from ``y`` to ``to``.
    label: written at the right end; the name is for the legend and for whoever reads the data.
    """

    name: str
    x: NDArray[np.float64]
    y: NDArray[np.float64]
    style: Style = "line"
    colour: Colour = "blue"
    label: str = ""
    to: NDArray[np.float64] | None = None


@dataclass(frozen=True)
class Panel:
    """One pair of axes. title: what y shows. y_range: None fits the data. legend: (text, colour). note: upper left."""

    title: str
    series: tuple[Series, ...]
    log_y: bool = False
    y_range: tuple[float, float] | None = None
    legend: tuple[tuple[str, Colour], ...] = ()
    note: str = ""


@dataclass(frozen=True)
class Figure(Block):
    """A plot as numbers, for any renderer to draw: panels above one another that share x.

    alt: what it shows, in words.
    x: the label of the x axis.
    ticks: names of x = 0, 1, …, where x counts things.
    shaded: a range of x.
    events: (x, what happens there) each.
    """

    panels: tuple[Panel, ...]
    alt: str
    x: str = ""
    log_x: bool = False
    caption: str = ""
    ticks: tuple[str, ...] = ()
    shaded: tuple[float, float] | None = None
    events: tuple[tuple[float, str], ...] = ()


@dataclass(frozen=True, eq=False)
class ImageGrid(Block):
    """images: uint8 [n, H, W, 3]; captions: n plain texts (or none at all). Shown with hard pixel edges.

    width: CSS pixels of one image; the grid wraps to the width of the page. caption: of them all.
    """

    images: NDArray[np.uint8]
    captions: tuple[str, ...] = ()
    width: int = 160
    caption: str = ""

    def __post_init__(self) -> None:
        shape, kind = self.images.shape, self.images.dtype
        if kind != np.uint8 or len(shape) != 4 or shape[3] != 3:
            raise ValueError(f"an image grid takes uint8 [n, H, W, 3], not {kind} {list(shape)}")
        if self.captions and len(self.captions) != shape[0]:
            raise ValueError(f"{len(self.captions)} captions for {shape[0]} images")


@dataclass(frozen=True)
class Columns(Block):
    """Blocks side by side where the page is wide enough, below one another where it is not."""

    blocks: tuple[Block, ...]


@dataclass(frozen=True)
class Details(Block):
    """Blocks behind a line of text that opens them. title: plain text."""

    title: str
    blocks: tuple[Block, ...]


@dataclass(frozen=True)
class Section(Block):
    """title: plain text. lead: one sentence under it (Markdown)."""

    title: str
    blocks: tuple[Block, ...]
    lead: str = ""


@dataclass(frozen=True)
class Report(Block):
    """title and subtitle: plain text."""

    title: str
    blocks: tuple[Block, ...]
    subtitle: str = ""


def literal(text: Any) -> str:
    """Foreign text (a class name, a run name) as Markdown that shows exactly these characters."""
    flat = " ".join(printable(str(text)).split())
    flat = "".join(f"\\{c}" if c in "\\`*_[]<>&~|" else c for c in flat)
    return re.sub(r"^(\d*)([-+#=.)])(?=[-+#=]*( |$))", r"\1\\\2", flat)  # what would begin a list or a heading


def printable(text: str) -> str:
    """Without control characters, which could hide something from a reader of the source."""
    return "".join(c for c in text if c.isprintable() or c.isspace())
