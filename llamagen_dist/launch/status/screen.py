"""The table of ``llamagen status``: aligned columns on a terminal and in a pipe."""

import time
from collections import Counter
from collections.abc import Callable

from rich.console import Console, Group
from rich.live import Live
from rich.text import Text

from llamagen_dist.console import duration
from llamagen_dist.launch.status.state import FAILED, FINISHED, RUNNING, STOPPED, SUBMITTING, UNKNOWN, WAITING
from llamagen_dist.launch.status.survey import Row, Survey

EVERY_S = 5.0
_STYLE = {
    RUNNING: "green",
    WAITING: "cyan",
    SUBMITTING: "cyan",
    FINISHED: "dim",
    FAILED: "bold red",
    STOPPED: "yellow",
    UNKNOWN: "magenta",
}
HEADER = ("run", "state", "images", "of", "", "loss", "images/s", "left", "saved", "restarts")
STATE, RIGHT = 1, range(2, 10)
_KINDS = {"fault": "after a fault", "signal": "after a signal", "slurm": "by SLURM", "launch": "as another job"}


def show(survey: Survey) -> None:
    console = _console()
    console.print(page(survey, console.width if console.is_terminal else None), soft_wrap=not console.is_terminal)


def watch(look: Callable[[], Survey]) -> None:
    """Show it again every few seconds until Ctrl-C."""
    console = _console()
    try:
        if not console.is_terminal:
            while True:
                console.print(time.strftime("%H:%M:%S"))
                console.print(page(look()), soft_wrap=True)
                time.sleep(EVERY_S)
        with Live(console=console, auto_refresh=False, screen=True, vertical_overflow="ellipsis") as live:
            while True:
                live.update(page(look(), console.width), refresh=True)
                time.sleep(EVERY_S)
    except KeyboardInterrupt:
        return


def page(survey: Survey, width: int | None = None) -> Group:
    """The table and what is to be said below it. width: of the terminal; None: lines of any length."""
    return Group(*table(survey.rows, width), *(Text(line) for line in below(survey)))


def table(rows: tuple[Row, ...], width: int | None = None) -> list[Text]:
    """A line per row; what does not fit behind the columns gets a line of its own below them."""
    if not rows:
        return []
    cells = [HEADER, *(_cells(row) for row in rows)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(HEADER))]
    kept = [i for i, size in enumerate(widths) if any(line[i] for line in cells[1:])]
    found = []
    for line, row in zip(cells, [None, *rows], strict=True):
        text = Text()
        for i in kept:
            style = "bold underline" if row is None else _STYLE[row.state.name] if i == STATE else ""
            text.append(line[i].rjust(widths[i]) if i in RIGHT else line[i].ljust(widths[i]), style)
            text.append("  ")
        said = what(row) if row is not None else ""
        fits = width is None or not said or len(text) + len(said) <= width
        if fits:
            text.append(said)
        text.rstrip()
        if width is not None:
            text.truncate(width, overflow="ellipsis")
        found += [text] if fits else [text, Text("    " + said)]
    return found


def _cells(row: Row) -> tuple[str, ...]:
    p, state = row.progress, row.state
    total = "" if p.total is None else count(p.total)
    share = f"{100 * p.done / p.total:.0f} %" if p.total and p.done is not None else ""
    running = state.name == RUNNING
    return (
        "  " * row.depth + row.name,
        state.name,
        "" if p.done is None else count(p.done),
        total,
        share,
        "" if p.loss is None else f"{p.loss:.4f}",
        speed(p.images_per_s) if running and p.images_per_s else "",
        "" if row.eta_s is None else duration(row.eta_s),
        "" if p.saved_s is None or state.name == FINISHED else duration(p.saved_s),
        str(sum(number for _, number in state.restarts) or ""),
    )


def what(row: Row) -> str:
    """Job and place, kinds of restarts, then why it waits, stopped or failed: one line."""
    state = row.state
    job = "" if not state.job or state.name == FINISHED else f"job {state.job}"
    place = f"on {state.where}" if state.where else ""
    where = " ".join(part for part in (job, place) if part)
    again = ", ".join(f"{_KINDS[kind]} {number}x" for kind, number in state.restarts)
    return "; ".join(part for part in (where, f"again {again}" if again else "", state.reason, row.note) if part)


def count(images: int) -> str:
    """``950``, ``12.8k``, ``1.28M``."""
    for size, letter in ((10**9, "G"), (10**6, "M"), (10**3, "k")):
        if images >= size:
            return f"{images / size:.3g}{letter}"
    return str(images)


def speed(images_per_s: float) -> str:
    """Three digits."""
    return f"{images_per_s:,.0f}" if images_per_s >= 100 else f"{images_per_s:.3g}"


def below(survey: Survey) -> list[str]:
    """How many are in which state, and what is wrong with SLURM's answer or the clocks."""
    lines = []
    tops = [row for row in survey.rows if row.depth == 0]
    if not tops:
        lines.append("no run here: a run directory holds metrics.jsonl, checkpoints/ or launch/")
    if len(tops) > 1:
        counts = Counter(row.state.name for row in tops)
        lines.append(f"{len(tops)} runs: " + ", ".join(f"{counts[name]} {name}" for name in _STYLE if counts[name]))
    if survey.slurm:
        lines.append(f"SLURM: {survey.slurm}")
    if survey.clock_ahead_s:
        lines.append(
            f"clocks: files are dated up to {survey.clock_ahead_s:.0f} s in the future: this machine's clock is "
            "behind, and ages are too small by as much"
        )
    return lines


def _console() -> Console:
    return Console(highlight=False, markup=False, emoji=False)
