"""From stored captions to a text encoder's features, in groups that depend on nothing but the shard."""

from collections.abc import Iterator

import numpy as np

from llamagen_dist.data.captions import (
    CAPTION_FEATURES_MEMBER,
    CLEANING,
    SHORT_FEATURES_MEMBER,
    bits,
    caption_bytes,
    clean,
    first_sentence,
)
from llamagen_dist.data.manifest import CaptionEncoding
from llamagen_dist.data.shards import CAPTION_MEMBER, SHORT_CAPTION_MEMBER, Shards
from llamagen_dist.data.text_encoder import CaptionEncoder
from llamagen_dist.errors import UserError

GROUP = 1024
"""Samples whose captions are encoded together, sorted by length; bounds the memory, half a GB for 120 x 2048."""


class CaptionFeatures:
    """short: the features of the short captions too (``.short.txt``, else the first sentence of ``.txt``)."""

    def __init__(self, encoder: CaptionEncoder, path: str, max_tokens: int, short: bool) -> None:
        self._encoder, self._short, self._max_tokens = encoder, short, max_tokens
        self.encoding = CaptionEncoding(
            encoder=path,
            encoder_sha256=encoder.sha256,
            dim=encoder.dim,
            max_tokens=max_tokens,
            cleaning=CLEANING,
            short=short,
        )
        self.members: tuple[str, ...] = (CAPTION_MEMBER, CAPTION_FEATURES_MEMBER)
        if short:
            self.members += (SHORT_CAPTION_MEMBER, SHORT_FEATURES_MEMBER)

    def check(self, shards: Shards) -> None:
        """Raises UserError, naming shard and sample, where there is no caption."""
        for end, count in zip(shards.ends, shards.sizes, strict=True):
            shards.spans(np.arange(end - count, end), CAPTION_MEMBER)

    def parts(self, shards: Shards, samples: range, counts: dict[str, int]) -> Iterator[dict[str, bytes]]:
        """The captions and their features, by member, of each sample.

        counts: captions that are empty once cleaned (``empty_captions``; their features are those of the end mark
        alone), and that fill ``max_tokens`` (``captions_at_limit``), are added up in it. Raises UserError, naming
        shard and sample, where a caption is missing or not UTF-8.
        """
        for start in range(samples.start, samples.stop, GROUP):
            group = range(start, min(start + GROUP, samples.stop))
            texts = [self._texts(shards, sample) for sample in group]
            cleaned = [tuple(clean(text) for text in pair) for pair in texts]
            distinct = list(dict.fromkeys(text for pair in cleaned for text in pair))
            features = dict(zip(distinct, self._encoder.encode(distinct), strict=True))
            for pair, keys in zip(texts, cleaned, strict=True):
                counts["empty_captions"] += not keys[0]
                counts["captions_at_limit"] += len(features[keys[0]]) == self._max_tokens
                parts = {}
                for number, (text, key) in enumerate(zip(pair, keys, strict=True)):
                    parts[self.members[2 * number]] = text.encode()
                    parts[self.members[2 * number + 1]] = caption_bytes(bits(features[key]))
                yield parts

    def _texts(self, shards: Shards, sample: int) -> tuple[str, ...]:
        text = _read(shards, sample, CAPTION_MEMBER)
        if not self._short:
            return (text,)
        given = SHORT_CAPTION_MEMBER in shards.manifest.members and SHORT_CAPTION_MEMBER in shards.parts(sample)
        return text, _read(shards, sample, SHORT_CAPTION_MEMBER) if given else first_sentence(text)


def _read(shards: Shards, sample: int, member: str) -> str:
    try:
        return shards.read(sample, member).decode()
    except UnicodeDecodeError as error:
        raise UserError(
            f"{shards.where(sample)}: {member} is not UTF-8 ({error.reason} at byte {error.start}); write the captions "
            "in UTF-8 and pack again"
        ) from None
