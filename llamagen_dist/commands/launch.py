"""``llamagen launch MODULE CONFIG [key=value …]``: one program on several ranks, here or on a cluster."""

import argparse
from pathlib import Path

from llamagen_dist.commands import options
from llamagen_dist.commands.pipeline import run_here
from llamagen_dist.config import load
from llamagen_dist.launch.graph import single
from llamagen_dist.launch.slurm.launch import Target, launch


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("module", help="for example llamagen_dist.train_gpt or tokenizer_training.train")
    parser.add_argument("config", type=Path, help="its YAML file")
    options.add_settings(parser)
    options.add_cluster(parser, "one job there")
    options.add_size(parser, ranks=1)
    options.add_dry_run(parser, "what would run (on a cluster: the sbatch script)")


def run(args: argparse.Namespace) -> None:
    config = load(args.config, args.settings)
    if args.cluster == "local":
        run_here(single(args.module, config, options.ranks_here(args, args.gpus_per_node or 1)), args.dry_run)
        return
    options.no_ranks(args)
    target = Target(load(args.cluster, kind="cluster"), args.nodes, args.gpus_per_node)
    launch(single(args.module, config), target, dry_run=args.dry_run, follow=args.follow)
