"""The table of ``llamagen status``: aligned columns on a terminal and in a pipe."""

import time
from collections import Counter
from collections.abc import Callable, Sequence

from rich.console import Console, Group
from rich.live import Live
from rich.text import Text

from llamagen_dist.console import count, duration
from llamagen_dist.launch.status.program import FAILED, FINISHED, RUNNING, STOPPED, SUBMITTING, UNKNOWN, WAITING
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


def show(look: Callable[[], Survey], again: bool = False) -> None:
    """Print what ``look`` sees. again: every few seconds, until Ctrl-C."""
    console = Console(highlight=False, markup=False, emoji=False)
    if not again:
        console.print(page(look(), console.width if console.is_terminal else None), soft_wrap=not console.is_terminal)
        return
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


def table(rows: Sequence[Row], width: int | None = None) -> list[Text]:
    """A line per row; what does not fit behind the columns gets a line of its own below them."""
    if not rows:
        return []
    cells = [HEADER, *(_cells(row) for row in rows)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(HEADER))]
    kept = [i for i in range(len(HEADER)) if any(line[i] for line in cells[1:])]
    lines = []
    for line, row in zip(cells, [None, *rows], strict=True):
        text = Text()
        for i in kept:
            style = "bold underline" if row is None else _STYLE[row.state.name] if i == STATE else ""
            text.append(line[i].rjust(widths[i]) if i in RIGHT else line[i].ljust(widths[i]), style)
            text.append("  ")
        remark = what(row) if row is not None else ""
        fits = width is None or len(text) + len(remark) <= width
        if fits:
            text.append(remark)
        text.rstrip()
        if width is not None:
            text.truncate(width, overflow="ellipsis")
        lines += [text] if fits or not remark else [text, Text("    " + remark)]
    return lines


def _cells(row: Row) -> tuple[str, ...]:
    p, state = row.progress, row.state
    speed = p.images_per_s if state.name == RUNNING and p.images_per_s else None
    return (
        "  " * row.depth + row.name,
        state.name,
        "" if p.done is None else count(p.done).replace(" ", ""),
        "" if p.total is None else count(p.total).replace(" ", ""),
        f"{100 * p.done / p.total:.0f} %" if p.total and p.done is not None else "",
        "" if p.loss is None else f"{p.loss:.4f}",
        "" if speed is None else f"{speed:,.0f}" if speed >= 100 else f"{speed:.3g}",
        "" if row.eta_s is None else duration(row.eta_s),
        "" if p.saved_s is None or state.name == FINISHED else duration(p.saved_s),
        str(sum(number for _, number in state.restarts) or ""),
    )


def what(row: Row) -> str:
    """Job and nodes, kinds of restarts, then why it waits, stopped or failed: one line."""
    state = row.state
    job = f"job {state.job}" if state.job and state.name != FINISHED else ""
    where = f"on {state.where}" if state.where else ""
    again = ", ".join(f"{_KINDS[kind]} {number}x" for kind, number in state.restarts)
    parts = (f"{job} {where}".strip(), f"again {again}" if again else "", state.reason, row.note)
    return "; ".join(part for part in parts if part)


def below(survey: Survey) -> list[str]:
    """How many are in which state, and what is wrong with SLURM's answer or the clocks."""
    lines = []
    states = Counter(row.state.name for row in survey.rows if row.depth == 0)
    if not states:
        lines.append("no run here: a run directory holds metrics.jsonl, checkpoints/ or launch/")
    if states.total() > 1:
        lines.append(f"{states.total()} runs: " + ", ".join(f"{states[one]} {one}" for one in _STYLE if states[one]))
    if survey.slurm:
        lines.append(f"SLURM: {survey.slurm}")
    if survey.clock_ahead_s:
        lines.append(
            f"clocks: files are dated up to {survey.clock_ahead_s:.0f} s in the future: this machine's clock is "
            "behind, and ages are too small by as much"
        )
    return lines
