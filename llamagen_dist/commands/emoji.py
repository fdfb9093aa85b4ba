"""``llamagen emoji PACKAGE --out DIR``: a real captioned set for ``llamagen pack``, some captions held out."""

import argparse
from pathlib import Path


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "package",
        type=Path,
        metavar="PACKAGE",
        help="the .tgz that npm pack emoji-datasource-google@16.0.0 downloads, or its unpacked folder",
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for .jsonl files and images")


def run(args: argparse.Namespace) -> None:
    from llamagen_dist.data.demo.emoji import prepare_emoji

    train, held_out = prepare_emoji(args.package, args.out)
    print(
        f"{args.out}: {train:,} captioned pictures in train.jsonl, {held_out:,} with other captions in validation.jsonl"
    )
