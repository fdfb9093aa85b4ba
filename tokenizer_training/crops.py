"""From stored images to codes: decode, cut, encode in batches of one fixed shape."""

import ctypes
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from llamagen_dist.config import ExtractConfig
from llamagen_dist.data import images
from llamagen_dist.data.shards import Shards
from llamagen_dist.models.vq import VQModel

CPU_PIXELS = 1 << 16
"""Pixels that a CPU encodes at once: beyond, the activations leave the caches and the time per image grows."""
COMPARED = 256
"""Images on which bf16's codes are compared with fp32's."""


class CropCoder:
    """The codes of every crop of an image. All of it is a function of the samples that are asked for together.

    model: in evaluation mode, on the device that is to be used.
    """

    def __init__(self, config: ExtractConfig, model: VQModel) -> None:
        self._config, self._model = config, model
        self._device = model.device
        if self._device.type == "cpu":
            model.to(memory_format=torch.channels_last)  # a sixth faster there
            _keep_memory()
        self._ranges = config.crop_ranges if config.crops == "ten_crop" else ()
        self.crops = {"center": 1, "center_flip": 2, "ten_crop": 10 * len(self._ranges)}[config.crops]
        self.grid = model.config.grid(config.image_size)

    def rows(self, shards: Shards, samples: range) -> Iterator[NDArray[np.uint16]]:
        """uint16 [tokens] for every crop of every sample in turn, encoded ``batch`` crops at a time.

        Raises UserError, naming shard and sample, for an image that cannot be decoded or cut.
        """
        coming: Tensor | None = None  # a GPU works on it while the next batch is cut
        for batch in self._batches(shards, samples):
            begun = self._encode(batch, self._config.precision)
            if coming is not None:
                yield from coming.cpu().numpy().astype(np.uint16)
            coming = begun[: len(batch)]
        if coming is not None:
            yield from coming.cpu().numpy().astype(np.uint16)

    def changed_codes(self, shards: Shards) -> tuple[int, int]:
        """(codes that bf16 changes, codes compared), over the first crop of COMPARED images from the whole set."""
        count = min(COMPARED, len(shards))
        samples = [number * len(shards) // count for number in range(count)]
        changed = compared = 0
        for start in range(0, count, self._config.batch):
            batch = [
                self._crops_of(shards, sample, shards.image_bytes(sample))[0]
                for sample in samples[start : start + self._config.batch]
            ]
            exact, rounded = (self._encode(batch, precision)[: len(batch)] for precision in ("fp32", "bf16"))
            changed += int((exact != rounded).sum())
            compared += exact.numel()
        return changed, compared

    def _batches(self, shards: Shards, samples: range) -> Iterator[list[NDArray[np.uint8]]]:
        waiting: list[NDArray[np.uint8]] = []
        for views in self._views(shards, samples):
            waiting += views
            while len(waiting) >= self._config.batch:
                yield waiting[: self._config.batch]
                del waiting[: self._config.batch]
        if waiting:
            yield waiting

    def _views(self, shards: Shards, samples: range) -> Iterator[list[NDArray[np.uint8]]]:
        """The crops of each sample, uint8 [S, S, 3]; decoded a few images ahead when there are workers."""
        workers = self._config.workers
        if workers == 0:
            yield from (self._crops_of(shards, sample, shards.image_bytes(sample)) for sample in samples)
            return
        ahead: deque[Future[list[NDArray[np.uint8]]]] = deque()
        with ThreadPoolExecutor(workers) as threads:
            for sample in samples:
                ahead.append(threads.submit(self._crops_of, shards, sample, shards.image_bytes(sample)))
                if len(ahead) > 4 * workers:
                    yield ahead.popleft().result()
            while ahead:
                yield ahead.popleft().result()

    def _crops_of(self, shards: Shards, sample: int, data: bytes) -> list[NDArray[np.uint8]]:
        """The crops of one sample, uint8 [S, S, 3] each. Raises UserError, naming shard and sample, for an image that
        cannot be decoded or would become too large; every way to the crops goes through here.
        """
        with images.naming(shards, sample):
            return self._cut(images.decode_sample(shards, sample, data))

    def _cut(self, image: Image.Image) -> list[NDArray[np.uint8]]:
        size = self._config.image_size
        if self._ranges:
            views = [view for crop_range in self._ranges for view in images.ten_crops(image, size, crop_range)]
        else:
            centre = images.center_crop(image, size)
            views = [centre, images.flip(centre)][: self.crops]
        return [np.asarray(view) for view in views]

    def _encode(self, views: list[NDArray[np.uint8]], precision: str) -> Tensor:
        """uint8 [S, S, 3] each -> codes int64 [batch, tokens]. The batch is filled up with zeros."""
        size = self._config.image_size
        pixels = np.zeros((self._config.batch, size, size, 3), np.uint8)
        pixels[: len(views)] = views
        at_once = max(1, CPU_PIXELS // size**2) if self._device.type == "cpu" else len(pixels)
        codes = []
        for piece in torch.from_numpy(pixels).to(self._device).split(at_once):
            # the search for the nearest code stays in fp32
            with torch.autocast(self._device.type, torch.bfloat16, enabled=precision == "bf16"):
                codes.append(self._model.encode(images.to_floats(piece)).flatten(1))
        return torch.cat(codes)


def _keep_memory() -> None:
    """Let glibc reuse large blocks: it returns those above 32 MiB to the system each time, and getting their pages
    back, zeroed, is a sixth of the encoder's time at 256 px.
    """
    set_option = getattr(ctypes.CDLL(None), "mallopt", None)
    if set_option is not None:  # other C libraries have no such function
        no_maps, keep_at_the_end = -4, -1  # M_MMAP_MAX, M_TRIM_THRESHOLD
        set_option(no_maps, 0)
        set_option(keep_at_the_end, (1 << 31) - 1)
