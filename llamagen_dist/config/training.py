"""The keys that every training run has: lengths, optimizer, layout, when to validate, save, log and give up."""

import math
from typing import Annotated, Literal

from pydantic import Field, model_validator

from llamagen_dist.config.section import (
    CountInt,
    Images,
    Pictures,
    PositiveImages,
    PositiveInt,
    Probability,
    Section,
)


class TrainSection(Section):
    """How much is trained, in images: the unit of progress everywhere."""

    images: PositiveImages
    """Images shown in the whole run (an image shown twice counts twice)."""
    global_batch: PositiveInt = 256
    """Images per optimizer step over all ranks; it does not change with the number of ranks."""
    micro_batch: PositiveInt | None = None
    """Images per rank in one forward pass; the rest is accumulated. Empty: the rank's whole share at once."""
    seed: CountInt = 0
    """Seeds the initial weights, the data order, the label dropout and the dropout masks."""

    @model_validator(mode="after")
    def _whole_batches(self) -> "TrainSection":
        if self.images % self.global_batch:
            nearest = max(1, round(self.images / self.global_batch)) * self.global_batch
            raise ValueError(
                f"images ({self.images}) must be a multiple of global_batch "
                f"({self.global_batch}); the nearest is {nearest}"
            )
        return self


class OptimSection(Section):
    """Adam (tokenizer) or AdamW (GPT), with LlamaGen's defaults (paper section 3.1)."""

    lr: Annotated[float, Field(gt=0)] = 1e-4
    betas: tuple[Probability, Probability] = (0.9, 0.95)
    eps: Annotated[float, Field(gt=0)] = 1e-8
    weight_decay: Annotated[float, Field(ge=0)] = 0.05
    """Applied to matrices only (two or more dimensions), as LlamaGen does."""
    clip: Annotated[float, Field(ge=0)] = 1.0
    """Largest gradient norm; 0 switches clipping off."""
    schedule: Literal["constant", "warmup", "cosine", "wsd"] = "constant"
    """``warmup``: linear from 0 over ``warmup_images``, then constant. ``cosine``: the same warm-up (0 is allowed),
    then half a cosine down to ``final_lr``, reached at image ``cosine_images``. ``wsd``: the same warm-up, constant,
    then from image ``cooldown_from`` on linear to ``final_lr`` over ``cooldown_images`` (warm-up, stable, decay)."""
    warmup_images: Images = 0
    cosine_images: Images = 0
    """Where the cosine ends, counted from the start of the run; usually ``train.images``."""
    cooldown_from: Images = 0
    cooldown_images: Images = 0
    final_lr: Annotated[float, Field(ge=0)] = 0.0
    """The rate that ``cosine`` and ``wsd`` end at."""

    @property
    def constant_until(self) -> float:
        """Up to so many images a run is the same as a shorter run that ended there; infinite without a cooldown."""
        if self.schedule == "cosine":
            return self.warmup_images
        return self.cooldown_from if self.schedule == "wsd" else math.inf

    @model_validator(mode="after")
    def _schedule_has_its_lengths(self) -> "OptimSection":
        if self.schedule == "warmup" and not self.warmup_images:
            raise ValueError("schedule: warmup needs warmup_images > 0")
        if self.schedule == "constant" and self.warmup_images:
            raise ValueError("schedule: constant has no warm-up; set schedule: warmup beside warmup_images")
        if (self.schedule == "wsd") != (self.cooldown_images > 0):
            raise ValueError("schedule: wsd goes with cooldown_images > 0, and the others with cooldown_images: 0")
        if (self.schedule == "cosine") != (self.cosine_images > 0):
            raise ValueError("schedule: cosine goes with cosine_images > 0, and the others with cosine_images: 0")
        if self.schedule == "cosine" and self.cosine_images <= self.warmup_images:
            raise ValueError("cosine_images must lie behind the warm-up")
        if self.final_lr > self.lr:
            raise ValueError("final_lr must not be above lr")
        if self.cooldown_images and self.cooldown_from < self.warmup_images:
            raise ValueError("cooldown_from must not lie inside the warm-up")
        return self


class ParallelSection(Section):
    """The layout: how the model and its optimizer state are split over the ranks. It never changes the result."""

    tensor: PositiveInt = 1
    """Ranks that share one copy of the model (Megatron-core tensor parallelism)."""
    sequence: bool = False
    """Also split what lies between the split layers (norms, dropouts, residual stream) along the sequence over the
    ``tensor`` ranks: less activation memory for the same communication."""
    zero: Literal[0, 1, 2, 3] = 0
    """DeepSpeed ZeRO stage over the data-parallel ranks: 0 nothing is split, 1 optimizer state, 2 gradients too,
    3 weights too."""
    threads: PositiveInt | None = None
    """CPU threads per rank; empty leaves it to OMP_NUM_THREADS or torch."""

    @model_validator(mode="after")
    def _sequence_needs_tensor(self) -> "ParallelSection":
        if self.sequence and self.tensor == 1:
            raise ValueError(
                "sequence: true splits the sequence over the tensor ranks; set tensor: 2 or more beside it"
            )
        return self


class ComputeSection(Section):
    """How the same numbers are computed: precision, and memory traded for time."""

    precision: Literal["fp32", "bf16"] = "fp32"
    """``bf16``: bfloat16 weights and activations with fp32 masters, moments and gradient sums."""
    recompute_every: CountInt = 0
    """Activation checkpointing: 0 none, 1 every block's activations are recomputed in the backward pass, k every
    k-th block's."""
    compile: bool = False
    """torch.compile the blocks (needs a C++ compiler on CPU)."""


class EMASection(Section):
    """A moving average of the fp32 weights, kept beside them and saved as ``ema-*.safetensors``."""

    decay: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Per optimizer step; 0 switches it off (LlamaGen: 0.9999 where it is on)."""


class ValidationSection(Section):
    """When and on how much the held-out loss is measured."""

    every_images: Images = 0
    """0: only at ``at_images`` and at the end."""
    at_images: tuple[PositiveImages, ...] = ()
    images: Pictures | None = None
    """How many held-out images; empty: all of them."""
    batch: PositiveInt = 256
    """Images per rank and forward pass while validating."""


class CheckpointSection(Section):
    every_images: Images = 0
    """0: only at the end and when the run is told to stop."""
    keep_last: PositiveInt = 2
    keep_every_images: Images = 0
    """Also keep, for ever, the first checkpoint at or after every multiple of this; 0: none."""
    background: bool = True
    """Copy the state to memory and write it while training goes on: costs one host copy of this rank's share of it, and
    at most one file's worth (1 GiB, and the tensor being put together) more. False: training waits, and only the file's
    worth is held."""


class LogSection(Section):
    every_steps: PositiveInt = 10
    profile_steps: tuple[PositiveInt, PositiveInt] | None = None
    """[a, b]: write a torch profiler trace of steps a to b (Chrome's format) to run_dir/log/."""

    @model_validator(mode="after")
    def _steps_in_order(self) -> "LogSection":
        if self.profile_steps is not None and self.profile_steps[1] < self.profile_steps[0]:
            raise ValueError("profile_steps: the first step must not lie behind the last")
        return self


class GuardSection(Section):
    """What stops a run that has gone wrong, and how soon."""

    hang_minutes: Annotated[float, Field(ge=0)] = 30.0
    """No step for so long: every rank writes its stacks, the silent one is named, the run ends with exit code 75 and
    can be started again. 0: never."""
    start_minutes: Annotated[float, Field(gt=0)] = 60.0
    """Time-out of collectives until the first step is done (start, compilation, the first files)."""
    collective_minutes: Annotated[float, Field(gt=0)] = 10.0
    """Time-out of collectives from then on."""
    skip_non_finite: CountInt = 0
    """So many steps with a non-finite loss or gradient are left out (and counted) before the run stops; 0 stops at
    the first."""
    spike_window: Annotated[int, Field(ge=8)] = 128
    """The spike score is (loss - mean) / deviation of the last so many logged steps."""
    spike_score: Annotated[float, Field(gt=0)] = 6.0
    """Scores above this are reported."""
