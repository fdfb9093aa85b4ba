"""``llamagen config FILE [key=value …]``: the resolved YAML, or every error at once."""

import argparse


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", help="a YAML file of any kind (gpt, tokenizer, extract, sweep, cluster, …)")
    parser.add_argument("settings", nargs="*", metavar="key=value", help="laid on top of the file")


def run(args: argparse.Namespace) -> None:
    from llamagen_dist.config import dump, load

    print(dump(load(args.file, args.settings, complete=True)), end="")
