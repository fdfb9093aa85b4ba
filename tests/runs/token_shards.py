"""Small token shards with structure a GPT can learn: rows repeat with a class-dependent step."""

from pathlib import Path

import numpy as np

from llamagen_dist.data.manifest import Manifest, write_manifest
from llamagen_dist.data.tokens import CODES_MEMBER, codes_bytes
from llamagen_dist.data.writer import label_text, shard_name, write_shard

VOCABULARY, SIDE, CLASSES = 64, 4, 4


def write_tokens(folder: Path, count: int, seed: int) -> Path:
    folder.mkdir(parents=True)
    rng = np.random.default_rng(seed)
    members = (CODES_MEMBER, ".cls")

    def samples(first: int, last: int):
        for i in range(first, last):
            label = i % CLASSES
            start = rng.integers(VOCABULARY, size=(2, 1))
            codes = (start + np.arange(SIDE * SIDE) * (label + 1)) % VOCABULARY
            yield (
                f"{i:08d}",
                {CODES_MEMBER: codes_bytes(codes.astype(np.uint16)), ".cls": label_text(label, CLASSES)},
            )

    half = count // 2
    records = tuple(
        write_shard(folder, shard_name(n), samples(*span), members) for n, span in enumerate([(0, half), (half, count)])
    )
    write_manifest(
        folder,
        Manifest(
            kind="tokens",
            count=count,
            members=members,
            shards=records,
            classes=[f"class {c}" for c in range(CLASSES)],
            image_size=16,
            vocab_size=VOCABULARY,
            grid=(SIDE, SIDE),
            crops=2,
            tokenizer_sha256="0" * 64,
        ),
    )
    return folder
