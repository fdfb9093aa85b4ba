"""Small token shards with captions: two words per sample, the first of which a GPT can see in the codes."""

from pathlib import Path

import numpy as np
import torch

from llamagen_dist.data.captions import CAPTION_FEATURES_MEMBER, SHORT_FEATURES_MEMBER, bits, caption_bytes
from llamagen_dist.data.manifest import CaptionEncoding, Manifest, write_manifest
from llamagen_dist.data.shards import CAPTION_MEMBER
from llamagen_dist.data.tokens import CODES_MEMBER, codes_bytes
from llamagen_dist.data.writer import shard_name, write_shard
from tests.runs.token_shards import SIDE, VOCABULARY

COLOURS, THINGS = ("red", "green", "blue", "grey"), ("cup", "hat", "old shoe")
DIM, PLACES = 8, 6


def word_features(text: str) -> torch.Tensor:
    """bfloat16 [words, DIM]: the same word has the same features everywhere."""
    rows = [np.random.default_rng(sum(word.encode()) % 997).standard_normal(DIM) for word in text.split()]
    return torch.tensor(np.array(rows)).to(torch.bfloat16)


def write_captions(folder: Path, count: int, seed: int, encoder_sha256: str = "1" * 64, **changes: object) -> Path:
    folder.mkdir(parents=True)
    rng = np.random.default_rng(seed)
    members = (CODES_MEMBER, CAPTION_MEMBER, CAPTION_FEATURES_MEMBER, SHORT_FEATURES_MEMBER)

    def samples(first: int, last: int):
        for i in range(first, last):
            colour = i % len(COLOURS)
            text = f"{COLOURS[colour]} {THINGS[i % len(THINGS)]}"
            start = rng.integers(VOCABULARY, size=(2, 1))
            codes = (start + np.arange(SIDE * SIDE) * (colour + 1)) % VOCABULARY
            yield (
                f"{i:08d}",
                {
                    CODES_MEMBER: codes_bytes(codes.astype(np.uint16)),
                    CAPTION_MEMBER: text.encode(),
                    CAPTION_FEATURES_MEMBER: caption_bytes(bits(word_features(text))),
                    SHORT_FEATURES_MEMBER: caption_bytes(bits(word_features(COLOURS[colour]))),
                },
            )

    half = count // 2
    records = tuple(
        write_shard(folder, shard_name(n), samples(*span), members) for n, span in enumerate([(0, half), (half, count)])
    )
    values: dict = {
        "kind": "tokens",
        "count": count,
        "members": members,
        "shards": records,
        "image_size": 16,
        "vocab_size": VOCABULARY,
        "grid": (SIDE, SIDE),
        "crops": 2,
        "tokenizer_sha256": "0" * 64,
        "captions": CaptionEncoding("somewhere/t5", encoder_sha256, DIM, PLACES, "test", short=True),
    }
    write_manifest(folder, Manifest(**values | changes))
    return folder
