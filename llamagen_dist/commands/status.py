"""``llamagen status [FOLDER …]``: what runs, how far it is, and why something does not."""

import argparse
import json
from pathlib import Path

from llamagen_dist.errors import UserError
from llamagen_dist.launch.status import screen
from llamagen_dist.launch.status.survey import look


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "folders",
        nargs="*",
        type=Path,
        metavar="FOLDER",
        help="runs, sweeps, pipelines, or folders of them (default: ./runs)",
    )
    parser.add_argument("--watch", action="store_true", help="show it again every 5 s until Ctrl-C")
    parser.add_argument("--json", action="store_true", help="print everything as JSON")


def run(args: argparse.Namespace) -> None:
    if args.watch and args.json:
        raise UserError("--watch and --json: give one of the two; a program calls llamagen status --json again")
    folders = args.folders or [Path("runs")]
    if args.json:
        print(json.dumps(look(folders).as_json(), indent=1, allow_nan=False))
    else:
        screen.show(lambda: look(folders), again=args.watch)
