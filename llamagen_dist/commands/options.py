"""Options that several commands have, written once. Light to import: ``llamagen NAME --help`` must stay quick."""

import argparse
import math

from llamagen_dist.errors import UserError


def add_settings(parser: argparse.ArgumentParser, what: str = "override keys of the file") -> None:
    parser.add_argument("settings", nargs="*", metavar="key=value", help=what)


def add_cluster(parser: argparse.ArgumentParser, there: str) -> None:
    """there: what happens on a cluster."""
    parser.add_argument(
        "--cluster",
        default="local",
        metavar="FILE",
        help=f"a cluster profile (slurm/NAME.yaml): {there}; default: local, this machine",
    )
    parser.add_argument("--follow", action="store_true", help="on a cluster: stay until everything has ended")


def add_size(parser: argparse.ArgumentParser, ranks: int) -> None:
    """ranks: how many processes there are on this machine by default."""
    parser.add_argument("--nodes", type=int, help="on a cluster: instead of the profile's")
    parser.add_argument("--gpus-per-node", type=int, help="on a cluster: instead of the profile's")
    parser.add_argument("--ranks", type=int, help=f"on this machine: processes (default: {ranks})")


def ranks_here(args: argparse.Namespace, default: int) -> int:
    """Processes on this machine. Raises UserError for sizes that only a cluster has."""
    if args.nodes not in (None, 1):
        raise UserError(f"--nodes {args.nodes}: this machine is one node, on this machine give --ranks")
    within(args, "ranks", 1)
    return default if args.ranks is None else int(args.ranks)


def no_ranks(args: argparse.Namespace) -> None:
    """Raises UserError for --ranks beside a cluster profile."""
    if args.ranks is not None:
        raise UserError("--ranks is for this machine; on a cluster give --nodes and --gpus-per-node")


def within(args: argparse.Namespace, option: str, low: float, high: float = math.inf) -> None:
    """Raises UserError for an option that was given and lies outside of low to high."""
    number = getattr(args, option.replace("-", "_"))
    if number is not None and not low <= number <= high:  # so NaN is refused too
        right = f"give {low:g} or more" if high == math.inf else f"give a number from {low:g} to {high:.10g}"
        raise UserError(f"--{option} {number:g}: {right}")
