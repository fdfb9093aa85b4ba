"""The sizes and options of a GPT. No torch here: ``llamagen plan`` counts a model without loading it."""

import math
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class GPTConfig:
    """Sizes and dropouts; ``image_tokens`` must be a square number. See models/sizes.py for the named sizes.

    Raises ValueError for numbers that no model can have.
    """

    n_layer: int
    n_head: int
    dim: int
    vocab_size: int = 16384
    image_tokens: int = 256
    condition: Literal["class", "text"] = "class"
    num_classes: int = 1000
    prefix_tokens: int | None = None  # 1 class token or 120 caption tokens
    caption_dim: int = 2048
    multiple_of: int = 256
    n_kv_head: int | None = None  # key and value heads; as many as query heads in all of LlamaGen
    norm_eps: float = 1e-5
    rope_base: float = 10000.0
    initializer_range: float = 0.02
    token_dropout_p: float = 0.1
    resid_dropout_p: float = 0.1
    ffn_dropout_p: float = 0.1
    drop_path_rate: float = 0.0
    attn_dropout_p: float = 0.0
    prefix_rotation: Literal["zero", "identity"] = "zero"

    def __post_init__(self) -> None:
        if self.dim % self.n_head:
            raise ValueError(f"dim {self.dim} is not a multiple of n_head {self.n_head}")
        if self.head_dim % 4:
            raise ValueError(
                f"head dimension {self.head_dim} (dim / n_head) must be a multiple of 4: "
                "half of it turns with the row and half with the column, in pairs"
            )
        if math.isqrt(self.image_tokens) ** 2 != self.image_tokens:
            raise ValueError(f"image_tokens {self.image_tokens} is not a square")
        if self.n_head % self.kv_heads:
            fits = [n for n in range(1, self.n_head + 1) if self.n_head % n == 0]
            raise ValueError(
                f"n_kv_head {self.kv_heads} does not divide n_head {self.n_head}; one of {', '.join(map(str, fits))}"
            )
        if self.condition == "class" and self.prefix != 1:
            raise ValueError(f"prefix_tokens {self.prefix}: a class is one token")

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
        wanted = int(2 * 4 * self.dim / 3)
        return -(-wanted // self.multiple_of) * self.multiple_of
