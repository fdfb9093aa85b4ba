"""Every configuration key of every program, with its meaning, default and range.

One YAML file holds one *kind* (``kind: gpt`` and so on); ``llamagen config FILE`` prints it resolved. The text
under a field is its documentation.
"""

import math
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

PositiveInt = Annotated[int, Field(gt=0)]
CountInt = Annotated[int, Field(ge=0)]
Probability = Annotated[float, Field(ge=0, lt=1)]


class Section(BaseModel):
    """A frozen group of keys in which an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, protected_namespaces=())


class TrainSection(Section):
    """How much is trained, in images: the unit of progress everywhere."""

    images: PositiveInt
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
    schedule: Literal["constant", "warmup", "wsd"] = "constant"
    """``warmup``: linear from 0 over ``warmup_images``, then constant. ``wsd``: the same (a warm-up of 0 is allowed),
    then from image ``cooldown_from`` on linear to 0 over ``cooldown_images`` (warm-up, stable, decay)."""
    warmup_images: CountInt = 0
    cooldown_from: CountInt = 0
    cooldown_images: CountInt = 0

    @property
    def constant_until(self) -> float:
        """Up to so many images a run is the same as a shorter run that ended there; infinite without a cooldown."""
        return self.cooldown_from if self.schedule == "wsd" else math.inf

    @model_validator(mode="after")
    def _schedule_has_its_lengths(self) -> "OptimSection":
        if self.schedule == "warmup" and not self.warmup_images:
            raise ValueError("schedule: warmup needs warmup_images > 0")
        if self.schedule == "constant" and self.warmup_images:
            raise ValueError("schedule: constant has no warm-up; set schedule: warmup beside warmup_images")
        if (self.schedule == "wsd") != (self.cooldown_images > 0):
            raise ValueError("schedule: wsd goes with cooldown_images > 0, and the others with cooldown_images: 0")
        if self.cooldown_images and self.cooldown_from < self.warmup_images:
            raise ValueError("cooldown_from must not lie inside the warm-up")
        return self


class ParallelSection(Section):
    """The layout: how the model and its optimizer state are split over the ranks."""

    tensor: PositiveInt = 1
    """Ranks that share one copy of the model (Megatron-core tensor parallelism)."""
    zero: Literal[0, 1, 2] = 0
    """DeepSpeed ZeRO stage over the data-parallel ranks: 0 nothing, 1 optimizer state, 2 gradients too."""
    threads: PositiveInt | None = None
    """CPU threads per rank; empty leaves it to OMP_NUM_THREADS or torch."""

    @model_validator(mode="after")
    def _tensor_needs_zero(self) -> "ParallelSection":
        if self.tensor > 1 and self.zero == 0:
            raise ValueError(f"tensor: {self.tensor} runs under DeepSpeed: set zero: 1 or zero: 2 beside it")
        return self


class ValidationSection(Section):
    """When and on how much the held-out loss is measured."""

    every_images: CountInt = 0
    """0: only at ``at_images`` and at the end."""
    at_images: tuple[PositiveInt, ...] = ()
    images: PositiveInt | None = None
    """How many held-out images; empty: all of them."""
    batch: PositiveInt = 256
    """Images per rank and forward pass while validating."""


class CheckpointSection(Section):
    every_images: CountInt = 0
    """0: only at the end and when the run is told to stop."""
    keep_last: PositiveInt = 2


class LogSection(Section):
    every_steps: PositiveInt = 10


class GPTModelSection(Section):
    """A named LlamaGen size, or the four numbers of an own one."""

    size: str | None = None
    """``GPT-B``, ``GPT-L``, ``GPT-XL``, ``GPT-XXL``, ``GPT-XXXL``, ``GPT-1B``, ``GPT-3B``, ``GPT-7B``."""
    n_layer: PositiveInt | None = None
    n_head: PositiveInt | None = None
    dim: PositiveInt | None = None
    multiple_of: PositiveInt = 256
    """The feed-forward width is rounded up to a multiple of this."""
    token_dropout_p: Probability = 0.1
    resid_dropout_p: Probability = 0.1
    ffn_dropout_p: Probability = 0.1
    drop_path_rate: Probability = 0.0
    class_dropout_p: Probability = 0.1
    """Share of training samples whose label is replaced by the null class (classifier-free guidance)."""

    @model_validator(mode="after")
    def _size_or_numbers(self) -> "GPTModelSection":
        own = [name for name in ("n_layer", "n_head", "dim") if getattr(self, name) is not None]
        if self.size is not None and own:
            raise ValueError(f"give either size or n_layer, n_head and dim, not both (size and {', '.join(own)})")
        if self.size is None and len(own) < 3:
            raise ValueError("give size (for example GPT-B), or all of n_layer, n_head and dim")
        return self


class TokenDataSection(Section):
    train: Path
    """Folder of token shards (with manifest.json)."""
    validation: Path
    """Folder of held-out token shards."""


class GPTConfigFile(Section):
    """``kind: gpt``, read by ``llamagen_dist.train_gpt``."""

    kind: Literal["gpt"]
    run_dir: Path
    model: GPTModelSection
    data: TokenDataSection
    train: TrainSection
    optim: OptimSection = OptimSection()
    parallel: ParallelSection = ParallelSection()
    validation: ValidationSection = ValidationSection()
    checkpoint: CheckpointSection = CheckpointSection()
    log: LogSection = LogSection()
    ladder: dict[str, dict[str, Any]] = {}
    """Several runs in one process start: name -> the dotted keys that differ. Each trains in run_dir/NAME."""


class TokenizerModelSection(Section):
    """LlamaGen's VQGAN with its sizes left open."""

    size: Literal["VQ-8", "VQ-16"] | None = None
    """A released size; the fields below then stay empty."""
    channels: PositiveInt | None = None
    """Channels of the widest-resolution level (LlamaGen: 128)."""
    channel_multipliers: tuple[PositiveInt, ...] | None = None
    """One per level, highest resolution first; each level but the last halves the resolution."""
    res_blocks: PositiveInt = 2
    """Residual blocks per encoder level (the decoder has one more)."""
    z_channels: PositiveInt = 256
    codebook_size: PositiveInt = 16384
    codebook_dim: PositiveInt = 8
    l2_norm: bool = True
    """Compare l2-normalised vectors (paper section 2.2)."""
    codebook_init: Literal["random", "first_batch"] = "random"
    """Where training starts the codes: LlamaGen's U(-1/K, 1/K), or at latents of the first global batch, which keeps
    a small codebook in use when training is short."""

    @model_validator(mode="after")
    def _size_or_numbers(self) -> "TokenizerModelSection":
        own = self.channels is not None and self.channel_multipliers is not None
        if (self.size is None) != own:
            raise ValueError("give either size (VQ-8 or VQ-16) or both channels and channel_multipliers")
        return self


class ImageDataSection(Section):
    train: Path
    """Folder of image shards (with manifest.json)."""
    validation: Path
    image_size: PositiveInt = 256
    random_crop: bool = True
    """LlamaGen's augmentation: short side U{size..1.25 size}, random crop."""
    horizontal_flip: bool = True
    workers: CountInt = 0
    """Decoding processes per rank; 0 decodes in the training process."""


class DiscriminatorSection(Section):
    kind: Literal["patchgan", "none"] = "patchgan"
    start_images: CountInt = 20000 * 128
    """The adversarial loss and the discriminator's own training begin here (LlamaGen: step 20,000)."""
    weight: Annotated[float, Field(ge=0)] = 0.5
    channels: PositiveInt = 64
    layers: PositiveInt = 3
    norm: Literal["batch", "group"] = "batch"
    """``batch`` is LlamaGen's and averages over one rank's micro-batch; ``group`` looks at one image at a time, so
    the result does not depend on the number of ranks."""
    lr: Annotated[float, Field(gt=0)] | None = None
    """Empty: the tokenizer's own learning rate."""


class TokenizerLossSection(Section):
    """Paper section 2.2: reconstruction + perceptual + adversarial + codebook + commitment."""

    reconstruction: Literal["l2", "l1"] = "l2"
    reconstruction_weight: Annotated[float, Field(gt=0)] = 1.0
    perceptual: Literal["none", "lpips"] = "lpips"
    perceptual_weight: Annotated[float, Field(ge=0)] = 1.0
    vgg16_weights: Path | None = None
    """A local file with torchvision's VGG16 ImageNet weights; needed for ``perceptual: lpips``."""
    codebook_weight: Annotated[float, Field(ge=0)] = 1.0
    commitment_weight: Annotated[float, Field(ge=0)] = 0.25
    entropy_weight: Annotated[float, Field(ge=0)] = 0.0
    discriminator: DiscriminatorSection = DiscriminatorSection()

    @model_validator(mode="after")
    def _lpips_needs_weights(self) -> "TokenizerLossSection":
        if self.perceptual == "lpips" and self.vgg16_weights is None:
            raise ValueError(
                "perceptual: lpips needs vgg16_weights: PATH (torchvision's vgg16-397923af.pth, to be "
                "fetched by you); or choose perceptual: none"
            )
        return self


class TokenizerConfigFile(Section):
    """``kind: tokenizer``, read by ``tokenizer_training.train``."""

    kind: Literal["tokenizer"]
    run_dir: Path
    model: TokenizerModelSection
    data: ImageDataSection
    loss: TokenizerLossSection
    train: TrainSection
    optim: OptimSection = OptimSection(weight_decay=0.0)
    parallel: ParallelSection = ParallelSection()
    validation: ValidationSection = ValidationSection()
    checkpoint: CheckpointSection = CheckpointSection()
    log: LogSection = LogSection()

    @model_validator(mode="after")
    def _no_split(self) -> "TokenizerConfigFile":
        if self.parallel.tensor != 1 or self.parallel.zero != 0:
            raise ValueError(
                "the tokenizer is trained under plain DDP: leave parallel.tensor at 1 and parallel.zero at 0"
            )
        return self


class ExtractConfig(Section):
    """``kind: extract``, read by ``tokenizer_training.extract``."""

    kind: Literal["extract"]
    tokenizer: Path
    """A tokenizer run directory, a checkpoint folder, or a weights file."""
    model: TokenizerModelSection | None = None
    """The tokenizer's sizes, for a bare weights file (a checkpoint knows them itself)."""
    images: Path
    """Folder of image shards, or a folder of such folders (train, validation)."""
    out: Path
    """Folder for the token shards; it gets the same sub-folders as ``images``."""
    image_size: PositiveInt = 256
    crops: Literal["center", "center_flip", "ten_crop"] = "ten_crop"
    """Stored per image: the centre crop, it and its mirror image, or ten crops for every crop range."""
    crop_ranges: tuple[Annotated[float, Field(ge=1)], ...] = (1.1, 1.05)
    """Ten crops are cut from the image at size x range, for each range (LlamaGen section 3.1: 1.1 and 1.05)."""
    batch: PositiveInt = 64
    """Crops encoded at once, per rank."""
    samples_per_shard: PositiveInt = 10000
    """Images per token shard; shards are what the ranks share out among themselves."""
    workers: CountInt = 0
    """Decoding threads per rank; 0 decodes between the batches."""
    threads: PositiveInt | None = None
    """CPU threads per rank; empty leaves it to OMP_NUM_THREADS or torch."""


class StageSection(Section):
    """One step of a pipeline: a program, started by its module name on so many ranks."""

    name: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_-]*$")]
    why: str
    """One sentence for the person who watches."""
    module: str
    """For example ``tokenizer_training.train``."""
    config: Path | None = None
    """A YAML file, relative to the pipeline file; resolved and saved with the stage."""
    arguments: tuple[str, ...] = ()
    """Words of the command line (for a stage without config), after substitution of {out} and friends."""
    set: dict[str, Any] = {}
    """Dotted keys of the stage's config; strings may hold {out} and the pipeline's variables."""
    ranks: PositiveInt = 1
    images: str | None = None
    """How many images a stage without ``train`` goes through, for the time estimate; usually a {count}."""
    produces: tuple[str, ...] = ()
    """Files that must exist when the stage is done; a finished stage that lost one runs again."""


class PipelineConfig(Section):
    """``kind: pipeline``: stages run one after another through the launcher."""

    kind: Literal["pipeline"]
    title: str
    variables: dict[str, str] = {}
    """Defaults for {names} in the stages, besides {out}; ``key=value`` on the command line replaces them."""
    counts: dict[str, PositiveInt] = {}
    """Variables that are numbers of images: ``--small FACTOR`` scales them along with the training lengths."""
    stages: Annotated[tuple[StageSection, ...], Field(min_length=1)]

    @model_validator(mode="after")
    def _names_differ(self) -> "PipelineConfig":
        names = [stage.name for stage in self.stages]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"two stages are called {twice[0]!r}")
        return self
