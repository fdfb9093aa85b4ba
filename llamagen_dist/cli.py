"""``llamagen …``: one sub-command per module in llamagen_dist/commands, imported only when its name was typed.

A module has ``arguments(parser)`` and ``run(args)``. It imports at its top what loads no torch, and the rest in
``run``: so ``llamagen --help`` takes a blink, and ``llamagen NAME --help`` not much longer.
"""

import argparse
import importlib
import sys
from collections.abc import Sequence

from llamagen_dist import __version__
from llamagen_dist.program import run

COMMANDS = {
    "quickstart": "train a tokenizer and a ladder of GPTs on real images, end to end, and write a report",
    "config": "print a config resolved, or everything that is wrong with it",
    "pack": "turn images into WebDataset shards with an index and a manifest",
    "shards": "verify, count or index shards",
    "launch": "start one program on several ranks",
    "check": "try out a cluster's nodes with a short job, before anything long is launched",
    "status": "what runs, how far it is, and why something does not",
    "evaluate": "score the checkpoints of a run that have no scores yet, while it trains or afterwards",
    "sweep": "run one program with many configs, skipping what is finished",
    "pipeline": "run the stages of a pipeline file, skipping what is finished",
    "convert": "turn LlamaGen's weight files into safetensors, and back",
    "export": "make a folder of a finished run that needs torch alone, with a model card; --push uploads it",
    "plan": "parameters, memory, FLOPs and time of a GPT run for every layout, before anything is launched",
    "generate": "make pictures of chosen classes with a trained GPT",
    "scaling": "fit laws to measured runs, and say what to train with a budget",
    "wandb-sync": "send what W&B (or trackio) lacks of finished or untracked runs",
    "report": "one page on a run, a sweep, a pipeline or an evaluation, as far as it is",
}


def main(argv: Sequence[str] | None = None) -> None:
    """Parse, import the one command that was asked for, run it. Raises what the command raises."""
    words = list(sys.argv[1:] if argv is None else argv)
    chosen = next((word for word in words if word in COMMANDS), None)
    parser = argparse.ArgumentParser(
        prog="llamagen", description="Train Llama image generators, on one core or a cluster."
    )
    parser.add_argument("--version", action="version", version=f"llamagen-dist {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, text in COMMANDS.items():
        sub = commands.add_parser(name, help=text, description=text)
        if name == chosen:
            module = importlib.import_module(f"llamagen_dist.commands.{name.replace('-', '_')}")
            module.arguments(sub)
    args, rest = parser.parse_known_args(words)
    if hasattr(args, "settings") and all("=" in word and not word.startswith("-") for word in rest):
        args.settings = [*args.settings, *rest]  # argparse takes no positional words after an option
    elif rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    module.run(args)


def console() -> None:
    """The ``llamagen`` script: main with the exit codes of a program."""

    run(main)


if __name__ == "__main__":
    console()
