"""Captions -> features, by a frozen T5 encoder from a local folder."""

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llamagen_dist.data.captions import clean
from llamagen_dist.data.pretrained import TOKENIZER_FILES, load_model, model_files, sha256_of
from llamagen_dist.errors import UserError

MAX_TOKENS = 120
"""LlamaGen's caption prefix."""
_BUCKET = 8  # captions whose lengths in tokens round up to the same multiple share batches
_HINT = "give a folder with a T5's config.json, weights and tokenizer, for example a copy of flan-t5-xl"


class CaptionEncoder:
    """The encoder half of a T5 (LlamaGen: flan-t5-xl) and its tokenizer, from a folder that ``save_pretrained`` left.

    It computes in fp32, on any device: only the finished features are rounded to bfloat16, so they hardly depend on
    the machine. Nothing is ever fetched. Raises UserError where the folder does not hold such an encoder, or only part.
    """

    def __init__(self, path: Path, device: torch.device | str = "cpu", max_tokens: int = MAX_TOKENS) -> None:
        from transformers import AutoTokenizer, T5EncoderModel

        self.path, self.device, self.max_tokens = path, torch.device(device), max_tokens
        called = f"text encoder {path}"
        self._files = model_files(path, called, "t5", _HINT, {"tokenizer": TOKENIZER_FILES})

        def read() -> Any:
            self.tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True)
            return T5EncoderModel.from_pretrained(
                path, local_files_only=True, dtype=torch.float32, output_loading_info=True
            )

        model = load_model(called, self._files, read)
        if len(self.tokenizer) > model.config.vocab_size:
            raise UserError(
                f"text encoder {path}: its tokenizer knows {len(self.tokenizer)} pieces, but its weights "
                f"{model.config.vocab_size}: these files do not belong together"
            )
        self.model = model.to(self.device)
        self.dim: int = model.config.d_model

    @cached_property
    def sha256(self) -> str:
        """sha256 (hex) over the files that decide the features: configuration, weights, tokenizer."""
        return sha256_of(self._files)

    def lengths(self, captions: Sequence[str]) -> list[int]:
        """How many tokens each caption has, cleaned, with the closing one; ``encode`` keeps ``max_tokens`` of them."""
        return [len(ids) for ids in self.tokenizer([clean(caption) for caption in captions], verbose=False).input_ids]

    @torch.inference_mode()
    def encode(self, captions: Sequence[str], batch: int = 64) -> list[Tensor]:
        """bfloat16 [L, dim] on the host for each caption, 1 <= L <= max_tokens, without padding.

        Cleans the captions first. An empty one has the features of the closing token alone, and what is longer than
        max_tokens loses its end. Captions of like length are encoded together, always as ``batch`` rows: a caption's
        features do not depend on the others.
        """
        if not captions:
            return []
        pieces: list[list[int]] = self.tokenizer(
            [clean(caption) for caption in captions], truncation=True, max_length=self.max_tokens
        ).input_ids
        alike: dict[int, list[int]] = {}
        for number, piece in enumerate(pieces):
            length = min(-(-len(piece) // _BUCKET) * _BUCKET, self.max_tokens)
            alike.setdefault(length, []).append(number)
        encoded: dict[int, Tensor] = {}
        for length, numbers in sorted(alike.items()):
            for start in range(0, len(numbers), batch):
                chosen = numbers[start : start + batch]
                rows = self._encode([pieces[number] for number in chosen], batch, length)
                for number, row in zip(chosen, rows, strict=True):
                    encoded[number] = row
        return [encoded[number] for number in range(len(pieces))]

    def _encode(self, pieces: list[list[int]], batch: int, length: int) -> list[Tensor]:
        """One batch of [batch, length]; rows that nobody needs hold padding and one closing token."""
        ids = torch.full((batch, length), self.tokenizer.pad_token_id)
        present = torch.zeros(batch, length, dtype=torch.long)
        present[:, 0] = 1
        for row, piece in enumerate(pieces):
            ids[row, : len(piece)] = torch.tensor(piece)
            present[row, : len(piece)] = 1
        hidden = self.model(input_ids=ids.to(self.device), attention_mask=present.to(self.device)).last_hidden_state
        rounded = hidden.to(torch.bfloat16).cpu()
        return [rounded[row, : len(piece)].clone() for row, piece in enumerate(pieces)]
