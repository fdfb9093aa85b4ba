"""``llamagen config FILE [key=value …]``: the resolved YAML, or every error at once."""

import argparse
from pathlib import Path

from llamagen_dist.commands import options
from llamagen_dist.config import PipelineConfig, SweepConfig, dump, load
from llamagen_dist.launch import points, stages


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "file",
        type=Path,
        help="a YAML file of any kind (gpt, tokenizer, extract, sweep, cluster, …); of a sweep and of a pipeline every "
        "point's and stage's config is checked too",
    )
    options.add_settings(parser)


def run(args: argparse.Namespace) -> None:
    config = load(args.file, args.settings, complete=True)
    if isinstance(config, SweepConfig):
        points.fill(config, args.file, Path("out"))
    elif isinstance(config, PipelineConfig):
        stages.fill(config, args.file, Path("out"))
    print(dump(config), end="")
