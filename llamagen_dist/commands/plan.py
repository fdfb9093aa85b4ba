"""``llamagen plan CONFIG [key=value …]``: parameters, FLOPs, memory and time per layout, before a launch."""

import argparse
import json

from llamagen_dist.commands import options
from llamagen_dist.config import GPTConfigFile, load
from llamagen_dist.errors import UserError
from llamagen_dist.planning.plan import MFU, Machine, answer, tokens_of
from llamagen_dist.planning.show import show
from llamagen_dist.tracking.devices import named


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", help="a YAML file of kind gpt; its token shards need not exist yet")
    options.add_settings(parser)
    parser.add_argument("--gpus", type=int, metavar="N", help="ranks in all (default: one node's)")
    parser.add_argument("--nodes", type=int, metavar="N", help="instead of --gpus: so many nodes")
    parser.add_argument("--gpus-per-node", type=int, default=8, metavar="N", help="default: %(default)s")
    add_gpu(parser)
    parser.add_argument(
        "--write-rate", type=float, default=2.0, metavar="GB/S", help="of checkpoints, all ranks together (default: 2)"
    )
    parser.add_argument("--tokens", type=int, metavar="N", help="tokens per image (default: the shards', or 256)")
    parser.add_argument("--classes", type=int, metavar="N", help="default: the shards', or 1000")
    parser.add_argument("--vocab", type=int, metavar="N", help="codebook size (default: the shards', or 16384)")
    parser.add_argument("--json", action="store_true", help="print everything as JSON")


def run(args: argparse.Namespace) -> None:
    for name in ("tokens", "classes", "vocab"):
        options.within(args, name, 1)
    for name in ("gpus", "nodes", "gpus-per-node"):
        options.within(args, name, 1, 100_000)
    gpus = args.gpus or (args.nodes or 1) * args.gpus_per_node
    if args.gpus and args.nodes and args.gpus != args.nodes * args.gpus_per_node:
        there = f"{args.nodes} nodes of {args.gpus_per_node} GPUs are {args.nodes * args.gpus_per_node}"
        raise UserError(f"--gpus {args.gpus} and --nodes {args.nodes} do not agree: {there}")
    options.within(args, "write-rate", 0, above=True)
    here = machine(args, gpus, args.gpus_per_node, args.write_rate)
    config = load(args.config, args.settings)
    if not isinstance(config, GPTConfigFile):
        raise UserError(f"{args.config}: kind {config.kind} has no layouts to plan; give a config of kind gpt")
    plan = answer(config, tokens_of(config, args.vocab, args.tokens, args.classes), here)
    if args.json:
        print(json.dumps({"config": str(args.config), **plan}, indent=1, allow_nan=False))
    else:
        show(plan, str(args.config))


def add_gpu(parser: argparse.ArgumentParser, where: str = "") -> None:
    parser.add_argument(
        "--gpu",
        default="A100-80",
        metavar="NAME",
        help=f"{where}A100-40, A100-80, H100, H200 or custom:MEMORY_GIB:PEAK_TFLOPS (default: %(default)s)",
    )
    parser.add_argument(
        "--mfu", type=float, help=f"{where}share of the peak rate that is reached (default: {MFU}, an assumption)"
    )


def machine(args: argparse.Namespace, gpus: int, per_node: int, write_rate: float = 2.0) -> Machine:
    """What --gpu and --mfu describe. write_rate: of checkpoints, in GB/s. Raises UserError."""
    options.within(args, "mfu", 0, 1, above=True)
    return Machine(named(args.gpu), gpus, per_node, args.mfu or MFU, args.mfu is not None, write_rate * 1e9)
