"""``llamagen config FILE [key=value …]``: the resolved YAML, or every error at once."""

import argparse

from llamagen_dist.commands import options
from llamagen_dist.config import dump, load


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", help="a YAML file of any kind (gpt, tokenizer, extract, sweep, cluster, …)")
    options.add_settings(parser)


def run(args: argparse.Namespace) -> None:
    print(dump(load(args.file, args.settings, complete=True)), end="")
