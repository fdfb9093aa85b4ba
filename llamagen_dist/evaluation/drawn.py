"""Pictures that a GPT draws while they are scored: an image set without files, of whatever number of pictures.

In memory are the GPT, its tokenizer and one batch. Nothing can be resumed; what must survive is drawn by eval.sample.
"""

import numpy as np
import torch
from numpy.typing import NDArray

from llamagen_dist.evaluation.image_sets import ImageSet, scaled_down
from llamagen_dist.files import as_json
from llamagen_dist.sampling.numbered import NumberedPictures
from llamagen_dist.tracking.provenance import versions


class DrawnPictures:
    """Pictures of a GPT by number; the last batch is kept, so that who reads in order has every batch drawn once."""

    def __init__(self, numbered: NumberedPictures) -> None:
        self.numbered = numbered
        self._first, self._batch = -1, np.empty(0, np.uint8)

    def read(self, indices: NDArray[np.int64]) -> NDArray[np.uint8]:
        """uint8 [n, S, S, 3]."""
        side, batch = self.numbered.gpt.image_size, self.numbered.together
        pixels = np.empty((len(indices), side, side, 3), np.uint8)
        firsts = indices // batch * batch
        for first in np.unique(firsts).tolist():
            if first != self._first:
                self._first, self._batch = first, self.numbered.batch(torch.arange(first, first + batch))
            rows = firsts == first
            pixels[rows] = self._batch[indices[rows] - first]
        return pixels


def drawn_images(numbered: NumberedPictures, count: int, resize_to: int | None = None) -> ImageSet:
    """The first ``count`` pictures, by the path of their GPT; ``resize_to`` as ``open_images`` takes it."""
    record = {
        "program": "eval.sample",
        "set": "model",
        **as_json(numbered.identity(count, ["model"])),
        **numbered.describe(),
        "versions": versions("torch", "numpy"),
    }
    side = numbered.gpt.image_size
    images = ImageSet(
        numbered.config.checkpoint,
        count,
        side,
        side,
        labels=numbered.labels(torch.arange(count)).numpy(),
        classes=None,
        pixels=DrawnPictures(numbered),
        statistics={},
        stored_size=(side, side),
        drawn=record,
        together=numbered.together,
    )
    return scaled_down(images, resize_to)
