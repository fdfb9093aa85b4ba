"""Options that several commands have, written once. Light to import: ``llamagen NAME --help`` must stay quick."""

import argparse
import math
from pathlib import Path

from llamagen_dist.errors import UserError


def add_settings(parser: argparse.ArgumentParser, what: str = "override keys of the file") -> None:
    parser.add_argument("settings", nargs="*", metavar="key=value", help=what)


def add_out(parser: argparse.ArgumentParser, what: str = "everything") -> None:
    parser.add_argument("--out", type=Path, required=True, help=f"folder for {what}; the same again resumes it")


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


def add_dry_run(parser: argparse.ArgumentParser, what: str) -> None:
    """what: is shown."""
    parser.add_argument("--dry-run", action="store_true", help=f"show {what}; start nothing")


def add_weights(parser: argparse._ActionsContainer) -> None:
    parser.add_argument(
        "--weights",
        choices=("model", "ema"),
        help="the trained weights, or their moving average (default: a run's trained weights; of a file that holds "
        "both, the average)",
    )


def which_weights(args: argparse.Namespace) -> str | None:
    """``--weights`` as Checkpoint.open takes it."""
    return {"model": "weights", "ema": "ema", None: None}[args.weights]


def within(args: argparse.Namespace, option: str, low: float, high: float = math.inf, *, above: bool = False) -> None:
    """Raises UserError for an option that was given and lies outside of low to high. above: low itself does too."""
    number = getattr(args, option.replace("-", "_"))
    if number is not None:
        check(f"--{option} {number:.10g}", number, low, high, above=above)


def check(shown: str, number: float, low: float, high: float = math.inf, *, above: bool = False) -> None:
    """Raises UserError for a number outside of low to high. shown: begins the message. above: low itself is too low."""
    if low < number <= high or (number == low and not above):  # so NaN is refused too
        return
    least = f"more than {low:g}" if above else f"{low:g} or more"
    most = "" if high == math.inf else f", at most {high:.10g}"
    raise UserError(f"{shown}: give {least}{most}")
