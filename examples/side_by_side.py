"""PROGRAM: one picture of what several tokenizers make of the same images.

    python -m examples.side_by_side --out colour.png --box 16 "as configured=runs/colour/reconstructions" …

The originals come first; then, with ``--box N``, what is left of them after averaging down to N x N pixels and back,
which a tokenizer of N x N tokens must beat; then a row per folder of eval.reconstruct, with its scores over all images.
"""

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from llamagen_dist.data.images import load_images
from llamagen_dist.data.shards import open_shards
from llamagen_dist.errors import UserError
from llamagen_dist.evaluation.image_quality import psnr, unpadded
from llamagen_dist.files import read_json
from llamagen_dist.program import run as run_program
from llamagen_dist.sampling.grid import labelled_grid, save

_SAME = ("images", "image_size", "n")  # of a record: what must be alike for rows to be compared
_SCORES = {
    "psnr": "{:.2f} dB",
    "lpips": "LPIPS {:.3f}",
    "lpips-hed": "LPIPS-HED {:.3f}",
    "codebook_usage": "{:.0%} used",
}


def box_filtered(pixels: NDArray[np.uint8], side: int) -> NDArray[np.uint8]:
    """uint8 [n, S, S, 3], averaged down to ``side`` x ``side`` pixels, rounded, and repeated up to S again.

    Raises UserError where ``side`` does not divide S.
    """
    size = pixels.shape[1]
    if side < 1 or size % side:
        raise UserError(f"--box: {side} does not divide the images' side, {size} pixels")
    floats = torch.from_numpy(pixels).permute(0, 3, 1, 2).float()
    small = F.avg_pool2d(floats, size // side).round().byte()
    return small.repeat_interleave(size // side, 2).repeat_interleave(size // side, 3).permute(0, 2, 3, 1).numpy()


def opened(argument: str) -> tuple[str, Path, dict[str, Any]]:
    """``LABEL=FOLDER`` to (label, folder, its record). Raises UserError: another form, no finished reconstructions."""
    label, _, path = argument.partition("=")
    folder = Path(path)
    if not label or not path or not (folder / "record.json").is_file():
        raise UserError(f"{argument!r}: give LABEL=FOLDER, a folder that eval.reconstruct has finished")
    return label, folder, read_json(folder / "record.json")


def caption(label: str, scores: dict[str, Any]) -> str:
    return ": ".join([label, ", ".join(form.format(scores[key]) for key, form in _SCORES.items() if key in scores)])


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m examples.side_by_side", description="Tokenizers side by side.")
    parser.add_argument(
        "folders", nargs="+", metavar="LABEL=FOLDER", help="made by eval.reconstruct of the same images"
    )
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="a .png or .jpg")
    parser.add_argument("--box", type=int, metavar="N", help="also a row through a box filter of N x N pixels")
    parser.add_argument("--columns", type=int, default=10, metavar="N", help="images, evenly spread over all (10)")
    args = parser.parse_args(argv)
    rows = [opened(argument) for argument in args.folders]
    first = rows[0][2]
    for label, folder, record in rows[1:]:
        if different := [key for key in _SAME if record.get(key) != first.get(key)]:
            raise UserError(
                f"{label}: {folder} has other {', '.join(different)} than {rows[0][1]}; compare like with like"
            )
    size, count = first["image_size"], first["n"]
    if not 1 <= args.columns <= count:
        raise UserError(f"--columns: {args.columns}; there are {count} images")
    chosen = [number * count // args.columns for number in range(args.columns)]
    shards = open_shards(first["image_shards"], "images")
    if shards.manifest.fingerprint() != first["images"]:
        raise UserError(f"{first['image_shards']}: no longer the images that {rows[0][1]} was made from")
    names, cells = ["original"], [load_images(shards, chosen, size)]
    if args.box is not None:
        originals = load_images(shards, range(count), size)
        filtered = box_filtered(originals, args.box)
        region = unpadded(shards.manifest.padding, size, shards.manifest.image_size)
        pair = (torch.from_numpy(pixels).permute(0, 3, 1, 2) for pixels in (filtered, originals))
        names.append(caption(f"box filter to {args.box} x {args.box}", {"psnr": float(psnr(*pair, region).mean())}))
        cells.append(filtered[chosen])
    for label, folder, record in rows:
        names.append(caption(label, record))
        with np.load(folder / "reconstruction.npz") as arrays:
            cells.append(arrays["arr_0"][chosen])
    title = f"{len(chosen)} of {count} held-out images of {size} x {size} pixels; scores are over all of them"
    save(args.out, lambda: labelled_grid(np.stack(cells), names, [""] * len(chosen), title))


if __name__ == "__main__":
    run_program(main)
