"""What lies in shards, to be looked at: images as they are, tokens decoded, with their classes and captions."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image

from llamagen_dist.data.images import read_image
from llamagen_dist.data.shards import CAPTION_MEMBER, LABEL_MEMBER, Shards
from llamagen_dist.data.tokens import TokenReader
from llamagen_dist.errors import UserError
from llamagen_dist.models.vq import VQModel
from llamagen_dist.sampling.grid import contact_sheet
from llamagen_dist.sampling.load import load_tokenizer
from llamagen_dist.sampling.pictures import decode_tokens

_BATCH = 8


def shard_sheet(shards: Shards, samples: range, tokenizer: Path | None = None) -> Image.Image:
    """A contact sheet of these samples, with class names and captions; of tokens, the first crop.

    tokenizer: for token shards; by default the one that their manifest names. Raises UserError: it is not there or
    not the one that made the tokens, a sample that cannot be read.
    """
    manifest = shards.manifest
    title = f"{shards.location}: samples {samples.start} to {samples.stop - 1} of {len(shards):,}"
    if manifest.kind == "images":
        if tokenizer is not None:
            raise UserError(f"--tokenizer: {shards.location} holds images, which need none; leave it out")
        pictures = [read_image(shards, sample) for sample in samples]
    else:
        model, reader = _tokenizer_of(shards, tokenizer), TokenReader(shards)
        pictures = []
        for start in range(samples.start, samples.stop, _BATCH):
            chosen = np.arange(start, min(start + _BATCH, samples.stop))
            codes = torch.from_numpy(reader.codes(chosen, np.zeros_like(chosen)))
            pictures += [Image.fromarray(image) for image in decode_tokens(model, codes)]
        title += f", decoded from tokens (crop 1 of {manifest.crops})"
    return contact_sheet(pictures, [_text(shards, sample) for sample in samples], title)


def _tokenizer_of(shards: Shards, path: Path | None) -> VQModel:
    """The tokenizer at ``path``, or else where the manifest says it lies; refused unless it made the tokens."""
    manifest = shards.manifest
    if path is None and (manifest.tokenizer_path is None or not Path(manifest.tokenizer_path).exists()):
        raise UserError(
            f"{shards.location}: its tokenizer ({manifest.tokenizer_path or 'not named'}) is gone; say where it is "
            "with --tokenizer PATH"
        )
    where, made = path or Path(str(manifest.tokenizer_path)), manifest.tokenizer_sha256
    named = load_tokenizer(where, key="--tokenizer", made=made)
    if named.sha256 != made:
        raise UserError(
            f"--tokenizer: {named.path} (sha256 {named.sha256[:12]}…) is not the one that made the tokens in "
            f"{shards.location} ({manifest.tokenizer_path}, sha256 {str(made)[:12]}…)"
        )
    return named.model


def _text(shards: Shards, sample: int) -> str:
    """Number and class name, and the caption on the next line, whichever there are."""
    text = f"{sample}"
    if shards.manifest.classes is not None and LABEL_MEMBER in shards.manifest.members:
        text += f" {shards.manifest.classes[int(shards.labels([sample])[0])]}"
    if CAPTION_MEMBER in shards.manifest.members and CAPTION_MEMBER in shards.parts(sample):
        text += "\n" + shards.read(sample, CAPTION_MEMBER).decode(errors="replace")
    return text
