"""The check's answer for a person: a line per node, then sentences, then the verdict."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from llamagen_dist.console import Screen
from llamagen_dist.launch.check.verdict import Verdict

Report = Mapping[str, Any]


def show(screen: Screen, reports: Sequence[Report], verdict: Verdict, file: Path) -> None:
    """file: where all of it has been written. The verdict is the last line."""
    if reports:
        screen.console.print(nodes(reports), soft_wrap=False)
        same = sorted({f"{n} {v}" for r in reports if "node" in r for n, v in r["node"]["versions"].items()})
        screen.say("versions: " + ", ".join(same))
    for finding in verdict.findings:
        style = "bold red" if finding.level == "problem" else "yellow"
        screen.console.print(Text.assemble((finding.level, style), ": ", finding.text), soft_wrap=True)
    screen.say(f"all of it: {file}")
    screen.console.print(Text(verdict.line, style="bold green" if verdict.ready else "bold red"), soft_wrap=True)


def nodes(reports: Sequence[Report]) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold underline")
    table.add_column("node", no_wrap=True)
    for name in (
        "ranks",
        "cores",
        "memory",
        "GPUs",
        "disk free",
        "write",
        "small file",
        "seen after",
        "clock",
        "all-reduce",
        "step",
    ):
        table.add_column(name, justify="right", no_wrap=True)
    by_node: dict[str, list[Report]] = {}
    for report in reports:
        by_node.setdefault(report["where"], []).append(report)
    for name, those in by_node.items():
        table.add_row(name, *_cells(those))
    return table


def _cells(those: Sequence[Report]) -> list[str]:
    def of(part: str, key: str, form: str, worst: Callable[[list[float]], float] = max) -> str:
        values = [report[part][key] for report in those if part in report and report[part][key] is not None]
        return form.format(worst(values)) if values else "-"

    node: Mapping[str, Any] = next((report["node"] for report in those if "node" in report), {})
    gpu = node.get("gpu", {}).get("name", "")
    return [
        str(len(those)),
        str(node.get("cores", "-")),
        f"{node['memory_gb']:.0f} GB" if node else "-",
        f"{node['visible']} {gpu}".strip() if node else "-",
        f"{node['space']['shared'].get('free_gb', 0):,.0f} GB" if node else "-",
        of("disk", "write_mb_s", "{:.0f} MB/s", min),
        of("disk", "small_s", "{:.3f} s"),
        of("shared", "visible_s", "{:.3f} s"),
        of("clock", "offset_s", "{:+.3f} s", lambda values: max(values, key=abs)),
        of("all_reduce", "bus_gb_s", "{:.3g} GB/s", min),
        of("step", "seconds", "{:.2g} s"),
    ]
