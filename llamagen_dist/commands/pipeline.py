"""``llamagen pipeline FILE --out DIR``: run a pipeline's stages, skipping what is finished."""

import argparse
from pathlib import Path

from llamagen_dist.commands import options
from llamagen_dist.config import load
from llamagen_dist.launch import here, listing
from llamagen_dist.launch.graph import Graph
from llamagen_dist.launch.slurm import launch
from llamagen_dist.launch.slurm import listing as cluster_listing
from llamagen_dist.launch.stages import plan, words


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", type=Path, help="a YAML file of kind: pipeline")
    options.add_settings(parser, "the pipeline's variables")
    options.add_out(parser)
    options.add_cluster(parser, "one job per stage")
    rehearsal(parser)


def rehearsal(parser: argparse.ArgumentParser) -> None:
    """What ``llamagen quickstart`` has too."""
    parser.add_argument(
        "--small",
        type=float,
        default=1.0,
        metavar="FACTOR",
        help="scale every number of images by this, for a rehearsal (default: 1)",
    )
    options.add_dry_run(parser, "the stages with sizes and folders")


def run(args: argparse.Namespace) -> None:
    graph = plan(args.file, args.out.absolute(), words(args.settings), args.small)
    if args.cluster == "local":
        run_here(graph, args.dry_run)
        return
    target = launch.Target(load(args.cluster, kind="cluster"))
    if args.dry_run:
        cluster_listing.show(graph, target)
    else:
        launch.run(graph, target, follow=args.follow)


def run_here(graph: Graph, dry_run: bool) -> None:
    """List what a graph holds, or run it on this machine. Raises UserError and SystemExit as here.run does."""
    if dry_run:
        graph.check()
        listing.show(graph)
    else:
        here.run(graph)
