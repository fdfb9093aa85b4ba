"""``llamagen quickstart``: the whole chain on one machine, on embedded images or your own."""

import argparse
import json
from pathlib import Path
from typing import Any

from llamagen_dist.commands import options
from llamagen_dist.commands.pipeline import rehearsal, run_here
from llamagen_dist.errors import UserError
from llamagen_dist.launch.snapshot import code_root
from llamagen_dist.launch.stages import plan, words
from llamagen_dist.report.quantities import count

OWN_HELD_OUT = "0.1"  # of --images: nobody knows beforehand how many there are


def arguments(parser: argparse.ArgumentParser) -> None:
    options.add_settings(parser, "the pipeline's variables")
    parser.add_argument(
        "--images",
        type=Path,
        metavar="DIR",
        help="your own images, one folder per class (default: the embedded Fashion-MNIST images)",
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("runs/quickstart"),
        help="folder for everything; the same again resumes it (default: runs/quickstart)",
    )
    parser.add_argument(
        "--config",
        type=Path,
        metavar="FILE",
        help="another pipeline file (default: configs/pipeline/quickstart.yaml)",
    )
    rehearsal(parser)


def run(args: argparse.Namespace) -> None:
    variables = words(args.settings)
    if args.images is not None:
        if not args.images.is_dir():
            raise UserError(
                f"--images {args.images}: there is no such folder; give one with a sub-folder of images per class"
            )
        own = {"images": str(args.images.absolute()), "held_out": OWN_HELD_OUT}
        variables = {**own, **variables}
    file = args.config or code_root() / "configs/pipeline/quickstart.yaml"
    made = plan(file, args.out.absolute(), variables, args.small)
    run_here(made, args.dry_run)
    if not args.dry_run:
        results = json.loads((made.out / "results.json").read_text(encoding="utf-8"))
        for line in headline(results):
            print(line)
        print(f"report:  {made.out / 'report.html'}\nnumbers: {made.out / 'results.json'}")


def headline(results: dict[str, Any]) -> list[str]:
    """The numbers that matter, as lines; what was not measured is left out."""
    lines = []
    tokenizer = results.get("tokenizer", {})
    if "psnr" in tokenizer:
        more = f", SSIM {tokenizer['ssim']:.3f}" if "ssim" in tokenizer else ""
        lines.append(f"tokenizer: PSNR {tokenizer['psnr']:.1f} dB{more} on held-out images")
    points = [point for point in results.get("gpt", []) if point.get("val_loss") is not None]
    if points:
        best = min(points, key=lambda point: point["val_loss"])
        sizes = len({point["name"] for point in points})
        lines.append(
            f"Llamas:    {sizes} sizes; best held-out loss {best['val_loss']:.3f} nats per token ({best['name']})"
        )
    parity = results.get("parity", {}).get("tp_max_abs_loss_diff")
    if parity is not None:
        lines.append(f"split over two ranks against whole: losses differ by at most {parity:.1e}")
    scores = results.get("eval", {})
    if "fid" in scores:
        anchors = (("fid_real", "real images"), ("rfid", "tokenizer alone"), ("fid_unigram", "codes by frequency"))
        known = ", ".join(f"{name} {scores[key]:.1f}" for key, name in anchors if key in scores)
        lines.append(f"samples:   FID {scores['fid']:.1f} from {scores['n']} images a side ({known})")
    elif "fid" in scores.get("absent", {}):
        lines.append(f"samples:   FID was not measured: {scores['absent']['fid']}")
    if "class_agreement" in scores:
        real = f", on real images {scores['class_agreement_real']:.0%}" if "class_agreement_real" in scores else ""
        lines.append(
            f"           a classifier finds the class that was asked for in {scores['class_agreement']:.0%}{real}"
        )
    law = results.get("scaling", {})
    if "predicted" in law:
        band = " ({:.3f} to {:.3f})".format(*law["ci95"]) if "ci95" in law else ""
        after = f" after {count(law['tokens'])} tokens" if "tokens" in law else ""
        lines.append(
            f"law:       predicted {law['predicted']:.3f}{band} for the largest{after}; measured {law['measured']:.3f}"
        )
    return lines
