"""``llamagen plan CONFIG [key=value …]``: parameters, FLOPs, memory and time per layout, before a launch."""

import argparse
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from llamagen_dist.planning.plan import Machine


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", help="a YAML file of kind gpt; its token shards need not exist yet")
    parser.add_argument("settings", nargs="*", metavar="key=value", help="laid on top of the file")
    parser.add_argument("--gpus", type=int, metavar="N", help="ranks in all (default: one node's)")
    parser.add_argument("--nodes", type=int, metavar="N", help="instead of --gpus: so many nodes")
    parser.add_argument("--gpus-per-node", type=int, default=8, metavar="N", help="default: %(default)s")
    parser.add_argument(
        "--gpu",
        default="A100-80",
        metavar="NAME",
        help="A100-40, A100-80, H100, H200 or custom:MEMORY_GIB:PEAK_TFLOPS (default: %(default)s)",
    )
    parser.add_argument(
        "--mfu", type=float, help="share of the peak rate that is reached (default: 0.4, an assumption)"
    )
    parser.add_argument(
        "--write-rate", type=float, default=2.0, metavar="GB/S", help="of checkpoints, all ranks together (default: 2)"
    )
    parser.add_argument("--tokens", type=int, metavar="N", help="tokens per image (default: the shards', or 256)")
    parser.add_argument("--classes", type=int, metavar="N", help="default: the shards', or 1000")
    parser.add_argument("--vocab", type=int, metavar="N", help="codebook size (default: the shards', or 16384)")
    parser.add_argument("--json", action="store_true", help="print everything as JSON")


def run(args: argparse.Namespace) -> None:
    import json

    from llamagen_dist.config import GPTConfigFile, load
    from llamagen_dist.errors import UserError
    from llamagen_dist.planning.plan import answer, tokens_of

    machine = _machine(args)
    for name in ("tokens", "classes", "vocab"):
        number = getattr(args, name)
        if number is not None and number < 1:
            raise UserError(f"--{name} {number}: give 1 or more")
    config = load(args.config, args.settings)
    if not isinstance(config, GPTConfigFile):
        raise UserError(f"{args.config}: kind {config.kind} has no layouts to plan; give a config of kind gpt")
    found = answer(config, tokens_of(config, args.vocab, args.tokens, args.classes), machine)
    if args.json:
        print(json.dumps({"config": str(args.config), **found}, indent=1, allow_nan=False))
        return
    from llamagen_dist.planning.show import show

    show(found, str(args.config))


def _machine(args: argparse.Namespace) -> "Machine":
    from llamagen_dist.errors import UserError
    from llamagen_dist.planning.plan import MFU, Machine
    from llamagen_dist.tracking.devices import named

    device = named(args.gpu)
    for name in ("gpus", "nodes", "gpus_per_node"):
        number = getattr(args, name)
        if number is not None and not 1 <= number <= 100_000:
            raise UserError(f"--{name.replace('_', '-')} {number}: give a number from 1 to 100000")
    gpus = args.gpus or (args.nodes or 1) * args.gpus_per_node
    if args.gpus and args.nodes and args.gpus != args.nodes * args.gpus_per_node:
        raise UserError(
            f"--gpus {args.gpus} and --nodes {args.nodes} do not agree: {args.nodes} nodes of {args.gpus_per_node} "
            f"GPUs are {args.nodes * args.gpus_per_node}; give one of the two"
        )
    if args.mfu is not None and not 0 < args.mfu <= 1:
        raise UserError(f"--mfu {args.mfu}: a share of the peak rate, above 0 and at most 1 (0.4 = 40 %)")
    if not args.write_rate > 0:
        raise UserError(f"--write-rate {args.write_rate}: GB/s, above 0")
    mfu = MFU if args.mfu is None else args.mfu
    return Machine(device, gpus, args.gpus_per_node, mfu, args.mfu is not None, args.write_rate * 1e9)
