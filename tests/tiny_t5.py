"""A T5 encoder of a few thousand weights and its tokenizer, made on the spot from some captions."""

from collections.abc import Sequence
from pathlib import Path

from examples.text_encoder import make_small_text_encoder


def write_t5(folder: Path, captions: Sequence[str], dim: int = 8, seed: int = 0) -> Path:
    """A folder as ``save_pretrained`` leaves it: words of the captions are the pieces, </s> closes a caption."""
    make_small_text_encoder(captions, folder, dim=dim, layers=1, heads=2, seed=seed)
    return folder
