"""Blocks -> one self-contained HTML file: no script, no request, every foreign character escaped."""

import base64
import io
import re
from collections.abc import Sequence
from html import escape

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from llamagen_dist.report.blocks import (
    Block,
    Columns,
    Details,
    Figure,
    ImageGrid,
    Markdown,
    Numbers,
    Report,
    Section,
    Table,
)
from llamagen_dist.report.style import CSS

# The browser itself refuses anything that is not in the file.
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"
_LOSSLESS_SIDE = 512  # pixels; a larger picture is a photograph and goes in as JPEG


def render(report: Report) -> str:
    """The page as text. Titles, captions and cells are plain text; Markdown is escaped before it is read."""
    sections = [block for block in report.blocks if isinstance(block, Section)]
    links = "".join(f'<a href="#{_anchor(s.title, report.blocks)}">{_text(s.title)}</a>' for s in sections)
    subtitle = f'<p class="subtitle">{_text(report.subtitle)}</p>' if report.subtitle else ""
    body = "".join(_block(block, report.blocks) for block in report.blocks)
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark">'
        f"<title>{_text(report.title)}</title><style>{CSS}</style></head>\n"
        f"<body><header><h1>{_text(report.title)}</h1>{subtitle}"
        f"{f'<nav>{links}</nav>' if links else ''}</header>\n<main>{body}</main></body></html>\n"
    )


def _text(text: str) -> str:
    # Control characters have no place in HTML and could hide a tag from a reader of the source.
    return escape("".join(c for c in text if c.isprintable() or c.isspace()), quote=True)


def _anchor(title: str, blocks: Sequence[Block]) -> str:
    """Unique within the report: the section's number and its plain letters."""
    titles = [block.title for block in blocks if isinstance(block, Section)]
    number = titles.index(title) + 1 if title in titles else 0
    return f"s{number}-" + re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-")


def _block(block: Block, top: Sequence[Block]) -> str:
    if isinstance(block, Markdown):
        return f'<div class="prose">{markdown(block.text)}</div>'
    if isinstance(block, Numbers):
        return _numbers(block)
    if isinstance(block, Table):
        return _table(block)
    if isinstance(block, Figure):
        return _figure(block)
    if isinstance(block, ImageGrid):
        return _grid(block)
    inner = "".join(_block(b, top) for b in block.blocks)
    if isinstance(block, Columns):
        return f'<div class="columns">{inner}</div>'
    if isinstance(block, Details):
        return f"<details><summary>{_text(block.title)}</summary>{inner}</details>"
    lead = f'<div class="lead">{markdown(block.lead)}</div>' if block.lead else ""
    return f'<section id="{_anchor(block.title, top)}"><h2>{_text(block.title)}</h2>{lead}{inner}</section>\n'


def _numbers(block: Numbers) -> str:
    cards = "".join(
        f'<div class="number"><dt>{_text(item.label)}</dt><dd>{_text(item.value)}</dd>'
        f"{f'<p>{_text(item.note)}</p>' if item.note else ''}</div>"
        for item in block.items
    )
    return f'<dl class="numbers">{cards}</dl>'


def _table(block: Table) -> str:
    def mark(index: int) -> str:
        return ' class="num"' if index in block.numeric else ""

    head = "".join(f'<th scope="col"{mark(i)}>{_text(name)}</th>' for i, name in enumerate(block.columns))
    rows = "".join(
        "<tr>"
        + "".join(
            f"<td{mark(i)}>{'<span class=none>–</span>' if cell is None else _text(cell)}</td>"
            for i, cell in enumerate(row)
        )
        + "</tr>"
        for row in block.rows
    )
    caption = f'<p class="caption">{_text(block.caption)}</p>' if block.caption else ""
    return (
        f'<div class="tablebox"><div class="scroll" tabindex="0"><table><thead><tr>{head}</tr></thead>'
        f"<tbody>{rows}</tbody></table></div>{caption}</div>"
    )


def _figure(block: Figure) -> str:
    kind = {"svg": "image/svg+xml", "png": "image/png"}[block.format]
    width, height = block.size
    caption = f"<figcaption>{_text(block.caption)}</figcaption>" if block.caption else ""
    return (
        f'<figure><img src="{_data(kind, block.image)}" width="{width}" height="{height}" '
        f'alt="{_text(block.alt)}">{caption}</figure>'
    )


def _grid(block: ImageGrid) -> str:
    cells = []
    for index, image in enumerate(block.images):
        caption = block.captions[index] if block.captions else ""
        label = f"<figcaption>{_text(caption)}</figcaption>" if caption else ""
        cells.append(f'<figure><img src="{_picture(image, block.width)}" alt="{_text(caption)}">{label}</figure>')
    note = f'<p class="caption">{_text(block.note)}</p>' if block.note else ""
    return f'<div class="images" style="--cell:{int(block.width)}px">{"".join(cells)}</div>{note}'


def _picture(image: NDArray[np.uint8], width: int) -> str:
    """Small pictures: nearest-neighbour upscaled by a whole factor to at least 2x ``width``, lossless PNG."""
    if max(image.shape[:2]) > _LOSSLESS_SIDE:
        buffer = io.BytesIO()
        Image.fromarray(image).save(buffer, "JPEG", quality=90)
        return _data("image/jpeg", buffer.getvalue())
    factor = max(1, -(-2 * width // image.shape[1])) if image.shape[1] < 2 * width else 1
    large = image.repeat(factor, axis=0).repeat(factor, axis=1)
    buffer = io.BytesIO()
    Image.fromarray(large).save(buffer, "PNG", optimize=True)
    return _data("image/png", buffer.getvalue())


def _data(kind: str, content: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


_INLINE = re.compile(
    r"\\(?P<plain>[\\`*_\[\]()#<>&-])|`(?P<code>[^`]+)`|\*\*(?P<bold>.+?)\*\*"
    r"|\[(?P<label>[^\]]+)\]\((?P<url>(?:https?://|#)[^\s()]+)\)"
)


def _inline(text: str) -> str:
    parts, at = [], 0
    for found in _INLINE.finditer(text):
        parts.append(_text(text[at : found.start()]))
        at = found.end()
        if found["plain"]:
            parts.append(_text(found["plain"]))
        elif found["code"]:
            parts.append(f"<code>{_text(found['code'])}</code>")
        elif found["bold"]:
            parts.append(f"<strong>{_inline(found['bold'])}</strong>")
        else:
            parts.append(f'<a href="{_text(found["url"])}" rel="noopener">{_inline(found["label"])}</a>')
    return "".join(parts) + _text(text[at:])


def markdown(text: str) -> str:
    """The subset named in blocks.Markdown -> HTML. Anything else is shown as it is written."""
    out: list[str] = []
    for number, piece in enumerate(re.split(r"^```[a-z]*\n(.*?)^```[ ]*$", text, flags=re.MULTILINE | re.DOTALL)):
        if number % 2:
            out.append(f'<pre class="scroll" tabindex="0"><code>{_text(piece.rstrip())}</code></pre>')
        else:
            out += [_paragraph(p) for p in re.split(r"\n\s*\n", piece.strip("\n")) if p.strip()]
    return "".join(out)


def _paragraph(text: str) -> str:
    heading = re.fullmatch(r"(#{2,4}) +(.+)", text.strip())
    if heading:
        level = len(heading[1]) + 1  # the section's own title is h2
        return f"<h{level}>{_inline(heading[2])}</h{level}>"
    lines = text.strip().splitlines()
    if all(line.startswith("- ") or (index and line.startswith("  ")) for index, line in enumerate(lines)):
        items = re.split(r"^- ", text.strip(), flags=re.MULTILINE)[1:]
        return "<ul>" + "".join(f"<li>{_inline(' '.join(item.split()))}</li>" for item in items) + "</ul>"
    return f"<p>{_inline(' '.join(line.strip() for line in lines))}</p>"
