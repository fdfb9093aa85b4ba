"""``python -m tests.slurm.faults``: faults on a cluster of their own, as a table; all of them make slurm/FAULTS.md."""

import argparse
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from tests.slurm.faults.campaign import Campaign, Result, cases
from tests.slurm.faults.injections import FAULTS, NODES
from tests.slurm.faults.programs import PROGRAMS, SAVE_EVERY, STEPS
from tests.slurm.local_cluster import ROOT, another_cluster

HEAD = ("fault", "program", "restarts", "redone", "allowed", "s to requeue", "s to next step", "result")


def row(result: Result) -> list[str]:
    def seconds(value: float | None) -> str:
        return "" if value is None else f"{value:.1f}"

    restarts = max(result.restarts, 1)
    return [
        f"{result.fault.number} {result.fault.name}",
        result.program,
        str(result.restarts),
        str(result.redone),
        str(result.fault.most * restarts),
        seconds(result.told_s),
        seconds(result.seconds),
        "equal" if result.passed else "; ".join(result.problems),
    ]


ABOUT = """\
*equal*: every line of metrics.jsonl and every tensor of the last checkpoint (weights, moving averages, optimizer) are
those of the run that nothing happened to, to the last bit (fault 10, which changes the number of ranks: within 1e-5);
the digests say that no image was seen twice or left out; nothing half-written is left. Steps redone are summed over the
restarts; none is allowed after a signal, after a kill those since the last save (and the few that are done while a
checkpoint is being written, faults 7 and 9; since the save before it where the last one is damaged, fault 8). Of the
seconds until the run steps again about 6 are this SLURM's wait before a requeued job may start, and most of the others
the start of Python and torch on two cores that several runs share.

The tokenizer's optimizer has lr 2e-4 and eps 1e-4 here: with Adam's usual eps of 1e-8, biases in front of a
normalisation, whose gradient is nothing but rounding, end up to 5e-4 apart on another number of ranks (fault 10).
"""


def page(results: Sequence[Result], commit: str, minutes: float) -> str:
    """slurm/FAULTS.md."""
    cells = [HEAD, ["---"] * len(HEAD), *(row(result) for result in results)]
    return "\n".join([
        "# Faults\n",
        f"`make faults` on {time.strftime('%Y-%m-%d')}, commit {commit}, two CPU cores, {minutes:.0f} minutes: a GPT "
        f"(ZeRO-1, tensor 2) and a tokenizer\non 2 nodes x 2 ranks of a one-machine SLURM, {STEPS} steps, saved every "
        f"{SAVE_EVERY}.\n",
        ABOUT,
        *(f"| {' | '.join(line)} |" for line in cells),
        "",
    ])  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.slurm.faults", description=__doc__)
    parser.add_argument("--only", help="numbers of faults, with commas between")
    parser.add_argument("--program", choices=[*PROGRAMS], help="instead of both")
    parser.add_argument("--at-once", type=int, default=3, help="runs at a time (default: 3)")
    parser.add_argument("--keep", type=Path, help="put the runs there and leave them")
    args = parser.parse_args(argv)
    only = [int(word) for word in args.only.split(",")] if args.only else None
    programs = [args.program] if args.program else [*PROGRAMS]
    console, began = Console(width=None if sys.stdout.isatty() else 160), time.monotonic()
    words = ["git", "describe", "--always", "--dirty"]  # of what the runs are about to be a copy
    commit = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
    with tempfile.TemporaryDirectory(prefix="llamagen-faults-") as scratch, another_cluster(NODES):
        campaign = Campaign(args.keep or Path(scratch), programs, args.at_once, console.print)
        try:
            results = campaign.run(cases(only, programs, FAULTS))
        finally:
            campaign.close()
    results.sort(key=lambda result: (result.fault.number, result.program))
    table = Table(*HEAD)
    for result in results:
        table.add_row(*row(result))
    console.print(table)
    for result in results:
        if result.remarks:
            console.print(f"{result.fault.number} {result.program}: {result.remarks}")
    if only is None and args.program is None:
        (ROOT / "slurm/FAULTS.md").write_text(page(results, commit, (time.monotonic() - began) / 60))
    return 0 if all(result.passed for result in results) else 1


if __name__ == "__main__":
    sys.exit(main())
