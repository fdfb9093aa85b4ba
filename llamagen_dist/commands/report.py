"""``llamagen report OUT``: report.html and results.json of a quickstart, made from its folder alone."""

import argparse
from pathlib import Path

from llamagen_dist.console import LOG


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", type=Path, metavar="OUT", help="the --out of llamagen quickstart")
    parser.add_argument("--out", type=Path, metavar="FILE", help="where to write the page (default: OUT/report.html)")


def run(args: argparse.Namespace) -> None:
    from llamagen_dist.report.quickstart import write

    for path in write(args.folder, args.out):
        LOG.info(path)
