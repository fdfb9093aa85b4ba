"""``llamagen pipeline FILE --out DIR``: run a pipeline's stages, skipping what is finished."""

import argparse
from pathlib import Path

from llamagen_dist.launch import options


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", type=Path, help="a YAML file of kind: pipeline")
    parser.add_argument("settings", nargs="*", metavar="key=value", help="the pipeline's variables")
    parser.add_argument("--out", type=Path, required=True, help="folder for everything; the same again goes on with it")
    options.add(parser)


def run(args: argparse.Namespace) -> None:
    from llamagen_dist.launch.stages import plan, words

    options.execute(plan(args.file, args.out.absolute(), words(args.settings), args.small), args.dry_run)
