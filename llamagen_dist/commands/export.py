"""``llamagen export RUN --out DIR [--push REPO]``: a finished run as a folder that needs torch alone."""

import argparse
from pathlib import Path

from llamagen_dist.commands import options
from llamagen_dist.console import LOG
from llamagen_dist.hub.push import open_hub, push


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "run", type=Path, metavar="RUN", help="a GPT's or tokenizer's run directory, or a step_… folder"
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="an empty folder, or a new one")
    parser.add_argument(
        "--weights", choices=("model", "ema"), help="default: the moving average where the run kept one"
    )
    parser.add_argument("--tokenizer", type=Path, metavar="PATH", help="default: the one its token shards name")
    parser.add_argument(
        "--evaluation",
        type=Path,
        metavar="FILE.json",
        help="of eval.evaluate; default: evaluation.json of RUN or the two folders above, if it is of these weights",
    )
    parser.add_argument("--push", metavar="REPO", help="then upload it, as OWNER/NAME; needs huggingface-hub")


def run(args: argparse.Namespace) -> None:
    from llamagen_dist.hub.export import read_run, write

    hub = open_hub(args.push) if args.push is not None else None
    export = read_run(args.run, options.which_weights(args), args.tokenizer, args.evaluation)
    new = write(export, args.out)
    parts = " and tokenizer" if export.kind != "tokenizer" and "tokenizer" in export.weights else ""
    which = "moving average (ema)" if export.group == "ema" else "trained weights"
    LOG.info(f"{args.out}: {export.kind}{parts}, {export.parameters:,} parameters, {which}")
    for score in export.scores:
        values = "  ".join(f"{key} {value:.5g}" for key, value in score.values.items())
        LOG.info(f"{score.what} (N {'unknown' if score.n is None else score.n}): {values}")
    for note in export.notes:
        LOG.info(f"note: {note}")
    if not new:
        LOG.info(f"{args.out}: was exported before; nothing was written")
    if hub is not None:
        LOG.info(f"pushed: {push(hub, args.out, args.push)}")
