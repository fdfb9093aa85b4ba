"""Small image shards: coloured blobs that a tokenizer can learn, with a border of zeros where it is asked for."""

import io
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from llamagen_dist.data.manifest import Manifest, write_manifest
from llamagen_dist.data.writer import Sample, shard_name, write_shard


def write_images(
    folder: Path, count: int, size: int, padding: tuple[int, int, int, int] | None = None, seed: int = 0
) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    left, top, right, bottom = padding or (0, 0, 0, 0)

    def samples() -> Iterator[Sample]:
        for number in range(count):
            small = rng.integers(256, size=(4, 4, 3)).astype(np.uint8)
            inner = Image.fromarray(small).resize((size - left - right, size - top - bottom))
            picture = Image.new("RGB", (size, size))
            picture.paste(inner, (left, top))
            buffer = io.BytesIO()
            picture.save(buffer, "PNG")
            yield f"{number:08d}", {".png": buffer.getvalue()}

    record = write_shard(folder, shard_name(0), samples(), (".png",))
    manifest = Manifest(
        kind="images", count=count, members=(".png",), shards=(record,), image_size=size, padding=padding
    )
    write_manifest(folder, manifest)
    return folder
