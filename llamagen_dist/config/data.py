"""Where shards lie and how they are brought near, what is read of them, and ``kind: extract``."""

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from llamagen_dist.config.model import TokenizerModelSection
from llamagen_dist.config.section import CountInt, PositiveFloat, PositiveInt, Probability, Section, Threads

_REMOTE = re.compile(r"(?:[A-Za-z][A-Za-z0-9+.-]+://|pipe:)")


def is_remote(location: str | Path) -> bool:
    """Whether this is a URL (``https://…``, ``s3://…``) or a command (``pipe:…``), not a folder."""
    return isinstance(location, str) and _REMOTE.match(location) is not None


def _location(value: Any) -> Any:
    return Path(value) if isinstance(value, str) and not is_remote(value) else value


Location = Annotated[Path | str, BeforeValidator(_location)]
"""A folder as a Path, or a URL as a str, because a Path would turn ``https://`` into ``https:/``."""

STAGE = "LLAMAGEN_STAGE"
"""Environment variable: the ``stage`` of a cluster's profile, for the runs launched there."""


class ShardAccess(Section):
    """How shards are reached that do not lie on a fast local disk."""

    cache: Path | None = None
    """Folder on a local disk where remote shards are kept, shared by all processes of a node; needed for URLs
    unless they are staged."""
    cache_gb: PositiveFloat = 50.0
    """Most that the cache may hold, in 10^9 bytes; what was unused for longest goes first. With data.window_shards
    it should hold two windows, else the whole set."""
    allow_pipe: bool = False
    """Whether ``pipe:COMMAND`` may be run as a source of shards ({name} in it stands for the file's name)."""
    stage: Path | None = None
    """Copy the shards here once per node before anything starts (/dev/shm, or a local disk), checked against their
    sha256, shared by the node's ranks and removed at the end. /dev/shm counts as memory of the job. The nodes wait for
    each other afterwards, at most guard.start_minutes."""

    @property
    def staged_in(self) -> Path | None:
        """``stage``, or the cluster profile's where these keys do not say how shards are brought near."""
        if self.stage is not None or self.cache is not None:
            return self.stage
        return Path(os.environ[STAGE]) if os.environ.get(STAGE) else None


class TrainingData(ShardAccess):
    """The token shards of a GPT, or the image shards of a tokenizer."""

    train: Location
    """Folder of shards (with manifest.json): a path, or an ``https://``, ``s3://`` or ``pipe:`` source."""
    validation: Location
    """Folder of held-out shards."""
    window_shards: CountInt = 0
    """0: samples come from all shards in random order. K: from K randomly chosen shards at a time, for storage where
    reading here and there is slow. Keep it for the whole of a run."""


class TokenDataSection(TrainingData):
    short_captions: Probability = 0.0
    """With ``condition: text``: share of training samples that are shown their short caption (LlamaGen: 0.3)."""


class ImageDataSection(TrainingData):
    image_size: PositiveInt = 256
    random_crop: bool = True
    """LlamaGen's augmentation: short side U{size..1.25 size}, random crop."""
    horizontal_flip: bool = True
    workers: CountInt = 0
    """Decoding processes per rank; 0 decodes in the training process."""


class ExtractConfig(Section):
    """``kind: extract``, read by ``tokenizer_training.extract``."""

    kind: Literal["extract"]
    tokenizer: Path
    """A tokenizer run directory, a checkpoint folder, or a weights file."""
    model: TokenizerModelSection | None = None
    """The tokenizer's sizes, for a bare weights file (a checkpoint knows them itself)."""
    weights: Literal["trained", "ema"] | None = None
    """``ema``: the moving average, from a run that was trained with one. Empty: a run's trained weights; of a weights
    file that holds both, the average, as LlamaGen does. Whoever opens the run for these tokens finds the same ones."""
    images: Location
    """Folder of image shards, or a folder of such folders (train, validation); or one set's ``https://``, ``s3://`` or
    ``pipe:`` source."""
    data: ShardAccess = ShardAccess()
    """How the images are reached."""
    out: Path
    """Folder for the token shards; it gets the same sub-folders as ``images``."""
    image_size: PositiveInt = 256
    crops: Literal["center", "center_flip", "ten_crop"] = "ten_crop"
    """Stored per image: the centre crop, it and its mirror image, or ten crops for every crop range."""
    crop_ranges: tuple[Annotated[float, Field(ge=1)], ...] = (1.1, 1.05)
    """Ten crops are cut from the image at size x range, for each range (LlamaGen section 3.1: 1.1 and 1.05)."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Of the tokenizer's encoder; codes are always searched for in fp32. bf16 changes some: how many is measured."""
    text_encoder: Path | None = None
    """Folder of a T5 encoder: the captions (``.txt``) and their features go into the token shards. Empty: class labels
    only."""
    max_caption_tokens: PositiveInt = 120
    """Longer captions are cut."""
    short_captions: bool = True
    """Store the features of a short caption as well (``.short.txt``, else the caption's first sentence)."""
    batch: PositiveInt = 64
    """Crops encoded at once, per rank."""
    samples_per_shard: PositiveInt = 10000
    """Images per token shard; shards are what the ranks share out among themselves."""
    workers: CountInt = 0
    """Decoding threads per rank; 0 decodes between the batches."""
    threads: Threads = None

    def rules(self) -> Iterator[str]:
        if self.model is not None:
            yield from self.model.cannot_cut(self.image_size)
