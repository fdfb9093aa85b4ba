"""Every configuration key of the programs that train, extract and run pipelines, with its meaning and range.

One YAML file holds one *kind* (``kind: gpt`` and so on); ``llamagen config FILE`` prints it resolved. The text
under a field is its documentation. Keys shared by all training runs are in training.py.
"""

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from llamagen_dist.config.locations import Location, ShardAccess
from llamagen_dist.config.section import CountInt, Images, PositiveInt, Probability, Section
from llamagen_dist.config.training import (
    CheckpointSection,
    ComputeSection,
    EMASection,
    GuardSection,
    LogSection,
    OptimSection,
    ParallelSection,
    TrainSection,
    ValidationSection,
)


class GPTModelSection(Section):
    """A named LlamaGen size, or the four numbers of an own one."""

    size: str | None = None
    """``GPT-B``, ``GPT-L``, ``GPT-XL``, ``GPT-XXL``, ``GPT-XXXL``, ``GPT-1B``, ``GPT-3B``, ``GPT-7B``."""
    n_layer: PositiveInt | None = None
    n_head: PositiveInt | None = None
    dim: PositiveInt | None = None
    multiple_of: PositiveInt = 256
    """The feed-forward width is rounded up to a multiple of this."""
    n_kv_head: PositiveInt | None = None
    """Key and value heads (grouped-query attention); empty: as many as query heads, as in all of LlamaGen."""
    condition: Literal["class", "text"] = "class"
    prefix_tokens: PositiveInt | None = None
    """Length of the condition's prefix; empty: 1 for classes, 120 for captions."""
    caption_dim: PositiveInt = 2048
    """Width of the text encoder's features (flan-t5-xl: 2048)."""
    prefix_rotation: Literal["zero", "identity"] = "zero"
    """``zero``: prefix positions are rotated by cos = sin = 0, as the released weights need it. ``identity``: by
    cos = 1, sin = 0, so that image tokens can tell caption tokens apart; for new text models."""
    token_dropout_p: Probability = 0.1
    resid_dropout_p: Probability = 0.1
    ffn_dropout_p: Probability = 0.1
    attn_dropout_p: Probability = 0.0
    """On the attention probabilities (LlamaGen trains with 0)."""
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
        if self.condition == "class" and self.prefix_tokens not in (None, 1):
            raise ValueError("prefix_tokens: a class is one token; set condition: text beside it, or leave it empty")
        return self


class TokenDataSection(ShardAccess):
    train: Location
    """Folder of token shards (with manifest.json): a path, or an ``https://``, ``s3://`` or ``pipe:`` source."""
    validation: Location
    """Folder of held-out token shards."""
    short_captions: Probability = 0.0
    """With ``condition: text``: share of training samples that are shown their short caption (LlamaGen: 0.3)."""
    window_shards: CountInt = 0
    """0: samples come from all shards in random order. K: from K randomly chosen shards at a time, for storage where
    reading here and there is slow. Keep it for the whole of a run."""


class GPTConfigFile(Section):
    """``kind: gpt``, read by ``llamagen_dist.train_gpt``."""

    kind: Literal["gpt"]
    run_dir: Path
    model: GPTModelSection
    data: TokenDataSection
    train: TrainSection
    optim: OptimSection = OptimSection()
    ema: EMASection = EMASection()
    parallel: ParallelSection = ParallelSection()
    compute: ComputeSection = ComputeSection()
    init_from: Path | None = None
    """Start a new run from other weights: a run directory, a step_… folder, or a weights file (also LlamaGen's)."""
    init_classes: Path | None = None
    """Class names of ``init_from``, one a line, where it does not carry them (a bare weights file)."""
    validation: ValidationSection = ValidationSection()
    checkpoint: CheckpointSection = CheckpointSection()
    log: LogSection = LogSection()
    guard: GuardSection = GuardSection()
    ladder: dict[str, dict[str, Any]] = Field(default_factory=dict)
    """Several runs in one process start: name -> the dotted keys that differ. Each trains in run_dir/NAME."""

    @model_validator(mode="after")
    def _the_engine_can_do_it(self) -> "GPTConfigFile":
        if self.compute.precision == "bf16" and self.parallel.zero == 0:
            raise ValueError(
                "compute.precision: bf16 needs the fp32 masters that DeepSpeed keeps: set parallel.zero to 1, 2 or 3"
            )
        if self.compute.compile and self.parallel.zero == 3:
            raise ValueError(
                "compute.compile: ZeRO-3 gathers weights in hooks around every layer, which leave the compiler nothing "
                "to fuse and make it start over at every one: set compile: false, or parallel.zero to 1 or 2"
            )
        if self.init_classes is not None and self.init_from is None:
            raise ValueError("init_classes names the classes of init_from, which is empty")
        return self


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


class ImageDataSection(ShardAccess):
    train: Location
    """Folder of image shards (with manifest.json): a path, or an ``https://``, ``s3://`` or ``pipe:`` source."""
    validation: Location
    image_size: PositiveInt = 256
    random_crop: bool = True
    """LlamaGen's augmentation: short side U{size..1.25 size}, random crop."""
    horizontal_flip: bool = True
    workers: CountInt = 0
    """Decoding processes per rank; 0 decodes in the training process."""
    window_shards: CountInt = 0
    """0: samples come from all shards in random order. K: from K randomly chosen shards at a time, for storage where
    reading here and there is slow. Keep it for the whole of a run."""


class DiscriminatorSection(Section):
    kind: Literal["patchgan", "none"] = "patchgan"
    start_images: Images = 20000 * 128
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
    guard: GuardSection = GuardSection()

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
    """A YAML file, relative to the pipeline file; resolved and saved with the stage. With a sweep the stage is all of
    its points: one after another here, one job array on a cluster."""
    arguments: tuple[str, ...] = ()
    """Words of the command line (for a stage without config), after substitution of {out} and friends."""
    out: str | None = None
    """For a config of kind sweep: the folder of its points. ``set`` then goes to every point."""
    set: dict[str, Any] = Field(default_factory=dict)
    """Dotted keys of the stage's config; strings may hold {out} and the pipeline's variables."""
    ranks: PositiveInt = 1
    """Processes on one machine. On a cluster: 1 is one CPU rank on one node, more are the profile's nodes …"""
    nodes: PositiveInt | None = None
    """… unless the stage says how many nodes it gets there …"""
    gpus_per_node: CountInt | None = None
    """… and how many GPUs (and ranks) on each."""
    images: str | None = None
    """How many images a stage without ``train`` goes through, for --dry-run; usually a {count}."""
    produces: tuple[str, ...] = ()
    """Files that must exist when the stage is done; a finished stage that lost one runs again."""


class PipelineConfig(Section):
    """``kind: pipeline``: stages run one after another through the launcher."""

    kind: Literal["pipeline"]
    title: str
    variables: dict[str, str] = Field(default_factory=dict)
    """Defaults for {names} in the stages, besides {out}; ``key=value`` on the command line replaces them."""
    counts: dict[str, PositiveInt] = Field(default_factory=dict)
    """Variables that are numbers of images: ``--small FACTOR`` scales them along with the training lengths."""
    stages: Annotated[tuple[StageSection, ...], Field(min_length=1)]

    @model_validator(mode="after")
    def _names_differ(self) -> "PipelineConfig":
        names = [stage.name for stage in self.stages]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"two stages are called {twice[0]!r}")
        return self
