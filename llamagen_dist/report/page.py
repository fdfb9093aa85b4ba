"""A report as one self-contained HTML file: no request, no script unless asked for, every foreign character escaped."""

import base64
import io
import re
from typing import Any

import numpy as np
from jinja2 import Environment, FileSystemLoader
from markdown_it import MarkdownIt
from markupsafe import Markup, escape
from numpy.typing import NDArray
from PIL import Image

from llamagen_dist.report import interactive as plotly
from llamagen_dist.report import plots
from llamagen_dist.report.blocks import Report, Section, printable
from llamagen_dist.report.plots import TEMPLATES

_LOSSLESS_SIDE = 512  # pixels; a larger picture is a photograph and goes in as JPEG
# Without the rules that would let text bring pictures, HTML, or headings that look like nothing.
_MARKDOWN = MarkdownIt("zero", {"html": False}).enable(
    ["heading", "list", "fence", "emphasis", "backticks", "link", "escape", "newline", "table"]
)
_MARKDOWN.validateLink = lambda url: url.startswith(("https://", "http://", "#"))  # type: ignore[method-assign]
_RULES = {
    "fence": lambda _, tokens, at, *__: f'<pre tabindex="0"><code>{escape(tokens[at].content.rstrip())}</code></pre>',
    "table_open": lambda *_: '<div class="scroll" tabindex="0"><table>',
    "table_close": lambda *_: "</table></div>",
}
for _name, _rule in _RULES.items():
    _MARKDOWN.add_render_rule(_name, _rule)


def markdown(text: str) -> Markup:
    """Markdown as HTML. Headings come out one level lower: the page and its sections have the highest two."""
    tokens = _MARKDOWN.parse(printable(text))
    for token in tokens:
        if token.type in ("heading_open", "heading_close"):
            token.tag = f"h{min(6, int(token.tag[1]) + 1)}"
    return Markup(_MARKDOWN.renderer.render(tokens, _MARKDOWN.options, {}))


def render(report: Report, interactive: bool = False) -> str:
    """The page as text.

    interactive: plots by plotly, whose five megabytes of script become part of the page. Raises UserError without it.
    """
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES), autoescape=True, trim_blocks=True, finalize=_printable
    )
    environment.filters |= {
        "markdown": markdown,
        "picture": lambda figure: _data("image/svg+xml", plots.draw(figure)),
        "tile": lambda image, width: _data(*encoded(image, 2 * width)),
        "size": plots.size,
    }
    script = Markup("")
    if interactive:
        environment.filters["plotly"] = plotly.html
        script = plotly.script()
    titles = [block.title for block in report.blocks if isinstance(block, Section)]
    return environment.get_template("page.html.j2").render(
        report=report,
        css=Markup((TEMPLATES / "page.css").read_text(encoding="utf-8")),
        interactive=script,
        anchors={
            title: f"s{n}-" + re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-") for n, title in enumerate(titles, 1)
        },
    )


def _printable(value: Any) -> Any:
    return printable(value) if isinstance(value, str) and not isinstance(value, Markup) else value


def encoded(image: NDArray[np.uint8], least: int) -> tuple[str, bytes]:
    """(MIME type, file) of a picture, uint8 [H, W, 3]. Small ones are enlarged by hard edges to ``least`` pixels."""
    buffer = io.BytesIO()
    if max(image.shape[:2]) > _LOSSLESS_SIDE:
        Image.fromarray(image).save(buffer, "JPEG", quality=90)
        return "image/jpeg", buffer.getvalue()
    factor = max(1, -(-least // image.shape[1]))
    Image.fromarray(image.repeat(factor, axis=0).repeat(factor, axis=1)).save(buffer, "PNG", optimize=True)
    return "image/png", buffer.getvalue()


def _data(kind: str, content: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"
