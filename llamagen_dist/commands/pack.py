"""``llamagen pack SOURCE --out SHARDS``: images become WebDataset shards."""

import argparse
import os
from pathlib import Path

_MOST_PIXELS = 89_478_485  # images.MOST_PIXELS, which importing torch would make slow to show
_PIL_LIMIT = 2 * _MOST_PIXELS  # above it PIL itself refuses


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "source",
        help="a folder with one sub-folder per class; a .jsonl file (a line: image_path, text, and short and class if "
        "you have them); WebDataset tars (a folder, one tar, or a quoted pattern such as 'data/*.tar'); a tar that "
        "holds one tar per class (ImageNet's); an .npz file (arr_0: uint8 images [n, H, W, 3]; arr_1 or labels: "
        "integers); or builtin:fashion-mnist (10,000 real images, 28 x 28)",
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
    parser.add_argument(
        "--skip-bad",
        action="store_true",
        help="leave out images that cannot be read, or have no caption where others do (the manifest lists them)",
    )
    parser.add_argument(
        "--min-side", type=int, default=0, metavar="N", help="leave images out whose shorter side is below N pixels"
    )
    parser.add_argument(
        "--class-map",
        type=Path,
        metavar="FILE",
        help="fixes labels and class names: one class a line, label 0 first: its folder (or name in the source), "
        "a space, its name (default: the sorted folder names)",
    )
    parser.add_argument(
        "--format",
        choices=("png", "jpeg", "webp"),
        help="encode every image like this (default: PNG with --size; without it JPEG, PNG and WebP files are kept "
        "byte for byte)",
    )
    parser.add_argument("--quality", type=int, default=95, metavar="Q", help="of --format jpeg and webp (default: 95)")
    parser.add_argument(
        "--max-pixels",
        type=int,
        default=_MOST_PIXELS,
        metavar="N",
        help=f"a larger image counts as unreadable: it may be a decompression bomb (default: {_MOST_PIXELS:,})",
    )
    parser.add_argument("--samples-per-shard", type=int, default=2500, metavar="N", help="default: 2500")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    parser.add_argument("--jobs", type=int, default=cores, metavar="N", help=f"processes (default: {cores}, the cores)")


def run(args: argparse.Namespace) -> None:
    from llamagen_dist.data.pack import PackOptions, pack
    from llamagen_dist.errors import UserError

    for option in ("size", "samples_per_shard", "jobs"):
        value = getattr(args, option)
        if value is not None and value < 1:
            raise UserError(f"--{option.replace('_', '-')} {value}: must be at least 1")
    if args.held_out is not None and (args.held_out <= 0 or (args.held_out >= 1 and args.held_out % 1)):
        raise UserError(f"--held-out {args.held_out:g}: give a whole number of images, or a share between 0 and 1")
    if args.min_side < 0:
        raise UserError(f"--min-side {args.min_side}: must be at least 0")
    if not 1 <= args.quality <= 100:
        raise UserError(f"--quality {args.quality}: must lie between 1 and 100")
    if not 1 <= args.max_pixels <= _PIL_LIMIT:
        raise UserError(f"--max-pixels {args.max_pixels}: must lie between 1 and {_PIL_LIMIT}")
    if args.max_pixels > _MOST_PIXELS and args.size is None:
        raise UserError(f"--max-pixels {args.max_pixels}: images larger than {_MOST_PIXELS:,} pixels need --size")
    options = PackOptions(
        size=args.size,
        held_out=args.held_out,
        fit=args.fit,
        skip_bad=args.skip_bad,
        samples_per_shard=args.samples_per_shard,
        jobs=args.jobs,
        min_side=args.min_side,
        class_map=args.class_map,
        format=args.format,
        quality=args.quality,
        most_pixels=args.max_pixels,
    )
    for name, manifest in pack(args.source, args.out, options).items():
        classes = f", {len(manifest.classes)} classes" if manifest.classes else ""
        skipped = f", {len(manifest.skipped)} unreadable images left out" if manifest.skipped else ""
        small = f", {len(manifest.too_small)} left out below --min-side" if manifest.too_small else ""
        captions = ", with captions" if ".txt" in manifest.members else ""
        shards = f"{manifest.count:,} images in {len(manifest.shards)} shards"
        print(f"{args.out / name}: {shards}{classes}{captions}{skipped}{small}")
