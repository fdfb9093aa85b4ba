"""Every option of `llamagen pack`, which is every key of a `kind: pack` file; the texts are the command's help."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Literal

from pydantic import ConfigDict, Field

from llamagen_dist.config.section import CountInt, PositiveFloat, PositiveInt, Section

MOST_PIXELS = 89_478_485
"""A larger image is taken for a decompression bomb: 256 MiB as RGB, the size that PIL warns of."""
PIL_LIMIT = 2 * MOST_PIXELS  # above it PIL itself refuses
Name = Annotated[str, Field(min_length=1)]


def cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class PackOptions(Section):
    """How pictures are packed."""

    model_config = ConfigDict(use_attribute_docstrings=True)

    size: PositiveInt | None = None
    """make every image N x N pixels (default: leave them)"""
    fit: Literal["crop", "pad"] | None = None
    """how --size is reached: scale and centre-crop, or zeros around equally small images (default: pad for arrays
    smaller than N, crop otherwise)"""
    held_out: PositiveFloat | None = None
    """keep N images apart (or a share, if below 1), evenly over the classes: writes SHARDS/train and
    SHARDS/validation"""
    skip_bad: bool = False
    """leave out images that cannot be read, or have no caption where others do (all are listed)"""
    min_side: CountInt = 0
    """leave images out whose shorter side is below N pixels"""
    split: Name | None = None
    """of a folder that holds train, val and the like: the one to pack"""
    class_map: Path | None = None
    """file that fixes labels and class names: one class a line, label 0 first: its folder (or name in the source), a
    space or tab, its name (default: the sorted folder names, by number where all are numbers)"""
    caption_key: Name | None = None
    """key of the captions in .jsonl lines and .json members (default: text or caption)"""
    class_key: Name | None = None
    """key of the class in .jsonl lines (default: class) and .json members"""
    format: Literal["png", "jpeg", "webp"] | None = None
    """encode every image like this (default: PNG with --size; without it JPEG, PNG and WebP files are kept byte for
    byte, unless they must be turned, brought to 8 bits or laid on white)"""
    quality: Annotated[int, Field(ge=1, le=100)] = 95
    """of --format jpeg and webp (default: 95)"""
    max_pixels: Annotated[int, Field(ge=1, le=PIL_LIMIT)] = MOST_PIXELS
    """a larger image counts as unreadable: it may be a decompression bomb (default: 89,478,485)"""
    samples_per_shard: PositiveInt = 2500
    """default: 2500"""
    jobs: PositiveInt = 1
    """processes (default of the command: the cores)"""

    def rules(self) -> Iterator[str]:
        if self.held_out is not None and self.held_out >= 1 and self.held_out % 1:
            yield f"held_out ({self.held_out:g}): give a whole number of images, or a share between 0 and 1"
        if self.max_pixels > MOST_PIXELS and self.size is None:
            yield f"max_pixels ({self.max_pixels}): images larger than {MOST_PIXELS:,} pixels need size"


class PackConfig(PackOptions):
    """A `kind: pack` file: the options with where the pictures come from and where the shards go."""

    kind: Literal["pack"] = "pack"
    source: Name
    """a folder with one sub-folder per class; a .jsonl file (a line: image_path, text, and short and class if you have
    them); WebDataset tars (a folder, one tar, or a quoted pattern such as 'data/*.tar'); a tar that holds one tar per
    class (ImageNet's); an .npz file (arr_0: uint8 images [n, H, W, 3]; arr_1 or labels: integers);
    builtin:fashion-mnist (10,000 real images, 28 x 28); or a .yaml file of kind: pack"""
    out: Path
    """folder for the shards"""
    jobs: PositiveInt = Field(default_factory=cores)
    """processes (default: the cores)"""
