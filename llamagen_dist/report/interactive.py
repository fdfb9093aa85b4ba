"""A Figure block as an interactive plot, by plotly (the extra ``interactive``)."""

from collections.abc import Iterator
from typing import Any

from markupsafe import Markup

from llamagen_dist.errors import UserError
from llamagen_dist.report import plots
from llamagen_dist.report.blocks import Figure, Series, printable

_STYLES: dict[str, dict[str, Any]] = {  # beside the lines that all styles have which are not named here
    "thin": {"line_width": 1},
    "wide": {"line_width": 4, "opacity": 0.45},
    "faint": {"line_width": 1, "opacity": 0.35, "showlegend": False},
    "dashed": {"line_dash": "dash"},
    "dots": {"mode": "markers"},
    "points": {"mode": "markers", "marker_size": 3},
    "crosses": {"mode": "markers", "marker_symbol": "x-thin-open", "marker_size": 4},
    "rings": {"mode": "markers", "marker_symbol": "circle-open"},
    "diamonds": {"mode": "markers", "marker_symbol": "diamond"},
    "dotted line": {"mode": "lines+markers"},
    "band": {"line_width": 14, "opacity": 0.3},
}


def script() -> Markup:
    """plotly.js. Raises UserError where plotly is not installed."""
    try:
        from plotly.offline import get_plotlyjs
    except ImportError:
        raise UserError("--interactive needs plotly: pip install 'llamagen-dist[interactive]'") from None
    return Markup(get_plotlyjs())


def html(figure: Figure) -> Markup:
    """The plot as an element and the script that fills it; ``script`` must come before it in the page."""
    from plotly.subplots import make_subplots

    plot = make_subplots(rows=len(figure.panels), shared_xaxes=True, vertical_spacing=0.1)
    for row, panel in enumerate(figure.panels, 1):
        for series in panel.series:
            for trace in _traces(series):
                plot.add_scatter(**trace, row=row, col=1)
        axis = {"title_text": _text(panel.title), "type": "log" if panel.log_y else "linear", "range": panel.y_range}
        plot.update_yaxes(**axis, row=row, col=1)
    plot.update_xaxes(type="log" if figure.log_x else "linear")
    plot.update_xaxes(title_text=_text(figure.x), row=len(figure.panels), col=1)
    if figure.ticks:
        plot.update_xaxes(tickvals=list(range(len(figure.ticks))), ticktext=[_text(name) for name in figure.ticks])
    if figure.shaded:
        plot.add_vrect(*figure.shaded, opacity=0.1, fillcolor=plots.THEME["blue"][0], line_width=0)
    for at, text in figure.events:
        plot.add_vline(at, line_dash="dot", annotation_text=_text(text))
    margins, legend = {"l": 60, "r": 10, "t": 20, "b": 45}, {"orientation": "h", "y": -0.2}
    plot.update_layout(template="plotly_white", margin=margins, legend=legend, height=60 + plots.size(figure)[1])
    config = {"displaylogo": False, "responsive": True}
    return Markup(plot.to_html(full_html=False, include_plotlyjs=False, config=config))


def _traces(series: Series) -> Iterator[dict[str, Any]]:
    colour = plots.colours(series.colour)[0]
    look = {"name": _text(series.name), "mode": "lines", "line_color": colour, "marker_color": colour}
    look |= _STYLES.get(series.style, {})
    if series.to is None:
        yield {"x": series.x.tolist(), "y": series.y.tolist(), **look}
    else:  # one upright bar for each point
        for x, low, high in zip(series.x, series.y, series.to, strict=True):
            yield {"x": [x, x], "y": [low, high], **look, "showlegend": False}


def _text(text: str) -> str:
    """Plain text for plotly, which reads some HTML in its labels."""
    return printable(text).replace("&", "&amp;").replace("<", "&lt;")
