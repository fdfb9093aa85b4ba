"""What pictures are drawn from: the classes a GPT knows, or captions, by number."""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from llamagen_dist.console import LOG
from llamagen_dist.data.batch import left_padded
from llamagen_dist.data.manifest import CaptionEncoding
from llamagen_dist.data.shards import CAPTION_MEMBER, Shards, open_shards
from llamagen_dist.data.text_encoder import CaptionEncoder
from llamagen_dist.data.tokens import TokenReader
from llamagen_dist.errors import UserError
from llamagen_dist.models.gpt import Condition
from llamagen_dist.sampling.load import Tokenizer, TrainedGPT


@dataclass(frozen=True)
class Conditions:
    """Numbered conditions; sample i of a set is drawn from number i modulo ``count``.

    identity: what decides the conditions' content, for the record; None for classes, which belong to the GPT.
    name: the class or caption in words.
    at: numbers int64 (B,) below ``count`` -> the model's condition.
    cut: captions too long for the GPT, by number, with how many tokens they have; their end is left out.
    originals: numbers -> codes int64 [n, tokens] of the images that the conditions come from; None where they come
        with none.
    """

    kind: Literal["class", "caption"]
    count: int
    identity: str | None
    name: Callable[[int], str]
    at: Callable[[Tensor], Condition]
    originals: Callable[[Sequence[int]], NDArray[np.int64] | None] = lambda numbers: None
    cut: Mapping[int, int] = field(default_factory=dict)


def classes(gpt: TrainedGPT) -> Conditions:
    """The GPT's own classes."""
    return Conditions("class", len(gpt.classes), None, gpt.classes.__getitem__, lambda numbers: numbers)


def shard_captions(shards: Shards, gpt: TrainedGPT, tokenizer: Tokenizer) -> Conditions:
    """The captions of token shards, read when they are needed. Raises UserError where they do not fit the GPT."""
    _check_encoding(shards.manifest.captions, gpt, f"captions: {shards.location}")
    reader = TokenReader(shards)

    def at(numbers: Tensor) -> Condition:
        features = reader.caption_features(numbers.numpy(), short=np.zeros(len(numbers), np.bool_))
        return left_padded(features, gpt.config.prefix)

    def originals(numbers: Sequence[int]) -> NDArray[np.int64] | None:
        if shards.manifest.tokenizer_sha256 != tokenizer.sha256:
            return None  # this tokenizer would decode other pictures from them
        chosen = np.array(numbers, np.int64)
        return reader.codes(chosen, np.zeros_like(chosen))

    def name(number: int) -> str:
        return shards.read(number, CAPTION_MEMBER).decode()

    return Conditions("caption", len(shards), shards.manifest.fingerprint(), name, at, originals)


def written_captions(
    captions: Sequence[str], gpt: TrainedGPT, text_encoder: Path | None, device: torch.device, key: str
) -> Conditions:
    """Captions in words, encoded here; see ``encoder_of`` and ``encoded_captions``."""
    return encoded_captions(captions, gpt, encoder_of(gpt, text_encoder, device, key))


def encoder_of(gpt: TrainedGPT, text_encoder: Path | None, device: torch.device, key: str) -> CaptionEncoder:
    """The text encoder that a GPT was trained with.

    text_encoder: None takes the one that the GPT's record names.
    key: the config key or option that names it, for messages.
    Raises UserError: no encoder is named, or another than the GPT was trained with.
    """
    known = gpt.captions
    path = Path(known["encoder"]) if text_encoder is None and known is not None else text_encoder
    if path is None:
        raise UserError(f"{key}: the checkpoint does not name its text encoder; say where it is")
    encoder = CaptionEncoder(path, device, gpt.config.prefix)
    if encoder.dim != gpt.config.caption_dim or (known is not None and known["encoder_sha256"] != encoder.sha256):
        was = "" if known is None else f" ({known['encoder']}, sha256 {known['encoder_sha256'][:12]}…)"
        raise UserError(
            f"{key}: {encoder.path} ({encoder.dim} features per token, sha256 {encoder.sha256[:12]}…) is "
            f"not the one that {gpt.path} was trained with{was}; its features mean other things"
        )
    return encoder


def encoded_captions(captions: Sequence[str], gpt: TrainedGPT, encoder: CaptionEncoder) -> Conditions:
    """Captions in words as the GPT takes them; which are too long for it is said."""
    lengths = encoder.lengths(captions)
    cut = {number: length for number, length in enumerate(lengths) if length > gpt.config.prefix}
    for number, length in cut.items():
        LOG.warning(
            f"caption {number + 1} ({captions[number]:.40}…) has {length} tokens, the GPT takes {gpt.config.prefix}: "
            "its end is cut off"
        )
    features = encoder.encode(list(captions))
    identity = hashlib.sha256("\n".join([encoder.sha256, *captions]).encode()).hexdigest()

    def at(numbers: Tensor) -> Condition:
        return left_padded([features[number] for number in numbers.tolist()], gpt.config.prefix)

    return Conditions("caption", len(captions), identity, captions.__getitem__, at, cut=cut)


def _check_encoding(encoding: CaptionEncoding | None, gpt: TrainedGPT, where: str) -> None:
    """Raises UserError unless caption features of this encoding are what the GPT was trained on."""
    if encoding is None:
        raise UserError(f"{where} holds no caption features; extract with text_encoder=PATH")
    known = gpt.captions
    if encoding.dim != gpt.config.caption_dim or (
        known is not None and known["encoder_sha256"] != encoding.encoder_sha256
    ):
        raise UserError(
            f"{where} was encoded by {encoding.encoder} (sha256 {encoding.encoder_sha256[:12]}…), which is not the "
            f"text encoder that {gpt.path} was trained with"
        )
    if encoding.max_tokens > gpt.config.prefix:
        raise UserError(
            f"{where} has captions of up to {encoding.max_tokens} tokens, and the GPT has {gpt.config.prefix} "
            "positions for them"
        )


def conditions(
    gpt: TrainedGPT, tokenizer: Tokenizer, captions: Path | None, text_encoder: Path | None, device: torch.device
) -> Conditions:
    """The GPT's classes, or the captions at ``captions``: token shards with caption features, or a text file with one
    caption a line, which ``text_encoder`` encodes. Raises UserError."""
    if gpt.config.condition == "class":
        if captions is not None:
            raise UserError(f"captions: {gpt.path} is conditioned on classes; leave captions out")
        return classes(gpt)
    if captions is None:
        raise UserError(
            f"captions: {gpt.path} is conditioned on text; name token shards with caption features, or a text file "
            "with one caption a line beside text_encoder=PATH"
        )
    if captions.is_dir():
        return shard_captions(open_shards(captions, "tokens"), gpt, tokenizer)
    try:
        lines = [line.strip() for line in captions.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"captions: {captions} cannot be read ({error})") from None
    if not lines:
        raise UserError(f"captions: {captions} holds no captions; write one a line")
    return written_captions(lines, gpt, text_encoder, device, "text_encoder")
