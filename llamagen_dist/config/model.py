"""``model`` of a GPT and of a tokenizer: a named size or numbers of one's own, and the options of models/sizes.py."""

import dataclasses
from collections.abc import Collection, Iterator
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, field_validator, model_validator
from pydantic.dataclasses import dataclass

from llamagen_dist.config.section import STRICT, PositiveInt, Probability, finite, nearest
from llamagen_dist.models.sizes import GPT_SIZES, VQ_SIZES, GPTConfig, GPTOptions, VQConfig, VQOptions


def _one_of(sizes: Collection[str]) -> AfterValidator:
    def check(size: str) -> str:
        if size not in sizes:
            raise ValueError(f"{size!r} is unknown; {nearest(size, sizes)}")
        return size

    return AfterValidator(check)


# Sections are dataclasses here because they extend the models' own. Fields of a dataclass are collected from the last
# base to the first: the sizes stand first in a resolved config.


@dataclass(config=STRICT, frozen=True, kw_only=True)
class _GPTSize:
    size: Annotated[str, _one_of(GPT_SIZES)] | None = None
    """``GPT-B``, ``GPT-L``, ``GPT-XL``, ``GPT-XXL``, ``GPT-XXXL``, ``GPT-1B``, ``GPT-3B``, ``GPT-7B``."""
    n_layer: PositiveInt | None = None
    n_head: PositiveInt | None = None
    dim: PositiveInt | None = None


@dataclass(config=STRICT, frozen=True, kw_only=True)
class GPTModelSection(GPTOptions, _GPTSize):
    """A named LlamaGen size, or the three numbers of an own one."""

    class_dropout_p: Probability = 0.1
    """Share of training samples whose label is replaced by the null class (classifier-free guidance)."""

    _finite = field_validator("*", mode="wrap")(finite)

    def gpt(self, **tokens: int | None) -> GPTConfig:
        """The GPT that this and the token shards' numbers describe together.

        tokens: vocab_size, image_tokens, token_rows, num_classes. Raises ValueError for numbers that no model can have.
        """
        own = {"n_layer": self.n_layer, "n_head": self.n_head, "dim": self.dim}
        size = own if self.size is None else GPT_SIZES[self.size]
        numbers: dict[str, Any] = {**size, **_options(self, GPTOptions), **tokens}
        return GPTConfig(**numbers)

    @model_validator(mode="after")
    def _is_a_model(self) -> "GPTModelSection":
        own = [name for name in ("n_layer", "n_head", "dim") if getattr(self, name) is not None]
        if self.size is not None and own:
            raise ValueError(f"give either size or n_layer, n_head and dim, not both (size and {', '.join(own)})")
        if self.size is None and len(own) < 3:
            raise ValueError("give size (for example GPT-B), or all of n_layer, n_head and dim")
        if self.guidance == "free" and self.class_dropout_p == 0:
            raise ValueError(
                "class_dropout_p: guidance: free needs samples without their condition, which teach it the null branch "
                "that the others are mixed with; set a share, such as 0.1"
            )
        self.gpt()
        return self


@dataclass(config=STRICT, frozen=True, kw_only=True)
class _VQSize:
    size: Annotated[str, _one_of(VQ_SIZES)] | None = None
    """``VQ-8`` or ``VQ-16``, a released size; all other fields but ``codebook_init`` then stay as they are."""
    channels: PositiveInt | None = None
    """Channels of the widest-resolution level (LlamaGen: 128)."""
    channel_multipliers: Annotated[tuple[PositiveInt, ...], Field(min_length=1)] | None = None
    """One per level, highest resolution first; each level but the last halves the resolution."""


@dataclass(config=STRICT, frozen=True, kw_only=True)
class TokenizerModelSection(VQOptions, _VQSize):
    """LlamaGen's VQGAN with its sizes left open."""

    codebook_init: Literal["random", "first_batch", "kmeans"] = "random"
    """Where training starts the codes: LlamaGen's U(-1/K, 1/K), or at latents of the first global batch, which keeps
    a small codebook in use when training is short; ``kmeans`` moves them to the centres of those latents."""

    _finite = field_validator("*", mode="wrap")(finite)

    def vq(self) -> VQConfig:
        own = {"channels": self.channels, "channel_multipliers": self.channel_multipliers}
        size: dict[str, Any] = own if self.size is None else VQ_SIZES[self.size]
        return VQConfig(**size, **_options(self, VQOptions))

    def cannot_cut(self, pixels: int | None) -> Iterator[str]:
        """Why an image of ``pixels`` along a side does not consist of whole tokens."""
        factor = self.vq().downsampling
        if pixels is not None and self.image_size not in (None, pixels):
            yield f"image_size: {pixels} pixels, and the prefix tokens are of {self.image_size} (model.image_size)"
        if pixels is not None and pixels % factor:
            yield (
                f"image_size: {pixels} pixels cannot be cut into tokens of {factor} x {factor} pixels "
                f"(the tokenizer has {len(self.vq().channel_multipliers)} levels); use a multiple of {factor}"
            )

    @model_validator(mode="after")
    def _size_or_numbers(self) -> "TokenizerModelSection":
        own = [self.channels is not None, self.channel_multipliers is not None]
        if not all(own) if self.size is None else any(own):
            raise ValueError("give either size (VQ-8 or VQ-16) or both channels and channel_multipliers")
        if self.size is not None:
            released = _options(VQConfig(), VQOptions)
            if changed := [name for name, value in _options(self, VQOptions).items() if value != released[name]]:
                raise ValueError(
                    f"{', '.join(changed)}: a released size has its own; leave it out, or give channels and "
                    "channel_multipliers in place of size"
                )
        problems = list(self.problems())
        if self.codebook_init != "random" and self.quantizer in ("fsq", "ifsq", "lfq"):
            problems.append(f"codebook_init: {self.quantizer} has no table of codes to start; use random")
        if problems:
            raise ValueError("\n".join(problems))
        return self


def _options(section: Any, options: Any) -> dict[str, Any]:
    return {field.name: getattr(section, field.name) for field in dataclasses.fields(options)}
