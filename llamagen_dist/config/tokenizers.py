"""``kind: tokenizers``: which tokenizers are compared, on which images, and the small GPT that judges them."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from llamagen_dist.config.evaluate import InceptionSection, LPIPSSection, PerturbSection
from llamagen_dist.config.model import GPTModelSection
from llamagen_dist.config.section import CountInt, Pictures, PositiveInt, Section, Threads
from llamagen_dist.config.training import OptimSection, TrainSection

_NAME = re.compile(r"[a-z0-9][a-z0-9_-]*")


class ProbeSection(Section):
    """The generation probe: a small GPT, trained on each tokenizer's tokens for the same images with the same seeds."""

    model: GPTModelSection
    """Its size; vocabulary and tokens per image are the tokenizer's."""
    train: TrainSection
    """Its budget. ``train.seed`` is each of ``seeds``."""
    optim: OptimSection = OptimSection()
    seeds: Annotated[tuple[Annotated[int, Field(ge=0, lt=1 << 31)], ...], Field(min_length=1)] = (0,)
    """One training and one set of pictures each. Two or more show how much of a difference is chance."""
    crops: Literal["center", "center_flip"] = "center"
    """What of each training image becomes tokens."""
    cfg_scale: Annotated[float, Field(ge=1)] = 1.5
    """How pictures are drawn, as ``kind: sample`` has these keys."""
    temperature: Annotated[float, Field(ge=0)] = 1.0
    top_k: CountInt = 0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0

    def rules(self) -> Iterator[str]:
        if len(set(self.seeds)) < len(self.seeds):
            yield "seeds: one stands there twice"
        if self.train.seed:
            yield "train.seed: is each of seeds in turn; leave it out"
        if self.model.condition != "class":
            yield f"model.condition: the probe draws classes, not {self.model.condition}; leave it out"


class TokenizersConfig(Section):
    """``kind: tokenizers``, read by ``eval.tokenizers``."""

    kind: Literal["tokenizers"]
    tokenizers: dict[str, Path]
    """Name -> a tokenizer run directory, a checkpoint folder, or a weights file that is known by its tensors."""
    images: Path
    """A folder with the image shards ``train``, which the probe learns, and ``validation``, on which all is scored."""
    out: Path
    """Folder for results.json, results.md, results.png, record.json and steps/, whatever was trained and drawn."""
    image_size: PositiveInt | None = None
    """Pixels along a side; empty: that of the shards."""
    limit: Pictures | None = None
    """Only the first so many held-out images; empty: all. The probe draws as many pictures."""
    lpips: LPIPSSection | None = None
    """Measure LPIPS too, under the name of its network; empty: off."""
    perturb: PerturbSection | None = PerturbSection()
    """For the pFID; empty: off. Its ``neighbours`` must be fewer than the codes of the smallest codebook."""
    inception: InceptionSection = InceptionSection()
    probe: ProbeSection | None = None
    """Empty: no probe, only what costs no training."""
    batch: PositiveInt = 64
    """Pictures per forward pass and rank."""
    ranks: PositiveInt = 1
    """Processes of each step, on this machine."""
    threads: Threads = None

    def rules(self) -> Iterator[str]:
        if not self.tokenizers:
            yield "tokenizers: name at least one, as in {vq: runs/vq}"
        for name in self.tokenizers:
            if not _NAME.fullmatch(name):
                yield f"tokenizers.{name}: a name is made of small letters, digits, - and _, for it names folders too"
        if self.limit is not None and self.limit < 2:
            yield f"limit: {self.limit} is no distribution; give at least two"
