"""``llamagen check --cluster FILE``: the first day on a cluster, in two minutes."""

import argparse
from pathlib import Path


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--cluster", required=True, metavar="FILE", help="a cluster profile (slurm/NAME.yaml), or local: this machine"
    )
    parser.add_argument("--nodes", type=int, help="instead of the profile's")
    parser.add_argument("--gpus-per-node", type=int, help="instead of the profile's")
    parser.add_argument("--ranks", type=int, help="on this machine: processes (default: 2)")
    parser.add_argument(
        "--out", type=Path, default=Path("runs/check"), help="folder on the shared disk (default: %(default)s)"
    )


def run(args: argparse.Namespace) -> None:
    import json
    import sys
    from dataclasses import asdict

    from llamagen_dist.config import load
    from llamagen_dist.console import Screen
    from llamagen_dist.errors import UserError
    from llamagen_dist.files import write_text
    from llamagen_dist.launch.check import start
    from llamagen_dist.launch.check.verdict import read_reports, show

    out, screen = args.out.absolute(), Screen()
    if args.cluster == "local":
        if args.nodes not in (None, 1) or args.gpus_per_node is not None:
            raise UserError("--nodes and --gpus-per-node are a cluster's; on this machine give --ranks")
        ranks = 2 if args.ranks is None else args.ranks
        if ranks < 1:
            raise UserError(f"--ranks {ranks}: give 1 or more")
        verdict = start.on_this_machine(ranks, out, screen)
    else:
        if args.ranks is not None:
            raise UserError("--ranks is for this machine; on a cluster give --nodes and --gpus-per-node")
        profile = load(args.cluster, kind="cluster")
        verdict = start.on_cluster(profile, out, args.nodes, args.gpus_per_node, screen)
    reports = read_reports(out / "reports")
    write_text(out / "check.json", json.dumps({**asdict(verdict), "ranks": reports}, indent=1))
    show(screen, reports, verdict, out / "check.json")
    if not verdict.ready:
        sys.exit(1)
