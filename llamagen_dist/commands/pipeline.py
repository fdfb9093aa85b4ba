"""``llamagen pipeline FILE --out DIR``: run a pipeline's stages, skipping what is finished."""

import argparse
from pathlib import Path

from llamagen_dist.launch import options


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", type=Path, help="a YAML file of kind: pipeline")
    parser.add_argument("settings", nargs="*", metavar="key=value", help="the pipeline's variables")
    parser.add_argument("--out", type=Path, required=True, help="folder for everything; the same again goes on with it")
    parser.add_argument(
        "--cluster",
        default="local",
        metavar="FILE",
        help="a cluster profile (slurm/NAME.yaml): one job per stage; default: one after another on this machine",
    )
    parser.add_argument("--follow", action="store_true", help="on a cluster: stay until the last stage has ended")
    options.add(parser)


def run(args: argparse.Namespace) -> None:
    from llamagen_dist.launch.stages import plan, words

    made = plan(args.file, args.out.absolute(), words(args.settings), args.small)
    if args.cluster == "local":
        options.execute(made, args.dry_run)
        return
    from llamagen_dist.config import load
    from llamagen_dist.launch.slurm import pipeline

    profile = load(args.cluster, kind="cluster")
    if args.dry_run:
        pipeline.show(made, profile)
    else:
        pipeline.launch(made, profile, follow=args.follow)
