"""A report as files: Markdown, and every plot and picture beside it as PNG and SVG."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from llamagen_dist.errors import UserError
from llamagen_dist.files import own_folder, write_bytes, write_text
from llamagen_dist.report import page, plots
from llamagen_dist.report.blocks import (
    Bars,
    Block,
    Columns,
    Details,
    Figure,
    ImageGrid,
    Markdown,
    Numbers,
    Report,
    Section,
    literal,
)

Picture = Figure | ImageGrid
_ACROSS = 5  # tiles of a grid that becomes one picture


def write(report: Report, folder: Path) -> list[Path]:
    """FOLDER/report.md with every plot as .svg and .png and every image grid as .png; returns what was written."""
    own_folder(folder)
    written = []
    names = named(report)

    def shown(block: Picture) -> str:
        name, alt = names[id(block)], block.alt if isinstance(block, Figure) else ", ".join(block.captions)
        return f"![{literal(alt)}]({name}.png)"

    try:
        for block in pictures(report):
            for suffix, content in encoded(block).items():
                write_bytes(folder / f"{names[id(block)]}{suffix}", content)
                written.append(folder / f"{names[id(block)]}{suffix}")
        title = f"# {literal(report.title)}\n\n{literal(report.subtitle)}".strip()
        text = "\n\n".join([title, *(part for block in report.blocks for part in markdown(block, shown))])
        write_text(folder / "report.md", text + "\n")
    except OSError as error:
        raise UserError(f"{error.filename}: cannot be written ({error.strerror}); choose another folder") from None
    return [*written, folder / "report.md"]


def pictures(block: Block) -> Iterator[Picture]:
    """Every plot and image grid in it, in reading order."""
    if isinstance(block, Figure | ImageGrid):
        yield block
    for inner in getattr(block, "blocks", ()):
        yield from pictures(inner)


def named(report: Report) -> dict[int, str]:
    """The id() of every plot and image grid -> a name of its own."""
    return {id(block): f"{block.kind}-{number:02d}" for number, block in enumerate(pictures(report), 1)}


def encoded(block: Picture) -> dict[str, bytes]:
    """Suffix -> file. The tiles of a grid stand in rows of one picture, in the order of its captions."""
    if isinstance(block, Figure):
        return {".svg": plots.draw(block), ".png": plots.draw(block, "png")}
    return {".png": page.encoded(_sheet(block.images), _ACROSS * block.width)[1]}


def _sheet(images: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """uint8 [n, H, W, 3] in rows on white, with a gap after each."""
    across, gap = min(_ACROSS, len(images)), max(1, images.shape[1] // 16)
    padded = np.pad(images, ((0, -len(images) % across), (0, gap), (0, gap), (0, 0)), constant_values=255)
    _, height, width, _ = padded.shape
    return padded.reshape(-1, across, height, width, 3).swapaxes(1, 2).reshape(-1, across * width, 3)


def markdown(block: Block, shown: Callable[[Picture], str]) -> Iterator[str]:
    """The block as paragraphs of Markdown. shown: what stands for a picture."""
    if isinstance(block, Markdown):
        yield block.text
    elif isinstance(block, Numbers):
        yield _table(("", "", ""), block.rows)
    elif isinstance(block, Bars):
        yield _table((block.title, ""), [(name, words) for name, _, words in block.rows])
    elif isinstance(block, Figure | ImageGrid):
        yield shown(block)
        if block.caption:
            yield literal(block.caption)
    elif isinstance(block, Section | Details):
        yield f"{'##' if isinstance(block, Section) else '###'} {literal(block.title)}"
        if isinstance(block, Section) and block.lead:
            yield block.lead
    if isinstance(block, Columns | Section | Details):
        for inner in block.blocks:
            yield from markdown(inner, shown)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [[literal(cell) for cell in row] for row in (head, *rows)]
    lines.insert(1, ["---"] * len(head))
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
