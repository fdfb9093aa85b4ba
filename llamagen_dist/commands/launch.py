"""``llamagen launch MODULE CONFIG [key=value …]``: one program on several ranks, here or on a cluster."""

import argparse
from pathlib import Path


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("module", help="for example llamagen_dist.train_gpt or tokenizer_training.train")
    parser.add_argument("config", type=Path, help="its YAML file")
    parser.add_argument("settings", nargs="*", metavar="key=value", help="laid on top of the file")
    parser.add_argument(
        "--cluster", default="local", metavar="FILE", help="where: this machine (local, default), or a cluster profile"
    )
    parser.add_argument("--ranks", type=int, help="on this machine: processes (default: 1)")
    parser.add_argument("--nodes", type=int, help="on a cluster: instead of the profile's")
    parser.add_argument("--gpus-per-node", type=int, help="on a cluster: instead of the profile's")
    parser.add_argument("--follow", action="store_true", help="on a cluster: stay until the run has ended")
    parser.add_argument(
        "--dry-run", action="store_true", help="show what would run (on a cluster: the sbatch script); start nothing"
    )


def run(args: argparse.Namespace) -> None:
    from llamagen_dist.config import load
    from llamagen_dist.errors import UserError

    config = load(args.config, args.settings)
    if args.cluster == "local":
        from llamagen_dist.launch import single

        if args.nodes not in (None, 1):
            raise UserError(f"--nodes {args.nodes}: this machine is one node; give --cluster a profile")
        ranks = args.ranks if args.ranks is not None else args.gpus_per_node or 1
        if ranks < 1:
            raise UserError(f"--ranks {ranks}: give 1 or more")
        single.launch(args.module, config, ranks, args.dry_run)
        return
    from llamagen_dist.launch.slurm.run import launch

    if args.ranks is not None:
        raise UserError("--ranks is for this machine; on a cluster give --nodes and --gpus-per-node")
    profile = load(args.cluster, kind="cluster")
    launch(
        args.module,
        config,
        profile,
        nodes=args.nodes,
        gpus_per_node=args.gpus_per_node,
        dry_run=args.dry_run,
        follow=args.follow,
    )
