"""``llamagen launch MODULE CONFIG [key=value …]``: one program on several ranks, with snapshot and logs."""

import argparse
from pathlib import Path


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("module", help="for example llamagen_dist.train_gpt or tokenizer_training.train")
    parser.add_argument("config", type=Path, help="its YAML file")
    parser.add_argument("settings", nargs="*", metavar="key=value", help="laid on top of the file")
    parser.add_argument("--cluster", choices=["local"], default="local", help="where: this machine (default)")
    parser.add_argument("--ranks", type=int, default=1, help="processes (default: 1)")
    parser.add_argument("--dry-run", action="store_true", help="show what would run and about how long; start nothing")


def run(args: argparse.Namespace) -> None:
    from llamagen_dist.config import UserError, load
    from llamagen_dist.launch import single

    if args.ranks < 1:
        raise UserError(f"--ranks {args.ranks}: give 1 or more")
    single.launch(args.module, load(args.config, args.settings), args.ranks, args.dry_run)
