"""Held-out images beside what the tokenizer makes of them."""

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from llamagen_dist.build import build_vq
from llamagen_dist.checkpoint.checkpoint import Checkpoint
from llamagen_dist.checkpoint.folder import complete
from llamagen_dist.config import TokenizerConfigFile
from llamagen_dist.data.images import load_images, to_floats
from llamagen_dist.data.shards import Shards, open_shards
from llamagen_dist.errors import UserError
from llamagen_dist.models.vq import to_uint8
from llamagen_dist.report.blocks import ImageGrid
from llamagen_dist.sampling.grid import mosaic

PER_CLASS = 2
MOST_CLASSES = 20
_LARGEST_SIDE = 192  # pixels in the report; larger images are shown smaller
_BATCH = 16


def reconstruct(config: TokenizerConfigFile, checkpoint: Checkpoint, images: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """images, and the result: uint8 [n, S, S, 3]. checkpoint: the tokenizer's.

    Rounding is LlamaGen's (``models.vq.to_uint8``). eval.reconstruct's file is not read: it may be of another
    checkpoint, or not be there, while this picture belongs to every report of a tokenizer.
    """
    model = build_vq(config.model)
    model.load_state_dict(checkpoint.read_all())
    model.eval()
    parts = []
    for start in range(0, len(images), _BATCH):
        decoded = model.decode(model.encode(to_floats(images[start : start + _BATCH])))
        parts.append(to_uint8(decoded).permute(0, 2, 3, 1).numpy())
    return np.concatenate(parts)


def first_of_each_class(shards: Shards) -> list[tuple[str, list[int]]]:
    """[(class name, numbers of its first PER_CLASS samples)], at most MOST_CLASSES. No labels: no names."""
    if shards.manifest.classes is None:
        last = min(len(shards) // PER_CLASS, MOST_CLASSES)
        return [("", [PER_CLASS * group + i for i in range(PER_CLASS)]) for group in range(last)]
    wanted = len(shards.manifest.classes)
    found: dict[int, list[int]] = {}
    for start in range(0, len(shards), 1024):
        block = range(start, min(start + 1024, len(shards)))
        for sample, label in zip(block, shards.labels(block).tolist(), strict=True):
            if len(found.setdefault(label, [])) < PER_CLASS:
                found[label].append(sample)
        if len(found) == wanted and all(len(numbers) == PER_CLASS for numbers in found.values()):
            break
    return [(shards.manifest.classes[label], found[label]) for label in sorted(found)[:MOST_CLASSES]]


def grid(config: TokenizerConfigFile, run_dir: Path, image_shards: Path) -> ImageGrid | None:
    """One tile per class: originals on top, reconstructions below. None where either is missing."""
    if not complete(run_dir) or not (image_shards / "manifest.json").exists():
        return None
    checkpoint = Checkpoint.newest(run_dir, which="weights", warn=False)
    if checkpoint is None:
        raise UserError(f"{run_dir}: every checkpoint there is damaged; run the tokenizer's stage again")
    shards = open_shards(image_shards, "images")
    groups = first_of_each_class(shards)
    if not groups:
        return None
    numbers = [number for _, members in groups for number in members]
    originals = load_images(shards, numbers, config.data.image_size)
    rebuilt = reconstruct(config, checkpoint, originals)
    tiles, at = [], 0
    for _, members in groups:
        span = slice(at, at + len(members))
        tiles.append(mosaic([originals[span], rebuilt[span]], PER_CLASS, _LARGEST_SIDE, 28))
        at += len(members)
    every = shards.manifest.classes is None or len(groups) == len(shards.manifest.classes)
    size = config.data.image_size
    smaller = f", shown at {_LARGEST_SIDE}" if size > _LARGEST_SIDE else ""
    note = (
        f"The first held-out images of {'every class' if every else f'{len(groups)} classes'}, {size} × "
        f"{size} pixels{smaller}. Upper row of each tile: the original; lower row: decoded from its tokens."
    )
    return ImageGrid(np.stack(tiles), tuple(name for name, _ in groups), width=176, note=note)
