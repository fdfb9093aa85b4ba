"""``llamagen convert``: LlamaGen's .pt files to safetensors, and safetensors or our own runs to LlamaGen's .pt."""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from llamagen_dist.commands import options
from llamagen_dist.errors import UserError
from llamagen_dist.files import written_aside
from llamagen_dist.models.sizes import GPT_SIZES, VQ_SIZES

if TYPE_CHECKING:
    from llamagen_dist.checkpoint.averages import Average

FORMATS = ("llamagen", "safetensors")


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", type=Path, metavar="IN", help="a weights file, a run directory or a step_… folder")
    parser.add_argument("out", type=Path, metavar="OUT", help="the file to write; it must not exist")
    parser.add_argument("--from", dest="origin", choices=FORMATS, help="default: by the suffix of IN")
    parser.add_argument("--to", choices=FORMATS, help="default: by the suffix of OUT")
    parser.add_argument(
        "--size", choices=(*GPT_SIZES, *VQ_SIZES), help="refuse anything but this size (default: find out which it is)"
    )
    options.add_weights(parser)
    made = parser.add_mutually_exclusive_group()
    made.add_argument(
        "--width",
        type=float,
        metavar="W",
        help="of a run trained with ema.widths: the power-function average of this relative width, up to the newest "
        "checkpoint or the step_… folder",
    )
    made.add_argument(
        "--half-life",
        type=float,
        metavar="IMAGES",
        help="the same, an exponential average that halves in so many images",
    )


def run(args: argparse.Namespace) -> None:
    from llamagen_dist.checkpoint import llamagen
    from llamagen_dist.checkpoint.checkpoint import Checkpoint, identity_of

    if args.origin is not None and args.source.is_file() and args.origin != format_of(args.source):
        raise UserError(f"--from {args.origin}: {args.source} is a {format_of(args.source)} file by its suffix")
    to = args.to or format_of(args.out)
    if to != format_of(args.out):
        raise UserError(f"--to {to}: {args.out} must end in {'.safetensors' if to == 'safetensors' else '.pt or .pth'}")
    if args.out.exists():
        raise UserError(f"{args.out} is there already; remove it or choose another OUT")
    average = _average(args)
    if average is not None:
        weights, identity = average.weights, identity_of(average.weights)
    else:
        source = Checkpoint.open(args.source, which=options.which_weights(args))
        weights, identity = source.read_all(), source.identity
        for name, tensor in weights.items():  # one at a time: a clone of all at once would need the memory twice
            weights[name] = tensor.contiguous().clone()
    if (reason := llamagen.beyond(weights)) is not None:
        raise UserError(f"{args.source} {reason}")
    try:
        found = llamagen.describe(weights)
        differs = llamagen.difference(weights, args.size) if args.size else None
        lacks = llamagen.incomplete(weights)
    except UserError as error:
        raise UserError(f"{args.source}: {error}") from None
    if differs is not None:
        raise UserError(f"{args.source}: not {args.size}: {differs}")
    if lacks is not None:
        raise UserError(f"{args.source}: not a whole {found.kind}: {lacks}")

    def save(path: Path) -> None:
        if to == "safetensors":
            from safetensors.torch import save_file

            save_file(weights, path, metadata={"format": "pt", "kind": found.kind, "size": found.size or "own"})
        else:
            import torch

            torch.save({"model": weights}, path)

    written = write_checked(args.out, save, identity)
    print(f"{args.out}: {found.kind}, {found.size or 'a size of its own'}, {found.parameters:,} parameters")
    if average is not None:
        print(
            f"an average of steps 1 to {average.step:,}, made of {average.sources} kept ones; "
            f"its profile is {100 * average.residual:.2g} % off the true one's"
        )
    print(f"identity (names, shapes and bytes of the weights, the same in both formats): {written}")


def _average(args: argparse.Namespace) -> "Average | None":
    """The one that --width or --half-life asks for. Raises UserError."""
    if args.width is None and args.half_life is None:
        return None
    from llamagen_dist.checkpoint.averages import put_together

    if args.weights is not None:
        raise UserError("--weights names weights that a run has saved, and --width and --half-life others; give one")
    options.within(args, "width", 0, 0.28, above=True)
    options.within(args, "half-life", 0, above=True)
    return put_together(args.source, args.width, args.half_life)


def format_of(path: Path) -> str:
    """By the suffix. Raises UserError for any but .safetensors, .pt and .pth."""
    if path.suffix == ".safetensors":
        return "safetensors"
    if path.suffix in (".pt", ".pth"):
        return "llamagen"
    raise UserError(f"{path}: the suffix must be .safetensors, or .pt or .pth for LlamaGen's own format")


def write_checked(out: Path, save: Callable[[Path], None], identity: str) -> str:
    """Write aside, read back, compare, rename; returns the identity. Raises UserError when the disk refuses."""
    from llamagen_dist.checkpoint.checkpoint import Checkpoint

    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with written_aside(out) as aside:
            save(aside)
            if Checkpoint.open(aside).identity != identity:
                raise UserError(f"{out}: read back, the weights are not those that were written; is the disk in order?")
    except (OSError, RuntimeError) as error:  # torch reports a full disk as a RuntimeError
        raise UserError(f"{out}: cannot be written ({str(error).splitlines()[0]})") from None
    return identity
