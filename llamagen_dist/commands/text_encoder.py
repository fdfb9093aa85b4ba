"""``llamagen text-encoder SHARDS --out DIR``: a small, untrained T5 that knows the words of these captions."""

import argparse
from pathlib import Path


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("shards", metavar="SHARDS", help="image shards with captions, made by llamagen pack")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for the encoder")
    parser.add_argument("--dim", type=int, default=64, metavar="N", help="width of the features (default: 64)")
    parser.add_argument("--layers", type=int, default=2, metavar="N", help="default: 2")


def run(args: argparse.Namespace) -> None:
    from llamagen_dist.data.demo.small_text_encoder import make_small_text_encoder
    from llamagen_dist.data.shards import CAPTION_MEMBER, SHORT_CAPTION_MEMBER, open_shards
    from llamagen_dist.errors import UserError

    if args.dim < 8 or args.dim % 8:
        raise UserError(f"--dim {args.dim}: must be a multiple of 8")
    if args.layers < 1:
        raise UserError(f"--layers {args.layers}: must be at least 1")
    shards = open_shards(args.shards, "images")
    if CAPTION_MEMBER not in shards.manifest.members:
        raise UserError(f"{args.shards}: has no captions ({CAPTION_MEMBER}); pack a .jsonl file with captions")
    captions = (
        shards.read(sample, member).decode("utf-8", "replace")
        for sample in range(len(shards))
        for member in shards.parts(sample)
        if member in (CAPTION_MEMBER, SHORT_CAPTION_MEMBER)
    )
    words = make_small_text_encoder(captions, args.out, args.dim, args.layers, heads=8)
    print(f"{args.out}: an untrained T5 encoder of width {args.dim} that knows {words:,} words")
