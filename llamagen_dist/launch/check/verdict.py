"""From the ranks' reports to one verdict. Pure functions; light to import."""

import json
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llamagen_dist.launch.check import findings as rules
from llamagen_dist.launch.check.findings import PARTS, Finding, Report

SHORT = 160  # characters of a problem in the verdict's own line


@dataclass(frozen=True)
class Verdict:
    ready: bool
    line: str
    findings: tuple[Finding, ...]


def report_of(folder: Path, rank: int) -> Path:
    return folder / f"rank_{rank}.json"


def dumped(facts: Report) -> str:
    return json.dumps(facts, indent=1, allow_nan=False)


def read_reports(folder: Path) -> list[dict[str, Any]]:
    found = []
    for path in folder.glob("rank_*.json"):
        try:
            found.append(json.loads(path.read_text(encoding="utf-8")))
        except ValueError:  # the disk tore it; the rank then counts as silent
            continue
    return sorted(found, key=lambda report: report["rank"])


def judge(reports: Sequence[Report], nodes: int, ranks_per_node: int, gpus_per_node: int, ended: str = "") -> Verdict:
    """ended: how the job came to its end where that was not well, for ranks that did not report."""
    findings = [
        *rules.silent(reports, nodes * ranks_per_node, ended),
        *rules.failed(reports, ended),
        *rules.layout(reports, nodes, ranks_per_node),
        *rules.versions(reports),
        *rules.devices(reports, gpus_per_node),
        *rules.room(reports),
        *rules.disk(reports),
        *rules.shared(reports),
        *rules.clocks(reports),
        *rules.speed(reports),
        *rules.steps(reports, gpus_per_node),
    ]
    problems = [f for f in findings if f.level == "problem"]
    warnings = [f for f in findings if f.level == "warning"]
    kind = f"{gpus_per_node} GPUs" if gpus_per_node else f"{ranks_per_node} CPU rank{'s' * (ranks_per_node > 1)}"
    size = f"{nodes} node{'s' * (nodes > 1)} x {kind}"
    said = [
        f"{len(found)} {word}{'s' * (len(found) > 1)}"
        for found, word in ((problems, "problem"), (warnings, "warning"))
        if found
    ]
    if problems:
        first = textwrap.shorten(problems[0].text, SHORT, placeholder=" …")
        line = f"NOT READY: {size}: {', '.join(said)}; first: {first}"
    else:
        line = f"READY: {size}: {', '.join([*said, *_figures(reports)])}"
    return Verdict(not problems, line, tuple(problems + warnings))


def _figures(reports: Sequence[Report]) -> list[str]:
    """What the verdict's line tells of a cluster that is ready."""
    found = []
    speeds = [report["all_reduce"] for report in reports if "all_reduce" in report]
    if speeds:
        found.append(f"all-reduce {min(s['bus_gb_s'] for s in speeds):.3g} GB/s ({speeds[0]['backend']})")
    steps = [report["step"]["seconds"] for report in reports if "step" in report]
    if steps:
        found.append(f"a tiny step in {max(steps):.2g} s")
    writes = [report["disk"]["write_mb_s"] for report in reports if "disk" in report]
    if writes:
        found.append(f"disk {min(writes):.0f} MB/s per node")
    clocks = [abs(report["clock"]["offset_s"]) for report in reports if "clock" in report]
    if len(clocks) > 1:
        found.append(f"clocks within {max(clocks):.3f} s")
    return found


__all__ = ["PARTS", "Finding", "Verdict", "dumped", "judge", "read_reports", "report_of"]
