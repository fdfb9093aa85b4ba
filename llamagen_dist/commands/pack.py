"""``llamagen pack SOURCE --out SHARDS``: images become WebDataset shards."""

import argparse
import os
from pathlib import Path


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "source",
        help="builtin:fashion-mnist (10,000 real images, 28 x 28), a folder with one sub-folder per class, "
        "or an .npz file (arr_0: uint8 images [n, H, W, 3]; arr_1 or labels: integers)",
    )
    parser.add_argument("--out", type=Path, required=True, metavar="SHARDS", help="folder for the shards")
    parser.add_argument("--size", type=int, metavar="N", help="make every image N x N pixels (default: leave them)")
    parser.add_argument(
        "--fit",
        choices=("crop", "pad"),
        help="how --size is reached: scale and centre-crop, or zeros around equally small images (default: "
        "pad for arrays smaller than N, crop otherwise)",
    )
    parser.add_argument(
        "--held-out",
        type=float,
        metavar="N",
        help="keep N images apart (or a share, if below 1), evenly over the classes: writes SHARDS/train and "
        "SHARDS/validation",
    )
    parser.add_argument("--skip-bad", action="store_true", help="leave unreadable images out (the manifest lists them)")
    parser.add_argument("--samples-per-shard", type=int, default=2500, metavar="N", help="default: 2500")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    parser.add_argument("--jobs", type=int, default=cores, metavar="N", help=f"processes (default: {cores}, the cores)")


def run(args: argparse.Namespace) -> None:
    from llamagen_dist.config import UserError
    from llamagen_dist.data.pack import PackOptions, pack

    for option in ("size", "samples_per_shard", "jobs"):
        value = getattr(args, option)
        if value is not None and value < 1:
            raise UserError(f"--{option.replace('_', '-')} {value}: must be at least 1")
    if args.held_out is not None and (args.held_out <= 0 or (args.held_out >= 1 and args.held_out % 1)):
        raise UserError(f"--held-out {args.held_out:g}: give a whole number of images, or a share between 0 and 1")
    options = PackOptions(
        args.size, args.held_out, args.fit, args.skip_bad, args.samples_per_shard, args.jobs
    )  # fmt: skip
    for name, manifest in pack(args.source, args.out, options).items():
        classes = f", {len(manifest.classes)} classes" if manifest.classes else ""
        skipped = f", {len(manifest.skipped)} unreadable images left out" if manifest.skipped else ""
        print(f"{args.out / name}: {manifest.count:,} images in {len(manifest.shards)} shards{classes}{skipped}")
