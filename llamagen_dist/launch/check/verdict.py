"""From the ranks' reports to what a user has to do, one verdict, and the page that shows both. Light to import."""

import re
import textwrap
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from rich.table import Table
from rich.text import Text

from llamagen_dist.console import Screen
from llamagen_dist.errors import LOST_PEER, UserError
from llamagen_dist.files import read_json

Report = Mapping[str, Any]
"""What one rank reports (preflight.py): ``rank``, ``where``, and one entry per part that it completed."""
Level = Literal["problem", "warning"]
"""A run would fail on a problem, and only suffer from a warning."""

# The trials in their order, with what to do where one fails.
ADVICE = {
    "node": "python there cannot use what it needs",
    "disk": "choose a run folder on the disk that all nodes share",
    "join": "name the network interface that the nodes share (exports: {GLOO_SOCKET_IFNAME: …}, nccl: "
    "{SOCKET_IFNAME: …}), and let ports 15000-32000 pass between them",
    "clock": "ranks lose each other: see the other findings and the logs",
    "shared": "the shared disk does not do what locks and checkpoints need",
    "all_reduce": "NCCL_DEBUG=INFO in exports says which network NCCL has chosen",
    "step": "a training step fails where everything before it works: the log has the traceback",
}
PARTS = tuple(ADVICE)


@dataclass(frozen=True)
class Finding:
    """text: what, where, and what to do about it."""

    level: Level
    text: str


@dataclass(frozen=True)
class Verdict:
    """line: the verdict in one line. findings: problems first."""

    ready: bool
    line: str
    findings: tuple[Finding, ...]


def report_of(folder: Path, rank: int) -> Path:
    return folder / f"rank_{rank}.json"


def read_reports(folder: Path) -> list[dict[str, Any]]:
    """By rank; a report that the disk tore counts as none."""
    reports = []
    for path in folder.glob("rank_*.json"):
        try:
            reports.append(read_json(path))
        except UserError:
            continue
    return sorted(reports, key=lambda report: report["rank"])


def judge(reports: Sequence[Report], nodes: int, ranks_per_node: int, gpus_per_node: int, ended: str = "") -> Verdict:
    """ended: how the job ended where it ended badly, for ranks that did not report."""
    findings = [
        *_silent(reports, nodes * ranks_per_node, ended),
        *_failed(reports, ended),
        *_unlike(reports),
        *_of_nodes(reports, gpus_per_node > 0),
    ]
    problems = [finding for finding in findings if finding.level == "problem"]
    warnings = [finding for finding in findings if finding.level == "warning"]
    kind = _plural(gpus_per_node, "GPU") if gpus_per_node else _plural(ranks_per_node, "CPU rank")
    size = f"{_plural(nodes, 'node')} x {kind}"
    counts = [_plural(len(some), word) for some, word in ((problems, "problem"), (warnings, "warning")) if some]
    if problems:
        first = textwrap.shorten(problems[0].text, 160, placeholder=" …")
        line = f"NOT READY: {size}: {', '.join(counts)}; first: {first}"
    else:
        line = f"READY: {size}: {', '.join([*counts, *_figures(reports)])}"
    return Verdict(not problems, line, tuple(problems + warnings))


def _figures(reports: Sequence[Report]) -> Iterator[str]:
    """What the verdict's line says of a cluster that is ready."""
    having = {part: [report[part] for report in reports if part in report] for part in PARTS}
    if speeds := having["all_reduce"]:
        yield f"all-reduce {min(s['bus_gb_s'] for s in speeds):.3g} GB/s ({speeds[0]['backend']})"
    if steps := having["step"]:
        yield f"a tiny step in {max(step['seconds'] for step in steps):.2g} s"
    if disks := having["disk"]:
        yield f"disk {min(disk['write_mb_s'] for disk in disks):.0f} MB/s per node"
    if len(clocks := having["clock"]) > 1:
        yield f"clocks within {max(abs(clock['offset_s']) for clock in clocks):.3f} s"


# --- findings: what, where, and what to do ---


def _of_rank(report: Report, gpus: bool) -> Iterator[tuple[Level, str]]:
    """What one rank's facts show. gpus: whether the profile asks for GPUs."""
    if node := report.get("node"):
        seen, ranks, space = node["visible"], report["ranks_on_node"], node["space"]
        # one device each, as some sites bind them, or all of the node's
        if gpus and seen != 1 and seen < ranks:
            yield "problem", f"torch sees {seen} GPUs for {ranks} ranks: is it a CUDA build? Are GPUs asked for?"
        free, most = (node.get("gpu", {}).get(key, 0) for key in ("free_gb", "memory_gb"))
        if gpus and free < 0.9 * most:
            yield "warning", f"{free} of {most} GB of a GPU are free: leave this node out (sbatch: {{exclude: …}})"
        for folder, enough, advice in (
            ("shared", 50, "make room; a checkpoint of GPT-B takes 1.3 GB, of GPT-3B 37"),
            ("tmp", 1, "name another (TMPDIR in exports)"),
            ("stage", 1, "name another (stage)"),
            ("shm", 1, "data workers and NCCL use it; a container needs --shm-size"),
        ):
            room = space.get(folder, {})
            if room.get("free_gb", enough) < enough:
                level: Level = "problem" if folder == "shared" and room["free_gb"] < 1 else "warning"
                yield level, f"{room['path']} has {room['free_gb']:.1f} GB free: {advice}"
            elif "error" in room and folder in ("tmp", "stage"):
                yield "problem", f"{room['path']}: {room['error']}: {advice}"
    if (disk := report.get("disk")) and disk["write_mb_s"] < 50:
        rate = disk["write_mb_s"]
        yield "warning", f"{rate:.0f} MB/s to the shared disk: {1300 / rate:.0f} s for GPT-B; choose a faster one"
    if shared := report.get("shared"):
        seconds, (created, linked) = (shared["visible_s"], shared["replaced_s"]), shared["winners"]
        if (created, linked) != (1, 1):
            what = f"{created} nodes made one file and {linked} linked one name on the shared disk"
            yield "problem", f"{what}, where one may: launches would not notice each other; keep runs elsewhere"
        if None in seconds:
            yield "problem", "does not see what rank 0 wrote: is it one disk? Mount it with noac or actimeo=1"
        elif max(seconds) > 2:
            yield "warning", f"sees what rank 0 wrote after {max(seconds):.1f} s, so resumes wait: ask for actimeo=1"
    if (clock := report.get("clock")) and (off := abs(clock["offset_s"]) - clock["error_s"]) > 1:
        level = "problem" if off > 60 else "warning"
        yield level, f"clock {clock['offset_s']:+.1f} s against rank 0's: ask the site for NTP"
    if speed := report.get("all_reduce"):
        rate, backend = speed["bus_gb_s"], speed["backend"]
        if rate < {"nccl": 5, "gloo": 0.01}[backend]:
            advice = "name the fast network (nccl: {SOCKET_IFNAME: …, IB_HCA: …})"
            yield "warning", f"all-reduce at {rate:.3g} GB/s over {backend}: {advice}"
    if step := report.get("step"):
        (first, second), expected = step["losses"], step["expected"]
        # an untrained model that computes rightly begins within a hundredth of log(vocabulary)
        if None in (first, second) or abs(first - expected) > 0.2 or second >= first:
            wrong = f"the losses of two steps are {first} and {second}"
            yield "problem", f"{wrong}, not {expected:.4f} and less: this node or its libraries compute wrongly"
        elif not step["equal"]:
            yield "problem", "after a step the ranks' weights are not the same: gradients are not reduced correctly"


def _of_nodes(reports: Sequence[Report], gpus: bool) -> Iterator[Finding]:
    """``_of_rank`` of all, each finding once: with the figures of the first node, and the names of the others."""
    where: dict[str, list[str]] = defaultdict(list)
    first: dict[str, tuple[Level, str]] = {}
    for report in reports:
        for level, text in _of_rank(report, gpus):
            key = level + _without_numbers(text)
            first.setdefault(key, (level, text))
            if report["where"] not in where[key]:
                where[key].append(report["where"])
    for key, (level, text) in first.items():
        node, *others = where[key]
        yield Finding(level, f"{node}: {text}" + (f" (also {_shortened(others)})" if others else ""))


def _silent(reports: Sequence[Report], ranks: int, ended: str) -> Iterator[Finding]:
    silent = sorted(set(range(ranks)) - {report["rank"] for report in reports})
    if silent:
        advice = "does the profile's python start there, and is the folder shared?"
        yield Finding("problem", f"{_ranks(silent)} of {ranks} left no report{_in_brackets(ended)}: {advice}")


def _failed(reports: Sequence[Report], ended: str) -> Iterator[Finding]:
    """Ranks that died in a trial or failed it; the first trial first, which explains the others."""
    died: dict[str, list[Report]] = defaultdict(list)
    failed: dict[tuple[str, str], list[Report]] = defaultdict(list)
    for report in reports:
        if "doing" in report:
            died[report["doing"]].append(report)
    for report in reports:
        if "problem" in report:
            part, error = report["problem"]["part"], report["problem"]["error"]
            # a broken connection to a rank that died is a consequence, and would hide the cause among its copies
            if not (part in died and LOST_PEER.search(error)):
                failed[part, _without_numbers(error)].append(report)
    for part, advice in ADVICE.items():
        if part in died:
            yield Finding("problem", f"{_who(died[part])} did not complete {part}{_in_brackets(ended)}: {advice}")
        for (where, _), those in failed.items():
            if where == part:
                yield Finding("problem", f"{_who(those)}: {part}: {those[0]['problem']['error']}: {advice}")


def _unlike(reports: Sequence[Report]) -> Iterator[Finding]:
    """Packages and GPUs that are not the same everywhere, and GPUs that two ranks would use."""
    values: dict[str, dict[str, list[Report]]] = defaultdict(lambda: defaultdict(list))
    users: dict[tuple[str, str], list[Report]] = defaultdict(list)
    for report in reports:
        node = report.get("node", {})
        for package, version in node.get("versions", {}).items():
            values[package][version].append(report)
        if gpu := node.get("gpu"):
            values["GPU"][gpu["name"]].append(report)
            users[report["where"], gpu["uuid"]].append(report)
    for what, groups in sorted(values.items()):
        if len(groups) > 1:
            where = "; ".join(f"{value} on {_nodes(those)}" for value, those in sorted(groups.items()))
            if what == "GPU":
                yield Finding("warning", f"GPUs differ ({where}): all wait for the slowest; name one kind (constraint)")
            else:
                advice = "let python in the profile name one environment on the shared disk"
                yield Finding("problem", f"{what} differs between nodes ({where}): {advice}")
    for (_, uuid), those in users.items():
        if uuid and len(those) > 1:
            advice = "let every rank see its own, or all of its node's"
            yield Finding("problem", f"{_who(those)} would share one GPU: {advice}")


def _nodes(reports: Sequence[Report]) -> str:
    return _shortened(sorted({report["where"] for report in reports}))


def _who(reports: Sequence[Report]) -> str:
    return f"{_ranks(sorted(report['rank'] for report in reports))} on {_nodes(reports)}"


def _ranks(ranks: Sequence[int]) -> str:
    return f"rank{'s' * (len(ranks) > 1)} {_shortened(ranks)}"


def _in_brackets(text: str) -> str:
    return f" ({text})" if text else ""


def _without_numbers(text: str) -> str:
    return re.sub(r"[+-]?\d[\d.]*", "#", text)


def _shortened(names: Sequence[object], most: int = 8) -> str:
    return ", ".join(map(str, names[:most])) + (f" and {len(names) - most} more" if len(names) > most else "")


def _plural(count: int, what: str) -> str:
    return f"{count} {what}{'s' * (count > 1)}"


# --- for a person ---

# heading, part of a report, its key, how to write it, and which rank's value stands for its node
_COLUMNS: tuple[tuple[str, str, str, str, Callable[[list[float]], float]], ...] = (
    ("cores", "node", "cores", "{}", min),
    ("memory", "node", "memory_gb", "{:.0f} GB", min),
    ("GPUs", "node", "visible", "{}", min),
    ("write", "disk", "write_mb_s", "{:.0f} MB/s", min),
    ("small file", "disk", "small_s", "{:.3f} s", max),
    ("seen after", "shared", "visible_s", "{:.3f} s", max),
    ("clock", "clock", "offset_s", "{:+.3f} s", lambda values: max(values, key=abs)),
    ("all-reduce", "all_reduce", "bus_gb_s", "{:.3g} GB/s", min),
    ("step", "step", "seconds", "{:.2g} s", max),
)


def show(screen: Screen, reports: Sequence[Report], verdict: Verdict, file: Path) -> None:
    """A line per node, then sentences; the verdict is the last line. file: where all of it has been written."""
    if reports:
        screen.console.print(_table(reports), soft_wrap=False)
        versions = sorted({f"{n} {v}" for r in reports if "node" in r for n, v in r["node"]["versions"].items()})
        screen.say("versions: " + ", ".join(versions))
    for finding in verdict.findings:
        style = "bold red" if finding.level == "problem" else "yellow"
        screen.console.print(Text.assemble((finding.level, style), ": ", finding.text), soft_wrap=True)
    screen.say(f"all of it: {file}")
    screen.console.print(Text(verdict.line, style="bold green" if verdict.ready else "bold red"), soft_wrap=True)


def _table(reports: Sequence[Report]) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold underline")
    table.add_column("node", no_wrap=True)
    for heading in ("ranks", *(column[0] for column in _COLUMNS)):
        table.add_column(heading, justify="right", no_wrap=True)
    by_node: dict[str, list[Report]] = defaultdict(list)
    for report in reports:
        by_node[report["where"]].append(report)
    for name, those in by_node.items():
        cells = []
        for _, part, key, form, worst in _COLUMNS:
            values = [report[part][key] for report in those if part in report and report[part][key] is not None]
            cells.append(form.format(worst(values)) if values else "-")
        table.add_row(name, str(len(those)), *cells)
    return table
