"""``llamagen sweep SWEEP.yaml --out DIR [key=value …]``: one program with many configs, finished ones skipped."""

import argparse
from pathlib import Path

from llamagen_dist.commands import options
from llamagen_dist.commands.plan import add_gpu, machine
from llamagen_dist.config import load
from llamagen_dist.console import Screen
from llamagen_dist.launch import sweep as local
from llamagen_dist.launch.points import Sweep, sweep
from llamagen_dist.launch.slurm import sweep as cluster
from llamagen_dist.planning.plan import Machine
from llamagen_dist.planning.sweep import need, show


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", type=Path, help="a YAML file of kind: sweep")
    options.add_settings(parser, "override keys of every point's config")
    parser.add_argument("--out", type=Path, required=True, help="folder for all points; the same again resumes it")
    options.add_cluster(parser, "all points are one job array")
    parser.add_argument(
        "--dry-run", action="store_true", help="what every point needs, and all together; start nothing"
    )
    parser.add_argument("--retry-failed", action="store_true", help="start points again that have failed")
    add_gpu(parser, "of --dry-run: ")


def run(args: argparse.Namespace) -> None:
    made = sweep(args.file, args.out.absolute(), args.settings)
    if args.cluster == "local":
        if not args.dry_run:
            local.run(made, args.retry_failed)
            return
        local.check(made)
        ranks = made.config.ranks
        _show(made, machine(args, ranks, ranks), 1, [local.state_of(point) for point in made.points])
        print("Nothing was started.")
        return
    profile = load(args.cluster, kind="cluster")
    if not args.dry_run:
        cluster.launch(made, profile, retry_failed=args.retry_failed, follow=args.follow)
        return
    cluster.check(made)
    size, states = cluster.size_for(made, profile), cluster.states(made)
    _show(made, machine(args, size.ranks, size.ranks_per_node), made.config.at_once or len(made.points), states)
    print(f"\n{cluster.text(made, profile, size, states)}\nNothing was started.")


def _show(made: Sweep, there: Machine, at_once: int, states: list[local.State]) -> None:
    """at_once: points that run at the same time."""
    words = [f"{state.kind}: {state.reason}" if state.reason else state.kind for state in states]
    needs = [need(point.name, point.stage.config, there) for point in made.points]
    show(f"{made.config.title} -> {made.out}", needs, words, there, at_once, Screen())
