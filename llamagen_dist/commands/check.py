"""``llamagen check --cluster FILE``: the first day on a cluster, in two minutes."""

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path

from llamagen_dist.commands import options
from llamagen_dist.config import load
from llamagen_dist.console import Screen
from llamagen_dist.errors import UserError
from llamagen_dist.files import write_text
from llamagen_dist.launch.check import start
from llamagen_dist.launch.check.verdict import read_reports, show


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--cluster", required=True, metavar="FILE", help="a cluster profile (slurm/NAME.yaml), or local: this machine"
    )
    options.add_size(parser, ranks=2)
    parser.add_argument(
        "--out", type=Path, default=Path("runs/check"), help="folder on the shared disk (default: %(default)s)"
    )


def run(args: argparse.Namespace) -> None:
    out, screen = args.out.absolute(), Screen()
    if args.cluster == "local":
        if args.gpus_per_node is not None:
            raise UserError("--gpus-per-node is a cluster's; on this machine give --ranks")
        verdict = start.on_this_machine(options.ranks_here(args, 2), out, screen)
    else:
        options.no_ranks(args)
        profile = load(args.cluster, kind="cluster")
        verdict = start.on_cluster(profile, out, args.nodes, args.gpus_per_node, screen)
    reports = read_reports(out / "reports")
    write_text(out / "check.json", json.dumps({**asdict(verdict), "ranks": reports}, indent=1))
    show(screen, reports, verdict, out / "check.json")
    if not verdict.ready:
        sys.exit(1)
