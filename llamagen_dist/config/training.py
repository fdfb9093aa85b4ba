"""``kind: gpt``, and what a tokenizer's training has too: every key of a run, with its meaning and range.

The text under a field is its documentation. Models, data and the tokenizer (tokenizer.py) have files of their own.
"""

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError, ValidationInfo, field_validator, model_validator

from llamagen_dist.config.data import ImageDataSection, TokenDataSection
from llamagen_dist.config.during import EvaluationSection
from llamagen_dist.config.model import GPTModelSection, TokenizerModelSection
from llamagen_dist.config.section import (
    CountFloat,
    CountInt,
    Images,
    Pictures,
    PositiveFloat,
    PositiveImages,
    PositiveInt,
    Probability,
    Section,
    Threads,
    explain,
)
from llamagen_dist.config.yaml_text import merge, nest


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

    def rules(self) -> Iterator[str]:
        if self.images % self.global_batch:
            nearest = max(1, round(self.images / self.global_batch)) * self.global_batch
            yield (
                f"images ({self.images}) must be a multiple of global_batch "
                f"({self.global_batch}); the nearest is {nearest}"
            )


class GPTTrainSection(TrainSection):
    anneal_from: Images = 0
    """Of ``model.order: rar``: up to this image all sequences are in random orders, from here on fewer and fewer."""
    anneal_until: Images = 0
    """From this image on all are in raster order. The paper's two are half and three quarters of ``images``."""

    def rules(self) -> Iterator[str]:
        yield from super().rules()
        if self.anneal_until < self.anneal_from:
            yield "anneal_until must not lie before anneal_from"


class OptimSection(Section):
    """Adam (tokenizer) or AdamW (GPT), with LlamaGen's defaults (paper section 3.1)."""

    kind: Literal["adamw", "muon"] = "adamw"
    """``muon``, of a GPT: the matrices of the blocks are trained by Muon, whose updates are orthogonal, everything else
    by AdamW. Usually fewer images for the same loss; its update costs a fixed time, so it wants large batches."""
    lr: PositiveFloat = 1e-4
    muon_lr: PositiveFloat | None = None
    """Muon's rate at the top of the schedule, which it shares. Empty: ``lr``, as its updates are scaled to AdamW's."""
    betas: tuple[Probability, Probability] = (0.9, 0.95)
    eps: PositiveFloat = 1e-8
    weight_decay: CountFloat = 0.05
    """Of matrices only (two or more dimensions), as LlamaGen does; those of the blocks and the head where the keys
    below say otherwise for the rest."""
    embedding_decay: CountFloat | None = None
    """Of embeddings; empty: ``weight_decay``."""
    norm_decay: CountFloat = 0.0
    bias_decay: CountFloat = 0.0
    clip: CountFloat = 1.0
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
    final_lr: CountFloat = 0.0
    """The rate that ``cosine`` and ``wsd`` end at."""

    @property
    def ends_at(self) -> float:
        """The image from which on the rate stays at ``final_lr``; infinite for schedules without an end."""
        if self.schedule == "cosine":
            return self.cosine_images
        return self.cooldown_from + self.cooldown_images if self.schedule == "wsd" else math.inf

    @property
    def constant_until(self) -> float:
        """Up to so many images a run is the same as a shorter run that ended there; infinite without a cooldown."""
        if self.schedule == "cosine":
            return self.warmup_images
        return self.cooldown_from if self.schedule == "wsd" else math.inf

    def rules(self) -> Iterator[str]:
        if self.schedule == "warmup" and not self.warmup_images:
            yield "schedule: warmup needs warmup_images > 0"
        if self.schedule == "constant" and self.warmup_images:
            yield "schedule: constant has no warm-up; set schedule: warmup beside warmup_images"
        if (self.schedule == "wsd") != (self.cooldown_images > 0):
            yield "schedule: wsd goes with cooldown_images > 0, and the others with cooldown_images: 0"
        if (self.schedule == "cosine") != (self.cosine_images > 0):
            yield "schedule: cosine goes with cosine_images > 0, and the others with cosine_images: 0"
        if self.schedule == "cosine" and self.cosine_images <= self.warmup_images:
            yield "cosine_images must lie behind the warm-up"
        if self.muon_lr is not None and self.kind != "muon":
            yield f"muon_lr: kind: {self.kind} has no Muon; set kind: muon beside it, or leave it out"
        if self.final_lr > self.lr:
            yield "final_lr must not be above lr"
        if self.cooldown_images and self.cooldown_from < self.warmup_images:
            yield "cooldown_from must not lie inside the warm-up"


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
    threads: Threads = None

    def rules(self) -> Iterator[str]:
        if self.sequence and self.tensor == 1:
            yield ("sequence: true splits the sequence over the tensor ranks; set tensor: 2 or more beside it")


class ComputeSection(Section):
    """How the same numbers are computed: precision, and memory traded for time."""

    precision: Literal["fp32", "bf16"] = "fp32"
    """``bf16``: bfloat16 weights and activations with fp32 masters, moments and gradient sums."""
    recompute_every: CountInt = 0
    """Activation checkpointing: 0 none, 1 every block's activations are recomputed in the backward pass, k every
    k-th block's."""
    compile: bool = False
    """torch.compile the blocks (needs a C++ compiler on CPU)."""


Width = Annotated[float, Field(gt=0.0, le=0.25)]


class EMASection(Section):
    """Moving averages of the fp32 weights, kept beside them; that of ``decay`` is saved as ``ema-*.safetensors``."""

    decay: Probability = 0.0
    """Per optimizer step; 0 switches it off (LlamaGen: 0.9999 where it is on)."""
    widths: tuple[Width, ...] = ()
    """Of two power-function averages, such as [0.05, 0.1], kept as ``ema-WIDTH-*.safetensors``: after training
    ``llamagen convert RUN OUT --width …`` (or ``--half-life``) makes an average of any length from those of all
    checkpoints that are still there (Karras et al., arXiv 2312.02696). A width is the spread of an average's weights
    as a share of the training so far. Empty: none."""

    @property
    def averages(self) -> int:
        """How many there are."""
        return (self.decay > 0) + len(self.widths)

    def rules(self) -> Iterator[str]:
        if self.widths and len({f"{width:g}" for width in self.widths}) != 2:
            yield "widths: give two that differ, such as [0.05, 0.1], or none"


class ValidationSection(Section):
    """When and on how much the held-out loss is measured."""

    every_images: Images = 0
    """0: only at ``at_images`` and at the end."""
    at_images: tuple[PositiveImages, ...] = ()
    images: Pictures | None = None
    """How many held-out images; empty: all of them."""
    batch: PositiveInt = 256
    """Images per rank and forward pass while validating."""
    weights: Literal["trained", "ema"] = "trained"
    """``ema``: the loss of the moving average, which at a constant learning rate is less noisy and near that of a run
    that ends there with a cooldown."""


class CheckpointSection(Section):
    every_images: Images = 0
    """0: only at the end and when the run is stopped."""
    keep_last: PositiveInt = 2
    keep_every_images: Images = 0
    """Also keep permanently the first checkpoint at or after every multiple of this; 0: none."""
    background: bool = True
    """Copy the state to memory and write it while training continues: costs one host copy of this rank's share, and at
    most one file's worth (1 GiB, and the tensor being put together) more. False: training waits, and only the file's
    worth is in memory."""


class LogSection(Section):
    every_steps: PositiveInt = 10
    profile_steps: tuple[PositiveInt, PositiveInt] | None = None
    """[a, b]: write a torch profiler trace of steps a to b (Chrome's format) to run_dir/log/."""

    def rules(self) -> Iterator[str]:
        if self.profile_steps is not None and self.profile_steps[1] < self.profile_steps[0]:
            yield "profile_steps: the first step must not lie behind the last"


class WandbSection(Section):
    """Weights & Biases. The id is kept in RUN/wandb_id, so that every start of a run writes into the same W&B run."""

    project: str
    entity: str | None = None
    """Empty: the account's default."""
    group: str | None = None
    """Empty: the sweep or ladder that the run belongs to."""
    name: str | None = None
    """Empty: the run directory's name."""
    tags: tuple[str, ...] = ()
    mode: Literal["auto", "online", "offline"] = "auto"
    """``offline`` writes to RUN/wandb only. ``auto``: what WANDB_MODE says, else online where there is a key (``wandb
    login`` or WANDB_API_KEY), and offline where there is none."""


class TrackioSection(Section):
    """trackio (the extra ``trackio``): a dashboard on this machine, without an account."""

    project: str
    space: str | None = None
    """A Hugging Face Space to write to instead."""
    group: str | None = None
    """As that of ``wandb``."""
    name: str | None = None


class TrackingSection(Section):
    """Where a run is shown besides metrics.jsonl, which is always written. A tracker that fails never stops a run."""

    wandb: WandbSection | None = None
    trackio: TrackioSection | None = None
    pictures: CountInt = 8
    """A tokenizer's validation shows so many held-out images over their reconstructions, in run_dir/pictures and in
    the trackers; 0: none."""
    finish_s: CountFloat = 30.0
    """A run that ends waits so long for the last lines to be sent; ``llamagen wandb-sync`` sends what is missing."""

    def named(self) -> dict[str, WandbSection | TrackioSection]:
        """The trackers that are set, by name."""
        both = {"wandb": self.wandb, "trackio": self.trackio}
        return {name: section for name, section in both.items() if section is not None}


def grouped(data: Mapping[str, Any], group: str) -> dict[str, Any]:
    """The plain values of a training's config, with its trackers' empty ``group`` filled in."""
    given = data.get("tracking")
    trackers = given.items() if isinstance(given, Mapping) else ()
    unset = {
        name: {"group": group}
        for name, section in trackers
        if isinstance(section, Mapping) and not section.get("group")
    }
    return merge(data, {"tracking": unset}) if unset else dict(data)


class GuardSection(Section):
    """What stops a run that has gone wrong, and how soon."""

    hang_minutes: CountFloat = 30.0
    """No step for so long: every rank writes its stacks, the silent one is named, the run ends with exit code 75 and
    can be started again. 0: never."""
    start_minutes: PositiveFloat = 60.0
    """Time-out of collectives until the first step is done (start, compilation, the first files)."""
    collective_minutes: PositiveFloat = 10.0
    """Time-out of collectives from then on."""
    skip_non_finite: CountInt = 0
    """So many steps with a non-finite loss or gradient are left out (and counted) before the run stops; 0 stops at
    the first."""
    spike_window: Annotated[int, Field(ge=8)] = 128
    """The spike score is (loss - mean) / deviation of the last so many logged steps."""
    spike_score: PositiveFloat = 6.0
    """Scores above this are reported."""


def _complete(info: ValidationInfo) -> bool:
    return bool((info.context or {}).get("complete"))


class TrainingConfig(Section):
    """What every training run has."""

    kind: str
    run_dir: Path
    model: GPTModelSection | TokenizerModelSection
    data: TokenDataSection | ImageDataSection
    train: TrainSection
    optim: OptimSection = OptimSection()
    parallel: ParallelSection = ParallelSection()
    validation: ValidationSection = ValidationSection()
    checkpoint: CheckpointSection = CheckpointSection()
    ema: EMASection = Field(default=EMASection(), validate_default=True)
    log: LogSection = LogSection()
    tracking: TrackingSection = TrackingSection()
    guard: GuardSection = GuardSection()

    # Rules between sections belong to the last of them and look at those before it, so that they are heard even where
    # another section is wrong; pydantic leaves a wrong one out of info.data.
    @field_validator("ema")
    @classmethod
    def _validated_where_there_is_one(cls, ema: EMASection, info: ValidationInfo) -> EMASection:
        validation = info.data.get("validation")
        if validation is not None and validation.weights == "ema" and ema.decay == 0:
            raise ValueError("decay: validation.weights asks for the moving average: set one (such as 0.999)")
        checkpoint = info.data.get("checkpoint")
        if ema.widths and checkpoint is not None and not (checkpoint.every_images and checkpoint.keep_every_images):
            raise ValueError(
                "widths: other averages are made from those of many checkpoints: set checkpoint.every_images and "
                "checkpoint.keep_every_images to a sixteenth of train.images or less"
            )
        return ema


class GPTConfigFile(TrainingConfig):
    """``kind: gpt``, read by ``llamagen_dist.train_gpt``."""

    kind: Literal["gpt"]
    model: GPTModelSection
    data: TokenDataSection
    train: GPTTrainSection
    compute: ComputeSection = ComputeSection()
    init_from: Path | None = None
    """Start a new run from other weights: a run directory, a step_… folder, or a weights file (also LlamaGen's)."""
    init_weights: Literal["trained", "ema"] | None = None
    """Which weights of ``init_from``. Empty: a run's trained ones; of a file that also holds an average, that."""
    init_classes: Path | None = None
    """Class names of ``init_from``, one a line, where it does not carry them (a bare weights file)."""
    evaluation: EvaluationSection | None = Field(default=None, exclude_if=lambda section: section is None)
    """Scores of its checkpoints while it trains; empty: none."""
    ladder: dict[str, dict[str, Any]] = Field(default_factory=dict)
    """Several runs in one process start: name -> the dotted keys that differ. Each trains in run_dir/NAME."""

    @field_validator("parallel")
    @classmethod
    def _ranks_can_share_the_model(cls, parallel: ParallelSection, info: ValidationInfo) -> ParallelSection:
        # only where asked for: ``llamagen plan`` takes such a config and says what to change
        if "model" in info.data and _complete(info):
            # the vocabulary is the token shards' and not known here: every number divides zero
            why = info.data["model"].gpt(vocab_size=0).unsplittable(parallel.tensor)
            if why is not None:
                raise ValueError(f"tensor: {why}")
        return parallel

    @field_validator("train")
    @classmethod
    def _annealed_where_there_is_an_order(cls, train: GPTTrainSection, info: ValidationInfo) -> GPTTrainSection:
        order = info.data["model"].order if "model" in info.data else None
        if order == "rar" and not train.anneal_until:
            raise ValueError(
                "anneal_until: model.order: rar needs the image from which on sequences are in raster order, and "
                "anneal_from, up to which all are random; half and three quarters of images, for example"
            )
        if order == "raster" and train.anneal_until:
            raise ValueError("anneal_until: belongs to model.order: rar, and the order is raster; leave it out")
        return train

    @field_validator("compute")
    @classmethod
    def _the_engine_can_do_it(cls, compute: ComputeSection, info: ValidationInfo) -> ComputeSection:
        parallel = info.data.get("parallel")
        if parallel is not None and compute.precision == "bf16" and parallel.zero == 0:
            raise ValueError(
                "precision: bf16 needs the fp32 masters that DeepSpeed keeps: set parallel.zero to 1, 2 or 3"
            )
        if parallel is not None and compute.compile and parallel.zero == 3:
            raise ValueError(
                "compile: ZeRO-3 gathers weights in hooks around every layer, which leave the compiler nothing to fuse "
                "and make it start over at every one: set compile: false, or parallel.zero to 1 or 2"
            )
        return compute

    @field_validator("init_weights", "init_classes")
    @classmethod
    def _of_something(cls, value: Any, info: ValidationInfo) -> Any:
        if value is not None and info.data.get("init_from", value) is None:
            what = "classes" if info.field_name == "init_classes" else "weights"
            raise ValueError(f"names the {what} of init_from, which is empty")
        return value

    def rung(self, name: str, complete: bool = False) -> "GPTConfigFile":
        """The run of one ladder entry. Raises pydantic's ValidationError for keys or values that cannot be."""
        data = merge(self.model_dump(exclude={"ladder"}), nest(self.ladder[name]))
        data = grouped(data, self.run_dir.name) | {"run_dir": self.run_dir / name}
        return GPTConfigFile.model_validate(data, context={"complete": complete})

    @model_validator(mode="after")
    def _rungs_are_runs(self, info: ValidationInfo) -> "GPTConfigFile":
        problems = []
        for name in self.ladder:
            try:
                rung = self.rung(name, _complete(info))
            except ValidationError as error:
                problems += [f"ladder.{name}: {line}" for line in explain(error, GPTConfigFile)]
                continue
            if rung.parallel.tensor != self.parallel.tensor:
                problems.append(
                    f"ladder.{name}: parallel.tensor cannot differ between rungs of one process start; "
                    "train it as a run of its own"
                )
        if problems:
            raise ValueError("\n".join(problems))
        return self


def rungs(config: GPTConfigFile) -> list[tuple[str, GPTConfigFile]]:
    """The runs a config asks for: itself, or one per ladder entry."""
    return [(name, config.rung(name)) for name in config.ladder] or [(config.run_dir.name, config)]
