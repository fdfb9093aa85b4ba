"""What can be chosen of a GPT and of a tokenizer, and LlamaGen's named sizes.

Every option stands here once, with its range and default: the models read it from GPTConfig and VQConfig, and the
sections of a config file (llamagen_dist/config/model.py) extend the same classes. No torch here: a config is checked,
and ``llamagen plan`` counts a model, without loading it.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from annotated_types import Ge, Gt, Lt

# Ranges are for whoever reads options from a file; see GPTConfig.problems for rules between several of them.
Positive = Annotated[int, Gt(0)]
Rate = Annotated[float, Ge(0), Lt(1)]

GPT_SIZES: dict[str, dict[str, int]] = {
    "GPT-B": {"n_layer": 12, "n_head": 12, "dim": 768},
    "GPT-L": {"n_layer": 24, "n_head": 16, "dim": 1024},
    "GPT-XL": {"n_layer": 36, "n_head": 20, "dim": 1280},
    "GPT-XXL": {"n_layer": 48, "n_head": 24, "dim": 1536},
    "GPT-XXXL": {"n_layer": 48, "n_head": 40, "dim": 2560},
    "GPT-1B": {"n_layer": 22, "n_head": 32, "dim": 2048},
    "GPT-3B": {"n_layer": 24, "n_head": 32, "dim": 3200},
    "GPT-7B": {"n_layer": 32, "n_head": 32, "dim": 4096},
}
"""Keywords of GPTConfig (paper table 1, and the released 1B and 7B definitions)."""

TARGET_POSITIONS = "target_positions.weight"
"""The table of ``order: rar`` in a GPT's state dict. Weights without it are a raster model's, LlamaGen's own."""

BETA_EMBEDDING = "beta_embedding."
"""The names in a GPT's state dict that ``guidance: free`` adds begin so."""

VQ_SIZES: dict[str, dict[str, Any]] = {
    "VQ-8": {"channel_multipliers": (1, 2, 2, 4)},
    "VQ-16": {"channel_multipliers": (1, 1, 2, 2, 4)},
}
"""Keywords of VQConfig: the released sizes, of 70,109,835 and 71,883,403 parameters; the number in the name is the
downsampling."""


@dataclass(frozen=True, kw_only=True)
class GPTOptions:
    """Everything about a GPT that is neither its size nor read off its token shards."""

    multiple_of: Positive = 256
    """The feed-forward width is rounded up to a multiple of this."""
    n_kv_head: Positive | None = None
    """Key and value heads (grouped-query attention); empty: as many as query heads, as in all of LlamaGen."""
    condition: Literal["class", "text"] = "class"
    prefix_tokens: Positive | None = None
    """Length of the condition's prefix; empty: 1 for classes, 120 for captions."""
    caption_dim: Positive = 2048
    """Width of the text encoder's features (flan-t5-xl: 2048)."""
    prefix_rotation: Literal["zero", "identity"] = "zero"
    """``zero``: prefix positions are rotated by cos = sin = 0, as the released weights need it. ``identity``: by
    cos = 1, sin = 0, so that image tokens can tell caption tokens apart; for new text models."""
    token_dropout_p: Rate = 0.1
    resid_dropout_p: Rate = 0.1
    ffn_dropout_p: Rate = 0.1
    attn_dropout_p: Rate = 0.0
    """On the attention probabilities (LlamaGen trains with 0)."""
    drop_path_rate: Rate = 0.0
    order: Literal["raster", "rar"] = "raster"
    """``rar``: training sequences are permuted at random in the beginning and in raster order in the end
    (``train.anneal_from``, ``train.anneal_until``; Yu et al. 2024, arXiv 2411.00776). Until then a table tells every
    input position which token it predicts; pictures are drawn in raster order all the time."""
    guidance: Literal["dropout", "free"] = "dropout"
    """``dropout``: LlamaGen's, conditions are dropped in training (``class_dropout_p``), and sampling guides with two
    passes. ``free``: guidance-free training (Chen et al. 2025, arXiv 2501.15420): the model learns to be guided by any
    strength ``beta``, and sampling takes one pass with a ``beta``."""
    qk_norm: bool = False
    """Queries and keys pass an RMSNorm per head before they are rotated, which bounds attention's logits: higher
    learning rates stay stable. Adds ``q_norm`` and ``k_norm`` to every block; released weights have neither."""
    z_loss: Annotated[float, Ge(0)] = 0.0
    """Weight, usually 1e-4, of the mean squared log-partition of the logits in the training loss, which keeps them from
    drifting. ``loss`` and ``val_loss`` stay without it; ``z_loss`` in the metrics is that mean, unweighted."""


@dataclass(frozen=True)
class GPTConfig(GPTOptions):
    """One GPT: its size, what its token shards say, and its options.

    n_layer, n_head, dim: see GPT_SIZES.
    vocab_size: codes of the tokenizer.
    image_tokens: tokens of one image.
    token_rows: rows that they fill in raster order, for the rotary angles; None: as many as columns. Prefix tokens fill
        one.
    num_classes: without the null class, which is number ``num_classes``; 0 for captions.

    Raises ValueError for numbers that no model can have, naming all that is wrong.
    """

    n_layer: int
    n_head: int
    dim: int
    vocab_size: int = 16384
    image_tokens: int = 256
    num_classes: int = 1000
    norm_eps: float = 1e-5
    rope_base: float = 10000.0
    initializer_range: float = 0.02
    token_rows: int | None = None

    def __post_init__(self) -> None:
        if problems := "; ".join(self.problems()):
            raise ValueError(problems)

    def problems(self) -> Iterator[str]:
        """What cannot be, a sentence each."""
        if self.dim % self.n_head:
            yield f"dim {self.dim} is not a multiple of n_head {self.n_head}"
        elif self.head_dim % 4:
            yield (
                f"head dimension {self.head_dim} (dim / n_head) must be a multiple of 4: "
                "half of it turns with the row and half with the column, in pairs"
            )
        if self.token_rows is None and math.isqrt(self.image_tokens) ** 2 != self.image_tokens:
            yield f"image_tokens {self.image_tokens} is not a square"
        if self.token_rows is not None and self.image_tokens % self.token_rows:
            yield f"image_tokens {self.image_tokens} do not fill {self.token_rows} rows"
        if self.n_head % self.kv_heads:
            fits = [n for n in range(1, min(self.n_head, 1024) + 1) if self.n_head % n == 0]
            yield f"n_kv_head {self.kv_heads} does not divide n_head {self.n_head}; one of {', '.join(map(str, fits))}"
        if self.condition == "class" and self.prefix != 1:
            yield f"prefix_tokens {self.prefix}: a class is one token; set condition: text beside it, or leave it empty"

    @property
    def grid(self) -> tuple[int, int]:
        """(rows, columns) of an image's tokens."""
        rows = self.token_rows or math.isqrt(self.image_tokens)
        return rows, self.image_tokens // rows

    @property
    def head_dim(self) -> int:
        return self.dim // self.n_head

    @property
    def kv_heads(self) -> int:
        return self.n_kv_head or self.n_head

    @property
    def kv_dim(self) -> int:
        """Width of the keys, and of the values."""
        return self.kv_heads * self.head_dim

    @property
    def prefix(self) -> int:
        return self.prefix_tokens or (1 if self.condition == "class" else 120)

    @property
    def ffn_dim(self) -> int:
        """2/3 of 4 x dim, rounded up to ``multiple_of``."""
        width = int(2 * 4 * self.dim / 3)
        return -(-width // self.multiple_of) * self.multiple_of

    def unsplittable(self, tensor: int) -> str | None:
        """Why ``tensor`` tensor-parallel ranks cannot share this model, with the numbers that could; None: they can.

        Heads, not columns, are dealt out, so that a rank's attention needs nothing of another's; the feed-forward
        network and the vocabulary are cut into equal parts.
        """
        sizes = {"heads": self.n_head, "feed-forward width": self.ffn_dim, "vocabulary": self.vocab_size}
        if self.kv_heads != self.n_head:
            sizes["key-value heads"] = self.kv_heads
        bad = [f"{name} {size}" for name, size in sizes.items() if size % tensor]
        if not bad:
            return None
        fits = [n for n in range(1, min(self.n_head, 1024) + 1) if all(size % n == 0 for size in sizes.values())]
        return (
            f"{tensor} does not divide this model's {' and '.join(bad)}; sizes that work: {', '.join(map(str, fits))}"
        )


@dataclass(frozen=True, kw_only=True)
class VQOptions:
    """Everything about a tokenizer that is not its size."""

    res_blocks: Positive = 2
    """Residual blocks per encoder level (the decoder has one more)."""
    z_channels: Positive = 256
    codebook_size: Positive = 16384
    codebook_dim: Positive = 8
    l2_norm: bool = True
    """Compare l2-normalised vectors (paper section 2.2); of ``vq``, ``ema`` and ``ibq``."""
    quantizer: Literal["vq", "ema", "fsq", "ifsq", "lfq", "ibq"] = "vq"
    """``vq``: LlamaGen's nearest code, trained by gradients. ``ema``: the same, its codes moving averages. ``ibq``: the
    gradient reaches every code through the choice. ``fsq``, ``ifsq``: every channel is rounded to one of its
    ``levels``. ``lfq``: every channel is a sign, so codes are bits. tokenizer_training/README.md helps to choose."""
    levels: tuple[Annotated[int, Gt(1)], ...] = ()
    """Of ``fsq`` and ``ifsq``: values per channel; their product is ``codebook_size``."""
    codebook_decay: Rate = 0.99
    """Of ``ema``: the share of the moving averages that a step keeps."""
    entropy_temperature: Annotated[float, Gt(0)] = 0.01
    """Divides the squared distances in the entropy loss (``loss.entropy_weight``)."""
    entropy_groups: Positive = 1
    """Of ``lfq``: the batch entropy is summed over so many groups of bits, since 2^18 codes at once do not fit."""
    tokens: Literal["grid", "prefix"] = "grid"
    """``grid``: a token stands for a square of pixels, as in LlamaGen. ``prefix``: an image is a row of tokens, any
    first k of which decode to an image, so that k can be chosen for each image. The next five are of ``prefix``."""
    token_count: Positive | None = None
    """Tokens of an image."""
    image_size: Positive | None = None
    """Pixels along a side of all images: tokens in a row do not fit any other."""
    token_width: Positive = 128
    """Of the two small transformers, between the encoder's grid and the tokens and back."""
    token_layers: Positive = 2
    """Of each."""
    token_heads: Positive = 4

    @property
    def code_dim(self) -> int:
        """Channels of a code's vector: ``codebook_dim``, or what the levels or bits say."""
        if self.quantizer in ("fsq", "ifsq"):
            return len(self.levels)
        return self.codebook_size.bit_length() - 1 if self.quantizer == "lfq" else self.codebook_dim

    def problems(self) -> Iterator[str]:
        """What cannot be, a sentence each that begins with the option."""
        size, by_levels, product = self.codebook_size, self.quantizer in ("fsq", "ifsq"), math.prod(self.levels)
        if self.levels and not by_levels:
            yield f"levels: only fsq and ifsq have levels, and quantizer is {self.quantizer}; leave them out"
        if by_levels and not self.levels:
            yield f"levels: {self.quantizer} needs them, for example [8, 5, 5, 5] with codebook_size: 1000"
        elif by_levels and product != size:
            yield (
                f"levels: {' x '.join(map(str, self.levels))} = {product:,} codes, but codebook_size is {size:,}; set "
                f"codebook_size: {product}, or other levels"
            )
        elif self.quantizer == "lfq" and (size < 2 or size & (size - 1)):
            yield f"codebook_size: lfq has 2^bits codes, and {size:,} is no power of two; use {1 << self.code_dim:,}"
        elif self.codebook_dim not in (8, self.code_dim):  # 8 is the default, which nobody need have written
            yield f"codebook_dim: {self.quantizer} has {self.code_dim} channels here; leave codebook_dim out"
        if self.quantizer == "lfq" and self.entropy_groups > self.code_dim:
            yield f"entropy_groups: {self.code_dim} bits cannot be cut into {self.entropy_groups} groups"
        for name, of in (("token_count", "of an image, 32 for example"), ("image_size", "pixels along a side")):
            if (getattr(self, name) is None) == (self.tokens == "prefix"):
                hint = f"tokens: prefix needs it ({of})" if self.tokens == "prefix" else "belongs to tokens: prefix"
                yield f"{name}: {hint}"
        if self.token_width % self.token_heads:
            yield f"token_width: {self.token_width} is not a multiple of token_heads {self.token_heads}"


@dataclass(frozen=True)
class VQConfig(VQOptions):
    """One tokenizer.

    channels: of the level with the highest resolution.
    channel_multipliers: one per level, highest resolution first; all levels but the last halve it.

    Raises ValueError for options that do not go together, naming all that is wrong.
    """

    channels: int = 128
    channel_multipliers: tuple[int, ...] = (1, 1, 2, 2, 4)
    image_channels: int = 3
    dropout: float = 0.0

    def __post_init__(self) -> None:
        if problems := "\n".join(self.problems()):
            raise ValueError(problems)

    @property
    def downsampling(self) -> int:
        """Pixels per token along one side; of prefix tokens, of the grid that they are read from."""
        return 1 << (len(self.channel_multipliers) - 1)

    def grid(self, pixels: int) -> tuple[int, int]:
        """(rows, columns) of the tokens of a square image of ``pixels`` along a side; prefix tokens are one row."""
        side = pixels // self.downsampling
        return (side, side) if self.token_count is None else (1, self.token_count)

    def arranged(self, tokens: int) -> tuple[int, int]:
        """(rows, columns) of so many tokens of one image: a square, or one row of prefix tokens."""
        side = math.isqrt(tokens)
        return (side, side) if self.token_count is None else (1, tokens)

    def uncoded(self, pixels: int) -> str | None:
        """Why an image of ``pixels`` along a side has no tokens, as the end of a sentence; None: it has."""
        if pixels % self.downsampling:
            return f"is not a multiple of {self.downsampling}, the pixels per token of"
        if self.image_size not in (None, pixels):
            return f"is not {self.image_size}, the pixels along a side of every image for"
        return None
