"""``llamagen generate CHECKPOINT --class NAME|INDEX … --out grid.png``: pictures of chosen classes, or of captions."""

import argparse
from pathlib import Path

from llamagen_dist.commands import options
from llamagen_dist.errors import UserError


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", type=Path, metavar="CHECKPOINT", help="a GPT's run directory or step_… folder")
    wanted = parser.add_mutually_exclusive_group(required=True)
    wanted.add_argument(
        "--class",
        dest="classes",
        action="extend",
        nargs="+",
        metavar="NAME|INDEX",
        help="classes by name or number; all means every one",
    )
    wanted.add_argument(
        "--caption", dest="captions", action="extend", nargs="+", metavar="TEXT", help="for a text-conditional GPT"
    )
    parser.add_argument(
        "--out", type=Path, required=True, metavar="FILE", help="a .png or .jpg: one row per class or caption"
    )
    parser.add_argument("--text-encoder", type=Path, metavar="PATH", help="default: the one the checkpoint names")
    parser.add_argument("--tokenizer", type=Path, metavar="PATH", help="default: the one its token shards name")
    parser.add_argument("--per-class", type=int, default=8, metavar="N", help="pictures per row (default: 8)")
    parser.add_argument("--cfg-scale", type=float, default=2.0, metavar="S", help="guidance; 1 is none (default: 2)")
    parser.add_argument("--temperature", type=float, default=1.0, metavar="T", help="default: 1; 0 is greedy")
    parser.add_argument("--top-k", type=int, default=0, metavar="K", help="default: 0, all codes")
    parser.add_argument("--top-p", type=float, default=1.0, metavar="P", help="default: 1, all codes")
    weights = parser.add_mutually_exclusive_group()
    options.add_weights(weights)
    weights.add_argument("--ema", dest="weights", action="store_const", const="ema", help="short for --weights ema")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="default: 0")


def run(args: argparse.Namespace) -> None:
    import torch

    from llamagen_dist.sampling.conditions import classes, written_captions
    from llamagen_dist.sampling.grid import class_grid, save
    from llamagen_dist.sampling.load import class_number, load_gpt, load_tokenizer, open_checkpoint, tokenizer_of
    from llamagen_dist.sampling.pictures import Settings, rows_of_pictures

    options.within(args, "per-class", 1, 1 << 16)
    options.within(args, "cfg-scale", 1)
    options.within(args, "temperature", 0)
    options.within(args, "top-k", 0)
    options.within(args, "top-p", 0, 1, above=True)
    options.within(args, "seed", 0, (1 << 31) - 1)
    checkpoint = open_checkpoint(args.checkpoint, "checkpoint", which=options.which_weights(args))
    tokenizer = load_tokenizer(args.tokenizer or tokenizer_of(checkpoint), key="--tokenizer")
    gpt = load_gpt(checkpoint, tokenizer)
    if args.captions:
        if gpt.config.condition == "class":
            raise UserError(f"--caption: {args.checkpoint} is conditioned on classes; use --class")
        asked = written_captions(args.captions, gpt, args.text_encoder, torch.device("cpu"), "--text-encoder")
        chosen = list(range(asked.count))
    else:
        if gpt.config.condition == "text":
            raise UserError(f"--class: {args.checkpoint} is conditioned on text; use --caption TEXT")
        asked = classes(gpt)
        if args.classes == ["all"]:
            chosen = list(range(asked.count))
        else:
            chosen = list(dict.fromkeys(class_number(name, gpt.classes) for name in args.classes))
    settings = Settings(args.cfg_scale, -1, args.temperature, args.top_k, args.top_p)
    images, labels = rows_of_pictures(gpt.model, tokenizer.model, asked.at, chosen, args.per_class, args.seed, settings)
    save(args.out, lambda: class_grid(images, labels, asked.name, args.per_class))
    print(args.out)
