"""What pictures are drawn from: the classes a GPT knows, or captions, by number."""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from llamagen_dist.data.batch import left_padded
from llamagen_dist.data.manifest import CaptionEncoding
from llamagen_dist.data.shards import CAPTION_MEMBER, Shards, open_shards
from llamagen_dist.data.text_encoder import CaptionEncoder
from llamagen_dist.data.tokens import TokenReader
from llamagen_dist.errors import UserError
from llamagen_dist.models.gpt import Condition
from llamagen_dist.sampling.load import Tokenizer, TrainedGPT


class Conditions(Protocol):
    """Numbered conditions; sample i of a set is drawn from number i modulo ``len``."""

    kind: str
    identity: str | None
    """What decides the conditions' content, for the record; None for classes, which belong to the GPT."""

    def __len__(self) -> int: ...

    def name(self, number: int) -> str:
        """The class or caption in words."""
        ...

    def at(self, numbers: Tensor) -> Condition:
        """The model's condition for these numbers, int64 (B,) below ``len``."""
        ...

    def originals(self, numbers: Sequence[int]) -> NDArray[np.int64] | None:
        """int64 [n, tokens] of the images that the conditions come from; None where they come with none."""
        ...


class Classes:
    """The GPT's own classes."""

    kind = "class"
    identity: str | None = None

    def __init__(self, names: Sequence[str]) -> None:
        self._names = names

    def __len__(self) -> int:
        return len(self._names)

    def name(self, number: int) -> str:
        return self._names[number]

    def at(self, numbers: Tensor) -> Condition:
        return numbers

    def originals(self, numbers: Sequence[int]) -> None:
        return None


class WrittenCaptions:
    """Captions in words, encoded here. Raises UserError for another encoder than the GPT was trained with."""

    kind = "caption"

    def __init__(self, captions: Sequence[str], encoder: CaptionEncoder, gpt: TrainedGPT) -> None:
        known = gpt.captions
        if encoder.dim != gpt.config.caption_dim or (known is not None and known["encoder_sha256"] != encoder.sha256):
            was = "" if known is None else f" ({known['encoder']}, sha256 {known['encoder_sha256'][:12]}…)"
            raise UserError(
                f"text_encoder: {encoder.path} ({encoder.dim} features per token, sha256 {encoder.sha256[:12]}…) is "
                f"not the one that {gpt.path} was trained with{was}; its features mean other things"
            )
        self._captions = list(captions)
        self._features = encoder.encode(self._captions)
        self._places = gpt.config.prefix
        content = "\n".join([encoder.sha256, *self._captions])
        self.identity: str | None = hashlib.sha256(content.encode()).hexdigest()

    def __len__(self) -> int:
        return len(self._captions)

    def name(self, number: int) -> str:
        return self._captions[number]

    def at(self, numbers: Tensor) -> Condition:
        return left_padded([self._features[number] for number in numbers.tolist()], self._places)

    def originals(self, numbers: Sequence[int]) -> None:
        return None


class ShardCaptions:
    """The captions of token shards, read when they are needed. Raises UserError where they do not fit the GPT."""

    kind = "caption"

    def __init__(self, shards: Shards, gpt: TrainedGPT, tokenizer: Tokenizer) -> None:
        check_encoding(shards.manifest.captions, gpt, f"captions: {shards.location}")
        self._shards, self._reader, self._places = shards, TokenReader(shards), gpt.config.prefix
        self._same_codes = shards.manifest.tokenizer_sha256 == tokenizer.sha256
        self.identity: str | None = shards.manifest.fingerprint()

    def __len__(self) -> int:
        return len(self._shards)

    def name(self, number: int) -> str:
        return self._shards.read(number, CAPTION_MEMBER).decode()

    def at(self, numbers: Tensor) -> Condition:
        long = np.zeros(len(numbers), np.bool_)
        return left_padded(self._reader.caption_features(numbers.numpy(), long), self._places)

    def originals(self, numbers: Sequence[int]) -> NDArray[np.int64] | None:
        if not self._same_codes:
            return None
        chosen = np.array(numbers, np.int64)
        return self._reader.codes(chosen, np.zeros_like(chosen))


def check_encoding(found: CaptionEncoding | None, gpt: TrainedGPT, where: str) -> None:
    """Raises UserError unless caption features of this encoding are what the GPT was trained on."""
    if found is None:
        raise UserError(f"{where} holds no caption features; extract with text_encoder=PATH")
    known: dict[str, Any] | None = gpt.captions
    if found.dim != gpt.config.caption_dim or (known is not None and known["encoder_sha256"] != found.encoder_sha256):
        raise UserError(
            f"{where} was encoded by {found.encoder} (sha256 {found.encoder_sha256[:12]}…), which is not the text "
            f"encoder that {gpt.path} was trained with"
        )
    if found.max_tokens > gpt.config.prefix:
        raise UserError(
            f"{where} has captions of up to {found.max_tokens} tokens, and the GPT has {gpt.config.prefix} places for "
            "them"
        )


def conditions(
    gpt: TrainedGPT, tokenizer: Tokenizer, captions: Path | None, text_encoder: Path | None, device: torch.device
) -> Conditions:
    """The GPT's classes, or the captions at ``captions``: token shards with caption features, or a text file with one
    caption a line, which ``text_encoder`` encodes. Raises UserError."""
    if gpt.config.condition == "class":
        if captions is not None:
            raise UserError(f"captions: {gpt.path} is conditioned on classes; leave captions out")
        return Classes(gpt.classes)
    if captions is None:
        raise UserError(
            f"captions: {gpt.path} is conditioned on text; name token shards with caption features, or a text file "
            "with one caption a line beside text_encoder=PATH"
        )
    if captions.is_dir():
        return ShardCaptions(open_shards(captions, "tokens"), gpt, tokenizer)
    try:
        lines = [line.strip() for line in captions.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"captions: {captions} cannot be read ({error})") from None
    if not lines:
        raise UserError(f"captions: {captions} holds no captions; write one a line")
    return written(lines, gpt, text_encoder, device, "text_encoder")


def written(
    lines: Sequence[str], gpt: TrainedGPT, text_encoder: Path | None, device: torch.device, key: str
) -> WrittenCaptions:
    """Captions in words. text_encoder: None takes the one the GPT's record names. Raises UserError."""
    path = text_encoder
    if path is None and gpt.captions is not None:
        path = Path(gpt.captions["encoder"])
    if path is None:
        raise UserError(f"{key}: the checkpoint does not name its text encoder; say where it is")
    return WrittenCaptions(lines, CaptionEncoder(path, device, gpt.config.prefix), gpt)
