"""Pictures that the model made, class by class, and how they were drawn."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llamagen_dist.report.blocks import Block, ImageGrid, Markdown, Section
from llamagen_dist.report.collect import Summary
from llamagen_dist.report.measured import Samples
from llamagen_dist.sampling.grid import mosaic

ROWS, COLUMNS = 2, 4
MOST_CLASSES = 20
_LARGEST_SIDE = 96  # pixels in the report; larger pictures are shown smaller


def section(s: Summary) -> Section | None:
    if s.samples is None:
        return None
    blocks: tuple[Block, ...] = (grid(s.samples, s.classes),)
    text = settings(s.samples.record)
    model = str(s.samples.record.get("checkpoint", "")).rstrip("/").rpartition("/")[2]
    whose = f"the GPT {model}" if model else "a GPT of the ladder"
    return Section(
        "Samples",
        (*blocks, Markdown(text)) if text else blocks,
        f"New images: {whose.replace('`', '')} writes the tokens of a class one after another, and the tokenizer turns "
        "them into pixels.",
    )


def grid(samples: Samples, classes: tuple[str, ...]) -> ImageGrid:
    """One tile per class: its first ROWS x COLUMNS pictures, none left out. At most MOST_CLASSES classes."""
    present = sorted(set(samples.labels.tolist()))
    shown = [present[i] for i in sorted({round(x) for x in np.linspace(0, len(present) - 1, MOST_CLASSES)})]
    tiles = [tile(samples.images[samples.labels == label][: ROWS * COLUMNS]) for label in shown]
    names = tuple(classes[label] if label < len(classes) else f"class {label}" for label in shown)
    every = "every class" if len(shown) == len(present) else f"{len(shown)} of {len(present)} classes"
    side = samples.images.shape[1]
    smaller = f", shown at {_LARGEST_SIDE}" if side > _LARGEST_SIDE else ""
    note = (
        f"The first {ROWS * COLUMNS} samples of {every}, in the order in which they were drawn and without a choice; "
        f"{side} × {samples.images.shape[2]} pixels{smaller}."
    )
    return ImageGrid(np.stack(tiles), names, width=240, note=note)


def tile(images: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """ROWS x COLUMNS pictures."""
    return mosaic([images[row * COLUMNS : (row + 1) * COLUMNS] for row in range(ROWS)], COLUMNS, _LARGEST_SIDE, 16)


def settings(record: Mapping[str, Any]) -> str:
    """The sampler's settings in words; only those that are recorded."""
    said = []
    scale = record.get("cfg_scale")
    if scale is not None:
        said.append("no classifier-free guidance" if scale == 1 else f"classifier-free guidance at scale {scale:g}")
    interval = record.get("cfg_interval")
    if scale not in (None, 1) and interval is not None and interval >= 0:
        said.append(f"guidance switched off after token {interval}")
    if "temperature" in record:
        said.append(f"temperature {record['temperature']:g}")
    if record.get("top_k"):
        said.append(f"only the {record['top_k']} likeliest codes (top-k)")
    if record.get("top_p", 1.0) != 1.0:
        said.append(f"only the likeliest codes that make up {record['top_p']:.0%} of the probability (top-p)")
    elif "top_p" in record and not record.get("top_k"):
        said.append("nothing cut off (no top-k, no top-p)")
    if "seed" in record:
        said.append(f"seed {record['seed']}")
    return f"How they were drawn: {', '.join(said)}." if said else ""
