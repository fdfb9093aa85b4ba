"""What ``llamagen quickstart`` and ``llamagen pipeline`` have in common."""

import argparse
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # imported where it is used, so that --help stays quick
    from llamagen_dist.launch.stages import Plan


def add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--small",
        type=float,
        default=1.0,
        metavar="FACTOR",
        help="scale every number of images by this, for a rehearsal (default: 1)",
    )
    parser.add_argument("--dry-run", action="store_true", help="list the stages with sizes and folders; start nothing")


def execute(plan: "Plan", dry_run: bool) -> None:
    """Show the plan, or run it. Raises UserError and SystemExit as pipeline.run does."""
    from llamagen_dist.launch import pipeline

    if dry_run:
        from llamagen_dist.launch.listing import show

        pipeline.check(plan)
        show(plan)
    else:
        pipeline.run(plan)
