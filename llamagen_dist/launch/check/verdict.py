"""From the ranks' reports to what a user has to do, one verdict, and the page that shows both. Light to import."""

import re
import textwrap
from collections import Counter, defaultdict
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
# In the order of the trials, with what to do where one fails.
ADVICE = {
    "node": "python there cannot use what it needs",
    "disk": "the run folder cannot be written there: choose one on the disk that all nodes share",
    "join": "the ranks do not reach the first node: name the network interface that the nodes share (exports: "
    "{GLOO_SOCKET_IFNAME: …}, nccl: {SOCKET_IFNAME: …}), and let ports 15000-32000 pass between them",
    "clock": "ranks lose each other: see the other findings and the logs",
    "shared": "the shared disk does not do what locks and checkpoints need",
    "all_reduce": "collectives fail: NCCL_DEBUG=INFO in exports says which network NCCL has chosen",
    "step": "a training step fails where everything before it works: the log has the traceback",
}
PARTS = tuple(ADVICE)
SHORT = 160  # characters of a problem in the verdict's own line
SHOWN = 8  # names in a list; the rest is counted
CLOCK_WARN_S, CLOCK_BAD_S = 1.0, 60.0
SEEN_WARN_S = 2.0
WRITE_WARN_MB_S = 50.0
SPACE_WARN_GB, SPACE_BAD_GB = 50.0, 1.0
BUS_WARN_GB_S = {"nccl": 5.0, "gloo": 0.01}
GPU_TAKEN_WARN = 0.1  # share of its memory
LOSS_TOLERANCE = 0.2  # nats; a model that computes rightly begins within a hundredth of log(vocabulary)


@dataclass(frozen=True)
class Finding:
    """text: what, where, and what to do about it. A run would fail on a problem, and only suffer from a warning."""

    level: Literal["problem", "warning"]
    text: str


@dataclass(frozen=True)
class Verdict:
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
        *_unlike(reports, ranks_per_node),
        *_gpus(reports, gpus_per_node),
        *_room(reports),
        *_shared_disk(reports),
        *_together(reports),
    ]
    problems = [f for f in findings if f.level == "problem"]
    warnings = [f for f in findings if f.level == "warning"]
    kind = f"{gpus_per_node} GPUs" if gpus_per_node else f"{ranks_per_node} CPU rank{'s' * (ranks_per_node > 1)}"
    size = f"{nodes} node{'s' * (nodes > 1)} x {kind}"
    counts = [
        f"{len(some)} {word}{'s' * (len(some) > 1)}"
        for some, word in ((problems, "problem"), (warnings, "warning"))
        if some
    ]
    if problems:
        first = textwrap.shorten(problems[0].text, SHORT, placeholder=" …")
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


# --- findings ---


def _silent(reports: Sequence[Report], ranks: int, ended: str) -> Iterator[Finding]:
    silent = sorted(set(range(ranks)) - {report["rank"] for report in reports})
    if silent:
        who = f"rank {silent[0]}" if len(silent) == 1 else f"{len(silent)} of {ranks} ranks ({_numbers(silent)})"
        why = f" ({ended})" if ended else ""
        yield _problem(f"{who} left no report{why}: does the profile's python start there, and is the folder shared?")


def _failed(reports: Sequence[Report], ended: str) -> Iterator[Finding]:
    died: dict[str, list[Report]] = defaultdict(list)
    for report in reports:
        if "doing" in report:
            died[report["doing"]].append(report)
    by_cause: dict[tuple[str, str], list[Report]] = defaultdict(list)
    for report in reports:
        if "problem" in report:
            part, error = report["problem"]["part"], report["problem"]["error"]
            # a broken connection to a rank that died is a consequence, and would hide the cause among its copies
            if not (part in died and LOST_PEER.search(error)):
                by_cause[part, re.sub(r"\d+", "#", error)].append(report)
    for part in PARTS:  # the part that failed first explains the others
        if part in died:
            how = f" ({ended})" if ended else ""
            yield _problem(f"{_who(died[part])} did not complete {part}{how}: {ADVICE[part]}")
        for those in (those for (where, _), those in by_cause.items() if where == part):
            yield _problem(f"{_who(those)}: {part}: {those[0]['problem']['error']}: {ADVICE[part]}")


def _unlike(reports: Sequence[Report], ranks_per_node: int) -> Iterator[Finding]:
    for name, count in sorted(Counter(report["where"] for report in reports).items()):
        if count > ranks_per_node:
            yield _problem(f"{name} has {count} ranks instead of {ranks_per_node}: leave task counts to the profile")
    known = [report for report in reports if "node" in report]
    for package in sorted({name for report in known for name in report["node"]["versions"]}):
        if different := _difference(known, lambda node, name=package: node["versions"].get(name, "absent")):  # type: ignore[misc]
            yield _problem(
                f"{package} differs between nodes ({different}): let python in the profile name one environment on "
                "the shared disk"
            )
    if different := _difference([r for r in known if "driver" in r["node"]], lambda node: node["driver"]):
        yield _warning(f"the GPU driver differs between nodes ({different}): ask for nodes that are alike (constraint)")


def _gpus(reports: Sequence[Report], gpus_per_node: int) -> Iterator[Finding]:
    if not gpus_per_node:
        return
    known = [report for report in reports if "node" in report]
    # one device each, as some sites bind them, or all of the node's
    blind = [r for r in known if r["node"]["visible"] != 1 and r["node"]["visible"] < r["ranks_on_node"]]
    if blind:
        seen = blind[0]["node"]["visible"]
        yield _problem(
            f"{_who(blind)}: torch sees {seen or 'no'} GPU{'s' * (seen != 1)} for {blind[0]['ranks_on_node']} ranks: "
            "is it a build of torch for CUDA, does nvidia-smi work there, and does the profile ask for the GPUs?"
        )
    having = [report for report in known if report["node"].get("gpu")]
    users = defaultdict(list)
    for report in having:
        if report["node"]["gpu"]["uuid"]:
            users[report["where"], report["node"]["gpu"]["uuid"]].append(report)
    for those in users.values():
        if len(those) > 1:
            yield _problem(f"{_who(those)} would share one GPU: let every rank see its own, or all of its node's")
    if different := _difference(having, lambda node: node["gpu"]["name"]):
        yield _warning(f"GPUs differ ({different}): all wait for the slowest; name one kind (constraint)")
    for report in having:
        total, free = report["node"]["gpu"]["memory_gb"], report["node"]["gpu"]["free_gb"]
        if total - free > GPU_TAKEN_WARN * total:
            yield _warning(
                f"{_who([report])}: {total - free:.1f} of {total:.1f} GB of its GPU are taken by somebody else: ask "
                "the site, or leave the node out (sbatch: {exclude: …})"
            )


def _room(reports: Sequence[Report]) -> Iterator[Finding]:
    firsts = _one_per_node(reports, "node")
    for report in firsts[:1]:
        shared = report["node"]["space"]["shared"]
        free = shared.get("free_gb", 0.0)
        if free < SPACE_WARN_GB:
            yield (_problem if free < SPACE_BAD_GB else _warning)(
                f"the shared disk at {shared['path']} has {free:.1f} GB free: a checkpoint of GPT-B takes 1.3 GB, of "
                "GPT-3B 37; make room, or choose another run folder"
            )
    for report in firsts:
        where = report["where"]
        for what, advice in (
            ("tmp", "name another (TMPDIR)"),
            ("stage", "name another (stage)"),
            ("shm", "data workers and NCCL use it; a container needs --shm-size"),
        ):
            room = report["node"]["space"].get(what, {"free_gb": SPACE_BAD_GB})
            if "error" in room and what != "shm":
                yield _problem(f"{where}: {room['path']}: {room['error']}: name a folder that every node has")
            elif room.get("free_gb", SPACE_BAD_GB) < SPACE_BAD_GB:
                yield _warning(f"{where}: {room['path']} has {room['free_gb']:.2f} GB free: {advice}")


def _shared_disk(reports: Sequence[Report]) -> Iterator[Finding]:
    slow = [r for r in _one_per_node(reports, "disk") if r["disk"]["write_mb_s"] < WRITE_WARN_MB_S]
    if slow:
        worst = min(report["disk"]["write_mb_s"] for report in slow)
        yield _warning(
            f"{_nodes(slow)}: {worst:.0f} MB/s to the shared disk: a checkpoint of GPT-B (1.3 GB) takes "
            f"{1300 / worst:.0f} s; choose a faster disk, or save less often"
        )
    known = [report for report in reports if "shared" in report]
    if not known:
        return
    for number, how in enumerate(("created a file that must not exist", "gave one name to a file")):
        winners = known[0]["shared"]["winners"][number]
        if winners != 1:
            yield _problem(
                f"{winners} nodes {how} on the shared disk where exactly one may: two launches of one run would not "
                "notice each other; keep runs on another disk"
            )
    for key, what in (("visible_s", "a renamed file"), ("replaced_s", "a file's new content")):
        blind = [report for report in known if report["shared"][key] is None]
        slowest = max(known, key=lambda report: report["shared"][key] or 0.0)
        if blind:
            yield _problem(
                f"{_nodes(blind)} did not see {what} of {_nodes(known[:1])}: is it one disk? Otherwise mount it "
                "without caching of attributes (noac, or actimeo=1)"
            )
        elif slowest["shared"][key] > SEEN_WARN_S:
            yield _warning(
                f"{slowest['where']} saw {what} only after {slowest['shared'][key]:.1f} s: launches and resumes wait "
                "as long; ask for actimeo=1"
            )
    unlocked = [report for report in known if not report["shared"]["flock"]]
    if unlocked:
        yield _warning(
            f"{_nodes(unlocked)}: a lock (flock) of {_nodes(known[:1])} is not seen: runs are kept apart by other "
            "means, but programs started by hand, without llamagen launch, are not"
        )


def _together(reports: Sequence[Report]) -> Iterator[Finding]:
    clocks = _one_per_node(reports, "clock")
    off = [r for r in clocks if abs(r["clock"]["offset_s"]) - r["clock"]["error_s"] > CLOCK_WARN_S]
    if off:
        worst = max((report["clock"]["offset_s"] for report in off), key=abs)
        yield (_problem if abs(worst) > CLOCK_BAD_S else _warning)(
            f"{_nodes(off)}: clock {worst:+.1f} s against {_nodes(reports[:1])}: logs cannot be compared and SLURM's "
            "credentials may be refused; ask the site for NTP"
        )
    speeds = [report["all_reduce"] for report in reports if "all_reduce" in report]
    if speeds and (slowest := min(one["bus_gb_s"] for one in speeds)) < BUS_WARN_GB_S[speeds[0]["backend"]]:
        yield _warning(
            f"all-reduce at {slowest:.3g} GB/s over {speeds[0]['backend']}: is it the wrong network? Name the fast "
            "one (nccl: {SOCKET_IFNAME: …, IB_HCA: …}); NCCL_DEBUG=INFO in exports says what is used"
        )
    steps = [report for report in reports if "step" in report]
    # where torch sees no GPU, that is a finding already
    on_cpu = [r for r in steps if r["node"]["visible"] and not r["step"]["device"].startswith("cuda")]
    if on_cpu:
        yield _problem(f"{_who(on_cpu)} trained on {on_cpu[0]['step']['device']}, not on a GPU: is it a CUDA build?")
    for report in steps:
        (first, second), expected = report["step"]["losses"], report["step"]["expected"]
        falls = first is not None and second is not None and second < first
        if not falls or abs(first - expected) > LOSS_TOLERANCE:
            yield _problem(
                f"{_who([report])}: the losses of two steps are {first} and {second}; they should begin at "
                f"{expected:.4f} and fall: this node computes wrongly, or its libraries do"
            )
            return
    if not all(report["step"]["equal"] for report in steps):
        yield _problem("after one step the ranks' weights are not the same: gradients were not reduced correctly")


def _problem(text: str) -> Finding:
    return Finding("problem", text)


def _warning(text: str) -> Finding:
    return Finding("warning", text)


def _one_per_node(reports: Sequence[Report], part: str) -> list[Report]:
    firsts: dict[str, Report] = {}
    for report in reports:
        if part in report:
            firsts.setdefault(report["where"], report)
    return list(firsts.values())


def _difference(reports: Sequence[Report], value: Callable[[Mapping[str, Any]], str]) -> str:
    """``A on n1; B on n2`` where nodes do not all have one value; empty where they do."""
    groups: dict[str, list[Report]] = defaultdict(list)
    for report in reports:
        groups[value(report["node"])].append(report)
    return "; ".join(f"{name} on {_nodes(those)}" for name, those in sorted(groups.items())) if len(groups) > 1 else ""


def _nodes(reports: Sequence[Report]) -> str:
    return _shortened(sorted({report["where"] for report in reports}))


def _who(reports: Sequence[Report]) -> str:
    ranks = sorted(report["rank"] for report in reports)
    return f"rank{'s' * (len(ranks) > 1)} {_numbers(ranks)} on {_nodes(reports)}"


def _numbers(ranks: Sequence[int]) -> str:
    return _shortened([str(rank) for rank in ranks])


def _shortened(names: Sequence[str]) -> str:
    return ", ".join(names[:SHOWN]) + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "")


# --- for a person ---

# heading, part of a report, its key, how to write it, and which rank's value stands for its node
_COLUMNS: tuple[tuple[str, str, str, str, Callable[[list[float]], float]], ...] = (
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
    for heading in ("ranks", "cores", "memory", "GPUs", "disk free", *(column[0] for column in _COLUMNS)):
        table.add_column(heading, justify="right", no_wrap=True)
    by_node: dict[str, list[Report]] = defaultdict(list)
    for report in reports:
        by_node[report["where"]].append(report)
    for name, those in by_node.items():
        node: Mapping[str, Any] = next((report["node"] for report in those if "node" in report), {})
        cells = [str(node.get("cores", "-")), "-", "-", "-"]
        if node:
            gpus = f"{node['visible']} {node.get('gpu', {}).get('name', '')}".strip()
            cells[1:] = [f"{node['memory_gb']:.0f} GB", gpus, f"{node['space']['shared'].get('free_gb', 0):,.0f} GB"]
        for _, part, key, form, worst in _COLUMNS:
            values = [report[part][key] for report in those if part in report and report[part][key] is not None]
            cells.append(form.format(worst(values)) if values else "-")
        table.add_row(name, str(len(those)), *cells)
    return table
