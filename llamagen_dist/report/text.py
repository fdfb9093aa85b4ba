"""Sections from templates/report.md.j2: its Markdown, with the figures and pictures that it asks for by name."""

import functools
import re
from collections.abc import Mapping
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from llamagen_dist.report import quantities
from llamagen_dist.report.blocks import Block, Columns, Details, Markdown, Section, literal
from llamagen_dist.report.plots import TEMPLATES


@functools.cache
def _macros() -> Any:
    # Markdown, which page.py makes harmless, and where "literal" takes foreign words out of it: no HTML to escape
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES), trim_blocks=True, lstrip_blocks=True, undefined=StrictUndefined
    )
    written = ("count", "loss", "small", "duration", "power", "gigabytes", "percent")
    environment.filters |= {name: getattr(quantities, name) for name in written}
    environment.filters |= {"literal": literal, "cell": lambda value: "–" if value in (None, "") else literal(value)}
    environment.filters["code"] = lambda value: str(value).replace("`", "")
    return environment.get_template("report.md.j2").module


def words(macro: str, *context: Any) -> str:
    """What a macro writes, with one empty line at most between two others."""
    return re.sub(r"\n\s*\n+", "\n\n", str(getattr(_macros(), macro)(*context))).strip()


def section(macro: str, parts: Mapping[str, Block | None], *context: Any) -> Section | None:
    """A section of the report, or None where the macro writes nothing."""
    title, _, rest = words(macro, *context).partition("\n")
    if not title:
        return None
    lead, _, body = rest.partition("\n\n") if not rest.startswith(("\n", "|", "@")) else ("", "", rest)
    return Section(title.removeprefix("## "), tuple(_blocks(body, parts)), lead.strip())


def _blocks(text: str, parts: Mapping[str, Block | None]) -> list[Block]:
    """Lines that begin with @ are places of blocks, or open and close groups of them; the rest is Markdown."""
    groups: list[tuple[str, list[Block]]] = [("", [])]
    for piece in re.split(r"^(@.*)$", text, flags=re.MULTILINE):
        if piece == "@(" or piece.startswith("@+ "):
            groups.append((piece[3:], []))
        elif piece in ("@)", "@-"):
            title, inner = groups.pop()
            closed = Details(title, tuple(inner)) if piece == "@-" else Columns(tuple(inner))
            groups[-1][1].extend([closed] if piece == "@-" or len(inner) > 1 else inner)
        elif piece.startswith("@"):
            groups[-1][1].extend(block for block in (parts.get(piece[1:]),) if block is not None)
        elif piece.strip():
            groups[-1][1].append(Markdown(piece.strip()))
    return groups[0][1]
