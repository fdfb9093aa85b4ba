"""``llamagen pipeline FILE --out DIR``: run a pipeline's stages, skipping what is finished."""

import argparse
from pathlib import Path

from llamagen_dist.commands import options
from llamagen_dist.config import load
from llamagen_dist.launch import listing, pipeline
from llamagen_dist.launch.slurm import pipeline as cluster
from llamagen_dist.launch.stages import Plan, plan, words


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", type=Path, help="a YAML file of kind: pipeline")
    options.add_settings(parser, "the pipeline's variables")
    parser.add_argument("--out", type=Path, required=True, help="folder for everything; the same again resumes it")
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
    parser.add_argument("--dry-run", action="store_true", help="list the stages with sizes and folders; start nothing")


def run(args: argparse.Namespace) -> None:
    made = plan(args.file, args.out.absolute(), words(args.settings), args.small)
    if args.cluster == "local":
        run_here(made, args.dry_run)
        return
    profile = load(args.cluster, kind="cluster")
    if args.dry_run:
        cluster.show(made, profile)
    else:
        cluster.launch(made, profile, follow=args.follow)


def run_here(made: Plan, dry_run: bool) -> None:
    """Show the plan, or run it on this machine. Raises UserError and SystemExit as pipeline.run does."""
    if dry_run:
        pipeline.check(made)
        listing.show(made)
    else:
        pipeline.run(made)
