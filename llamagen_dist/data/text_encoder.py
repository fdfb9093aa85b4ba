"""Captions -> features, by a frozen T5 encoder from a local folder."""

import hashlib
import json
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llamagen_dist.data.captions import clean
from llamagen_dist.errors import UserError
from llamagen_dist.files import cut_short, sha256_file

MAX_TOKENS = 120
"""LlamaGen's caption prefix."""
_BUCKET = 8  # captions whose lengths in tokens round up to the same multiple share batches
_TOKENIZER_FILES = (
    "tokenizer.json", "spiece.model", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
)  # fmt: skip


class CaptionEncoder:
    """The encoder half of a T5 (LlamaGen: flan-t5-xl) and its tokenizer, from a folder that ``save_pretrained`` left.

    It computes in fp32, on any device: only the finished features are rounded to bfloat16, so they hardly depend on
    the machine. Nothing is ever fetched. Raises UserError where the folder does not hold such an encoder, or only part.
    """

    def __init__(self, path: Path, device: torch.device | str = "cpu", max_tokens: int = MAX_TOKENS) -> None:
        from transformers import AutoTokenizer, T5EncoderModel
        from transformers.utils import logging

        self.path, self.device, self.max_tokens = path, torch.device(device), max_tokens
        self._files = _files(path)
        shown = logging.is_progress_bar_enabled()
        logging.disable_progress_bar()
        try:
            self.tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True)
            loaded: Any = T5EncoderModel.from_pretrained(
                path, local_files_only=True, dtype=torch.float32, output_loading_info=True
            )
        except MemoryError:
            raise
        except Exception as error:  # a damaged file makes the readers stumble over anything
            cut = next((file for file in self._files if file.suffix != ".json" and cut_short(file)), None)
            why = " ".join(str(error).split())[:300] or type(error).__name__
            if cut is not None:
                why = f"{cut.name} ends too early, most likely because its download was interrupted; fetch it again"
            raise UserError(f"text encoder {path}: cannot be loaded: {why}") from None
        finally:
            if shown:
                logging.enable_progress_bar()
        model, report = loaded
        lacking = sorted(report["missing_keys"]) + sorted(str(key) for key in report["mismatched_keys"])
        if lacking:
            raise UserError(
                f"text encoder {path}: {len(lacking)} of its weights are not in the files or of another shape, such as "
                f"{lacking[0]}; copy the folder again"
            )
        if len(self.tokenizer) > model.config.vocab_size:
            raise UserError(
                f"text encoder {path}: its tokenizer knows {len(self.tokenizer)} pieces, but its weights "
                f"{model.config.vocab_size}: these files do not belong together"
            )
        self.model = model.eval().requires_grad_(False).to(self.device)
        self.dim: int = model.config.d_model

    @cached_property
    def sha256(self) -> str:
        """sha256 (hex) over the files that decide the features: configuration, weights, tokenizer."""
        digest = hashlib.sha256()
        for file in self._files:
            digest.update(f"{file.name} {sha256_file(file)}\n".encode())
        return digest.hexdigest()

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


def _files(path: Path) -> list[Path]:
    """The files of a text encoder that decide its features, in a fixed order. Raises UserError where there is none."""
    hint = "give a folder with a T5's config.json, weights and tokenizer, for example a copy of flan-t5-xl"
    if not path.is_dir():
        raise UserError(f"text encoder {path}: there is no such folder; {hint}")
    config = path / "config.json"
    try:
        kind = json.loads(config.read_text(encoding="utf-8")).get("model_type")
    except (OSError, ValueError, AttributeError):
        raise UserError(f"text encoder {path}: no config.json can be read in it; {hint}") from None
    if kind != "t5":
        raise UserError(f"text encoder {path}: its config.json says model_type {kind!r}, not 't5'; {hint}")
    weights = sorted(path.glob("*.safetensors")) or sorted(path.glob("pytorch_model*.bin"))
    if not weights:
        raise UserError(f"text encoder {path}: no weights in it (*.safetensors or pytorch_model*.bin); {hint}")
    tokenizer = [path / name for name in _TOKENIZER_FILES if (path / name).is_file()]
    if not tokenizer:
        raise UserError(f"text encoder {path}: no tokenizer in it ({' or '.join(_TOKENIZER_FILES[:2])}); {hint}")
    return [config, *weights, *tokenizer]
