"""The keys of the programs that make pictures to be scored: eval.sample and eval.reconstruct."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from llamagen_dist.config.section import CountInt, Pictures, PositiveInt, Section
from llamagen_dist.config.sections import GPTModelSection, TokenizerModelSection

SampleSet = Literal["model", "untrained", "unigram"]


class SampleConfig(Section):
    """``kind: sample``, read by ``eval.sample``."""

    kind: Literal["sample"]
    checkpoint: Path
    """The GPT: a run directory (its newest checkpoint), a step_… folder, or a weights file."""
    weights: Literal["trained", "ema"] = "trained"
    """``ema``: the moving average, from a run that was trained with one."""
    model: GPTModelSection | None = None
    """The GPT's sizes, for a bare weights file (a checkpoint knows them itself)."""
    tokenizer: Path
    """A tokenizer run directory, a checkpoint folder, or a weights file."""
    tokenizer_model: TokenizerModelSection | None = None
    """The tokenizer's sizes, for a bare weights file."""
    image_size: PositiveInt | None = None
    """Pixels along a side. Empty: those of the token shards the GPT saw, or else those the tokenizer was trained on."""
    out: Path
    """Folder for NAME.npz of every set, grid.png and record.json."""
    images: Pictures = 50000
    """Pictures in every set."""
    sets: Annotated[tuple[SampleSet, ...], Field(min_length=1)] = ("model",)
    """``model``: the trained GPT. To compare with: ``untrained``, the same GPT before its first step (its head is
    zero, so all codes are equally likely), and ``unigram``, codes drawn one by one from the training histogram."""
    captions: Path | None = None
    """What a text-conditional GPT draws from: token shards with caption features (a held-out set), or a text file with
    one caption a line. Sample i has caption i modulo their number."""
    text_encoder: Path | None = None
    """The encoder for a text file; empty: the one that the checkpoint names."""
    tokens: Path | None = None
    """Training token shards, for ``unigram``. Empty: those named in the checkpoint."""
    cfg_scale: Annotated[float, Field(ge=1)] = 2.0
    """Classifier-free guidance: null + scale x (conditional - null); 1 switches it off."""
    cfg_interval: Annotated[int, Field(ge=-1)] = -1
    """-1 guides every token; k >= 0 the first k + 2, as LlamaGen counts."""
    temperature: Annotated[float, Field(ge=0)] = 1.0
    """0 takes the likeliest code each time."""
    top_k: CountInt = 0
    """0: all codes may be drawn."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    seed: Annotated[int, Field(ge=0, lt=1 << 31)] = 0
    """Sample i's noise is a hash of (seed, i); its class (or caption) is i modulo their number."""
    batch: PositiveInt = 64
    """Pictures per forward pass and rank. The last digits of a picture may depend on it; they do not depend on the
    number of ranks."""
    threads: PositiveInt | None = None
    """CPU threads per rank; empty leaves it to OMP_NUM_THREADS or torch."""

    @model_validator(mode="after")
    def _sets_differ(self) -> "SampleConfig":
        if len(set(self.sets)) < len(self.sets):
            raise ValueError(f"sets: {', '.join(self.sets)} names a set twice")
        return self


class ReconstructConfig(Section):
    """``kind: reconstruct``, read by ``eval.reconstruct``."""

    kind: Literal["reconstruct"]
    tokenizer: Path
    """A tokenizer run directory, a checkpoint folder, or a weights file."""
    model: TokenizerModelSection | None = None
    """The tokenizer's sizes, for a bare weights file."""
    images: Path
    """Folder of held-out image shards."""
    out: Path
    """Folder for reconstruction.npz and record.json."""
    image_size: PositiveInt | None = None
    """Pixels along a side; empty: what the tokenizer was trained on."""
    limit: Pictures | None = None
    """Only the first so many images; empty: all of them."""
    batch: PositiveInt = 64
    """Images per forward pass and rank."""
    threads: PositiveInt | None = None
    """CPU threads per rank; empty leaves it to OMP_NUM_THREADS or torch."""
