"""What tests of reports ask of a report or of its page."""

import hashlib
import re
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np

from llamagen_dist.report import page
from llamagen_dist.report.blocks import Block
from llamagen_dist.report.collect import collect
from llamagen_dist.report.sections import build


class Loaded(HTMLParser):
    """Everything a browser would fetch, and every element it would make."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.fetched: list[str] = []
        self.tags: list[str] = []
        self.links: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        for name, value in attributes:
            assert not name.startswith("on"), f"an event handler: {name}"
            if name in ("src", "srcset", "data", "poster", "background") or (name == "href" and tag != "a"):
                self.fetched.append(value or "")
            elif name == "href":
                self.links.append(value or "")


def describe(value: Any) -> Any:
    """A report, or any part of it, as JSON-serialisable values; pictures as shapes and sha256."""
    if isinstance(value, np.ndarray):
        if value.dtype != np.uint8:
            return value.tolist()
        return {"shape": list(value.shape), "sha256": hashlib.sha256(np.ascontiguousarray(value).tobytes()).hexdigest()}
    if is_dataclass(value):
        kind: dict[str, Any] = {"block": value.kind} if isinstance(value, Block) else {}
        return kind | {f.name: describe(getattr(value, f.name)) for f in fields(value)}
    if isinstance(value, Mapping):
        return {key: describe(inner) for key, inner in value.items()}
    return [describe(inner) for inner in value] if isinstance(value, list | tuple) else value


def described(out: Path) -> dict[str, Any]:
    return describe(build(collect(out)))


def html(out: Path) -> str:
    return page.render(build(collect(out))).replace("\N{NO-BREAK SPACE}", " ").replace("&#x27;", "'")


def section(out: Path, title: str) -> dict[str, Any]:
    return next(b for b in described(out)["blocks"] if b.get("title") == title)


def titles(out: Path) -> list[str]:
    return [b["title"] for b in described(out)["blocks"] if "title" in b]


def inside(block: dict[str, Any], kind: str) -> list[dict[str, Any]]:
    """Every block of a kind, in reading order."""
    own = [block] if block["block"] == kind else []
    return own + [one for inner in block.get("blocks", []) for one in inside(inner, kind)]


def series(figure: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {one["name"]: one for panel in figure["panels"] for one in panel["series"]}


def text_of(block: dict[str, Any]) -> str:
    return "\n\n".join(b["text"] for b in inside(block, "markdown"))


def table(block: dict[str, Any], number: int = 0) -> list[list[str]]:
    """The cells of a table in the block's Markdown, its head first."""
    tables = re.findall(r"(?:^\|.*\n?)+", text_of(block), flags=re.MULTILINE)
    lines = [line.strip("| ").split(" | ") for line in tables[number].splitlines()]
    rows = [
        [re.sub(r"\\(.)", r"\1", cell).replace("\N{NO-BREAK SPACE}", " ").strip() for cell in line] for line in lines
    ]
    return [rows[0], *rows[2:]]
