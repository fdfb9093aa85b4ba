"""How well pictures fit the captions they were drawn from: CLIP score (Hessel et al. 2021), by a local CLIP.

100 x max(cosine of the picture's and the caption's embedding, 0), the mean over pictures. Each is computed in a batch
of one shape, captions padded to the network's length, so a score does not depend on its neighbours or on the ranks.
"""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from llamagen_dist.data.pretrained import load_model, model_files, sha256_of
from llamagen_dist.data.shards import CAPTION_MEMBER, Shards
from llamagen_dist.errors import UserError
from llamagen_dist.evaluation.drawn import DrawnPictures
from llamagen_dist.evaluation.image_sets import ImageSet

CAPTIONS = "captions.json"
"""What eval.sample writes beside its pictures: caption number k is that of the pictures with label k."""
_HINT = "give a local copy of a CLIP as transformers saves it, for example openai/clip-vit-base-patch32"
_PROCESSOR = "preprocessor_config.json"
_PARTS = {
    "tokenizer": ("tokenizer.json", "vocab.json", "merges.txt", "tokenizer_config.json"),
    "image processor": (_PROCESSOR,),
}


class CLIPScore:
    """path: the folder, with tokenizer and image processor. Raises UserError where it holds no such CLIP."""

    def __init__(self, path: Path, device: torch.device) -> None:
        from transformers import AutoTokenizer, CLIPImageProcessorPil, CLIPModel

        called = f"clip: {path}"
        files = model_files(path, called, "clip", _HINT, _PARTS)

        def read() -> Any:
            self.tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True)
            # pillow's resize, as the original CLIP has it
            self.processor = CLIPImageProcessorPil.from_pretrained(path, local_files_only=True)
            return CLIPModel.from_pretrained(path, local_files_only=True, dtype=torch.float32, output_loading_info=True)

        self.model = load_model(called, files, read).to(device)
        self.sha256, self.device = sha256_of(files), device
        self.length: int = self.model.config.text_config.max_position_embeddings
        if len(self.tokenizer) > self.model.config.text_config.vocab_size:
            raise UserError(
                f"{called}: its tokenizer knows more pieces than its weights: these files do not belong together"
            )

    def describe(self, captions: Sequence[str]) -> dict[str, Any]:
        """sha256 of all captions, their number, and of how many the network does not see the end."""
        pieces = self.tokenizer(list(captions), verbose=False).input_ids
        return {
            "sha256": hashlib.sha256("\n".join(captions).encode()).hexdigest(),
            "n": len(captions),
            f"longer_than_{self.length}_tokens": sum(len(ids) > self.length for ids in pieces),
        }

    @torch.no_grad()
    def __call__(self, pixels: NDArray[np.uint8], captions: Sequence[str]) -> Tensor:
        """uint8 [n, H, W, 3] and n captions -> float64 [n], 0 to 100."""
        shown = self.processor(list(pixels), return_tensors="pt").pixel_values
        words = self.tokenizer(
            list(captions), padding="max_length", truncation=True, max_length=self.length, return_tensors="pt"
        )
        embedded = self.model(
            pixel_values=shown.to(self.device),
            input_ids=words.input_ids.to(self.device),
            attention_mask=words.attention_mask.to(self.device),
        )
        cosine = F.cosine_similarity(embedded.image_embeds.double(), embedded.text_embeds.double())
        return 100 * cosine.clamp_min(0)

    def record(self) -> dict[str, Any]:
        """What decides the scores."""
        return {
            "network": "CLIP (transformers)",
            "files_sha256": self.sha256,
            "formula": "100 x max(cosine, 0), mean over pictures",
            "captions": f"as written, the first {self.length} tokens",
            "arithmetic": "float32",
        }


def captions_of(images: ImageSet, indices: NDArray[np.int64]) -> list[str] | None:
    """The captions of these pictures: of an .npz, CAPTIONS beside it, by label; of image shards and of what a GPT draws
    meanwhile, their own. None where none are known.

    Raises UserError where the file is damaged, or has fewer captions than the labels need.
    """
    if isinstance(images.pixels, DrawnPictures) and images.labels is not None:
        known = images.pixels.numbered.conditions
        return [known.name(int(label)) for label in images.labels[indices]] if known.kind == "caption" else None
    if isinstance(images.pixels, Shards):
        if CAPTION_MEMBER not in images.pixels.manifest.members:
            return None
        return [images.pixels.read(int(number), CAPTION_MEMBER).decode() for number in indices]
    file = images.path.parent / CAPTIONS
    if images.path.suffix != ".npz" or images.labels is None or not file.exists():
        return None
    try:
        known = json.loads(file.read_text(encoding="utf-8"))
        if not all(isinstance(caption, str) for caption in known):
            raise ValueError("not a list of captions")
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{file}: cannot be read as captions ({error}); draw the pictures again") from None
    labels = images.labels[indices]
    if labels.max(initial=0) >= len(known) or labels.min(initial=0) < 0:
        raise UserError(f"{file}: has {len(known)} captions, but {images.path} has pictures of number {labels.max()}")
    return [known[label] for label in labels]
