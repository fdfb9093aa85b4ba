"""Images by position: decoding, LlamaGen's crops and flip, batches for the tokenizer."""

import itertools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from llamagen_dist import prng
from llamagen_dist.config.pack import MOST_PIXELS
from llamagen_dist.data.batch import ImageBatch
from llamagen_dist.data.cache import ShardPrefetcher
from llamagen_dist.data.decode import DECODE_ERRORS, decode
from llamagen_dist.data.order import Order
from llamagen_dist.data.shards import Shards
from llamagen_dist.errors import UserError
from llamagen_dist.parallel.topology import Topology

_LARGEST_SHORT_SIDE = 1.25  # of image_size: LlamaGen keeps at least 80 % of the short side
_KEPT_BYTES = 64 << 20  # a data set whose pixels fit in here is decoded once


def resize_short_side(image: Image.Image, short: int) -> Image.Image:
    """Scale so that the shorter side is ``short`` pixels: BOX halvings while twice too large, then BICUBIC.

    (The resampling of ADM's crops, which LlamaGen uses for training, extraction and reference images.) Raises
    ValueError for a strip so narrow that it would become larger than any picture may be.
    """
    while min(image.size) >= 2 * short:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = short / min(image.size)
    width, height = round(image.width * scale), round(image.height * scale)
    if width * height > MOST_PIXELS:
        raise ValueError(
            f"{image.width} x {image.height} pixels would become {width} x {height}, more than the limit of "
            f"{MOST_PIXELS:,} pixels"
        )
    return image.resize((width, height), Image.Resampling.BICUBIC)


def center_crop(image: Image.Image, size: int) -> Image.Image:
    """ADM's centre crop to size x size; an image of that size already is returned as it is."""
    if image.size == (size, size):
        return image
    image = resize_short_side(image, size)
    return _cut(image, (image.width - size) // 2, (image.height - size) // 2, size)


def _cut(image: Image.Image, left: int, top: int, size: int) -> Image.Image:
    return image.crop((left, top, left + size, top + size))


def random_crop(image: Image.Image, size: int, short: int, across: float, down: float) -> Image.Image:
    """Short side to ``short`` pixels, then the size x size window at ``across``, ``down`` in [0, 1) of the room."""
    image = resize_short_side(image, short)
    left, top = (int(part * (side - size + 1)) for part, side in zip((across, down), image.size, strict=True))
    return _cut(image, left, top, size)


def flip(image: Image.Image) -> Image.Image:
    return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)


def ten_crops(image: Image.Image, size: int, crop_range: float) -> list[Image.Image]:
    """Centre crop to int(size x crop_range), then four corners and the centre, then the same of the mirrored image."""
    large = center_crop(image, int(size * crop_range))
    room = large.width - size
    middle = round(room / 2)
    corners = ((0, 0), (room, 0), (0, room), (room, room), (middle, middle))
    return [_cut(view, left, top, size) for view in (large, flip(large)) for left, top in corners]


def to_floats(pixels: NDArray[np.uint8] | Tensor) -> Tensor:
    """uint8 [..., S, S, 3] -> float32 [..., 3, S, S] in [-1, 1], on the device of ``pixels``."""
    values = torch.as_tensor(pixels).movedim(-1, -3).to(torch.float32, memory_format=torch.contiguous_format)
    return values.div_(255).sub_(0.5).div_(0.5)


def read_image(shards: Shards, sample: int) -> Image.Image:
    """One stored image as RGB. Raises UserError naming shard and sample when it cannot be decoded."""
    return decode_sample(shards, sample, shards.image_bytes(sample))


def decode_sample(shards: Shards, sample: int, data: bytes) -> Image.Image:
    """``read_image`` with the bytes already read (the shards are not touched: safe in a thread)."""
    try:
        return decode(data)
    except DECODE_ERRORS as error:
        raise UserError(
            f"{shards.where(sample)}: the image cannot be decoded ({error}); run llamagen shards verify"
        ) from None


def load_images(shards: Shards, indices: Sequence[int], image_size: int) -> NDArray[np.uint8]:
    """uint8 [n, S, S, 3]: centre crops of the samples with these global numbers."""
    pixels = np.empty((len(indices), image_size, image_size, 3), np.uint8)
    for number, sample in enumerate(indices):
        image = read_image(shards, int(sample))
        with naming(shards, int(sample)):
            pixels[number] = np.asarray(center_crop(image, image_size))
    return pixels


@contextmanager
def naming(shards: Shards, sample: int) -> Iterator[None]:
    """Turn what cannot become a crop of the size into a UserError about that sample."""
    try:
        yield
    except ValueError as error:
        raise UserError(f"{shards.where(sample)}: {error}; pack the images again with --size and --skip-bad") from None


class ImageStream:
    """Training batches for the tokenizer, by position like TokenStream's: float32 [share, 3, S, S] in [-1,
    1].

    workers: decoding processes; 0 decodes here. window_shards: 0 takes samples from everywhere, else see
    ``order.Windows``. The pixels are the same for any number of workers and ranks.
    Raises UserError where the shards do not hold images.
    """

    def __init__(
        self,
        shards: Shards,
        topology: Topology,
        global_batch: int,
        seed: int,
        image_size: int,
        random_crop: bool = True,
        horizontal_flip: bool = True,
        workers: int = 0,
        window_shards: int = 0,
    ) -> None:
        if shards.manifest.kind != "images":
            raise UserError(f"{shards.location}: holds {shards.manifest.kind}, not images; name the image shards")
        share = topology.per_rank_batch(global_batch)
        self._global_batch, self._offset = global_batch, topology.dp_rank * share
        self._shards = shards
        order = Order(len(shards), seed, sizes=shards.sizes, window_shards=window_shards)
        self._prefetcher = ShardPrefetcher(shards.cache, shards.manifest.shards, order.windows, topology.rank)
        self._batches = _Batches(shards, order, share, seed, image_size, random_crop, horizontal_flip)
        self._workers = workers
        self._loader: Iterator[ImageBatch] | None = None
        self._next = 0

    def batch(self, images_seen: int) -> ImageBatch:
        """This rank's share of the global batch that starts at global position ``images_seen``."""
        self._prefetcher.at(images_seen + self._offset)
        if self._workers == 0:
            return self._batches[images_seen + self._offset]
        if self._loader is None or self._next != images_seen:
            self._loader = None  # before the new one starts: it holds processes
            starts: Any = itertools.count(images_seen + self._offset, self._global_batch)
            loader = DataLoader(
                self._batches, batch_size=None, sampler=starts, num_workers=self._workers, prefetch_factor=4
            )
            self._loader = iter(loader)
        self._next = images_seen + self._global_batch
        return next(self._loader)

    def where(self, sample: int) -> str:
        """The shard and record of a sample, for messages."""
        return self._shards.where(sample)


@dataclass
class _Batches(Dataset[ImageBatch]):
    """One rank's batches by their first position; what a decoding process works on."""

    shards: Shards
    order: Order
    share: int
    seed: int
    size: int
    random_crop: bool
    horizontal_flip: bool

    def __post_init__(self) -> None:
        stored = self.shards.manifest.image_size
        small = stored is not None and len(self.shards) * stored**2 * 3 <= _KEPT_BYTES
        self._kept: dict[int, NDArray[np.uint8]] | None = {} if small else None

    def __getitem__(self, start: int) -> ImageBatch:
        positions = torch.arange(start, start + self.share)
        samples = self.order.samples(start, self.share)
        pixels = np.empty((self.share, self.size, self.size, 3), np.uint8)
        most = int(np.ceil(self.size * _LARGEST_SHORT_SIDE))
        short = prng.integers(self.seed, "crop-scale", positions, most - self.size + 1) + self.size
        across, down = (prng.uniform(self.seed, "crop-place", positions, axis) for axis in (0, 1))
        mirrored = prng.uniform(self.seed, "flip", positions) < (0.5 if self.horizontal_flip else 0.0)
        for number, sample in enumerate(samples.tolist()):
            picture = self._picture(sample)
            with naming(self.shards, sample):
                if self.random_crop:
                    position = float(across[number]), float(down[number])
                    image = random_crop(Image.fromarray(picture), self.size, int(short[number]), *position)
                    picture = np.asarray(image)
                elif picture.shape[:2] != (self.size, self.size):
                    picture = np.asarray(center_crop(Image.fromarray(picture), self.size))
            pixels[number] = picture[:, ::-1] if mirrored[number] else picture
        return ImageBatch(to_floats(pixels), samples)

    def _picture(self, sample: int) -> NDArray[np.uint8]:
        """The decoded image, uint8 [H, W, 3]; small data sets are decoded only once."""
        if self._kept is None:
            return np.asarray(read_image(self.shards, sample))
        if sample not in self._kept:
            self._kept[sample] = np.asarray(read_image(self.shards, sample))
        return self._kept[sample]
