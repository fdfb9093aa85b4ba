"""Images to be scored, from an .npz, image shards or picture files, and which of them a limited comparison takes."""

import json
import mmap
import struct
import zipfile
import zlib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from numpy.lib import format as npy
from numpy.typing import NDArray

from llamagen_dist import prng
from llamagen_dist.console import LOG
from llamagen_dist.data.images import load_images
from llamagen_dist.data.manifest import MANIFEST
from llamagen_dist.data.shards import LABEL_MEMBER, Shards, open_shards
from llamagen_dist.errors import UserError
from llamagen_dist.evaluation.frechet import check_statistics
from llamagen_dist.evaluation.inception import POOL_FEATURES, SPATIAL_FEATURES
from llamagen_dist.evaluation.packed import Header, PackedPixels
from llamagen_dist.evaluation.picture_files import PictureFiles

STATISTICS = {"fid": ("mu", "sigma", POOL_FEATURES), "sfid": ("mu_s", "sigma_s", SPATIAL_FEATURES)}
"""Arrays of a published reference .npz (as ADM and LlamaGen share them) that describe one Gaussian each, and its
dimensions."""
RESIZED = "bicubic (a = -0.75, half-pixel centres) without antialiasing, rounded to 8 bits"
PROVENANCE = "provenance"
"""Array of an .npz of eval.reference: JSON as uint8."""
MOST_CLASSES = 1 << 16  # a classifier has an output for each class: a damaged label must not fill the memory


class Source(Protocol):
    """Pictures by number, none of them in memory before they are read."""

    def read(self, indices: NDArray[np.int64]) -> NDArray[np.uint8]:
        """uint8 [n, H, W, 3]. Raises UserError."""
        ...


@dataclass(frozen=True)
class ImageSet:
    """An open set of images; nothing but labels and statistics is in memory."""

    path: Path
    count: int
    height: int
    width: int
    labels: NDArray[np.int64] | None
    """int64 [count]."""
    classes: list[str] | None
    pixels: NDArray[np.uint8] | Shards | Source | None
    """None (and count, height and width 0) where there are statistics only."""
    statistics: dict[str, tuple[NDArray[Any], NDArray[Any]]]
    """Stored (mean [d], covariance [d, d]) by metric; empty for ordinary images."""
    provenance: dict[str, Any] | None = None
    """What eval.reference wrote about the images behind the statistics."""
    stored_size: tuple[int, int] = (0, 0)
    """(height, width) before ``resize_to``."""
    drawn: dict[str, Any] | None = None
    """How the pictures are drawn, where they are drawn when they are read."""
    together: int = 1
    """So many consecutive pictures are made at once: whoever reads one had better read them all."""

    def check_labels(self, classes: int, where: str, who: str) -> None:
        """Raises UserError for labels beyond ``classes``. where, who: begin its message and say who has the classes."""
        if self.labels is not None and (self.labels.min() < 0 or self.labels.max() >= classes):
            least, most = self.labels.min(), self.labels.max()
            raise UserError(f"{where}: {self.path} has labels {least} to {most}, but {who} {classes} classes")

    def read(self, indices: NDArray[np.int64]) -> NDArray[np.uint8]:
        """uint8 [n, H, W, 3]. Raises UserError for an image that cannot be decoded."""
        assert self.pixels is not None
        if isinstance(self.pixels, Shards):
            stored = load_images(self.pixels, indices.tolist(), self.stored_size[0])
        elif isinstance(self.pixels, np.ndarray):
            stored = np.ascontiguousarray(self.pixels[indices])
            _forget_pages(self.pixels)
        else:
            stored = self.pixels.read(indices)
        return stored if self.stored_size == (self.height, self.width) else resized(stored, self.height)


def _forget_pages(pixels: NDArray[np.uint8]) -> None:
    """What was read of a mapped file counts as this process's memory until it is given back: 10 GB of 50,000 images."""
    mapped = getattr(pixels, "_mmap", None)  # numpy has no public name for it
    if isinstance(mapped, mmap.mmap) and hasattr(mmap, "MADV_DONTNEED"):
        mapped.madvise(mmap.MADV_DONTNEED)


def resized(pixels: NDArray[np.uint8], side: int) -> NDArray[np.uint8]:
    """RESIZED, as LlamaGen scores what it draws at 384 pixels. uint8 [n, H, W, 3] -> uint8 [n, side, side, 3].

    (LlamaGen scales before it rounds to 8 bits; from 8-bit files the last bit may differ.)
    """
    floats = torch.from_numpy(pixels).permute(0, 3, 1, 2).float()
    small = F.interpolate(floats, size=(side, side), mode="bicubic", align_corners=False, antialias=False)
    return small.round().clamp(0, 255).byte().permute(0, 2, 3, 1).contiguous().numpy()


def open_images(
    path: Path, image_size: int | None = None, reference: bool = False, resize_to: int | None = None
) -> ImageSet:
    """Open an .npz (``arr_0`` uint8 [n, H, W, 3], perhaps ``labels`` [n], perhaps STATISTICS), a folder of image
    shards, or a folder or zip of pictures (see PictureFiles).

    image_size: shards and pictures are centre-cropped to it; None: they must have one size.
    reference: whether statistics without images will do.
    resize_to: larger (square) images are read scaled down to so many pixels, see ``resized``.
    Raises UserError: not there, damaged, not images, no one size, impossible statistics.
    """
    if not path.exists():
        raise UserError(f"{path}: no such images; give an .npz file, a folder of image shards, or pictures")
    if path.is_dir() and ((path / MANIFEST).exists() or any(path.glob("*.tar"))):
        images = _open_shards(path, image_size)
    elif path.is_dir() or path.suffix == ".zip":
        files = PictureFiles(path, image_size)
        size = files.height, files.width
        images = ImageSet(path, len(files), *size, None, None, files, {}, stored_size=size)
    else:
        images = _open_npz(path)
    if images.pixels is None and not reference:
        raise UserError(f"{path}: holds statistics but no images (arr_0); it can only be a reference, for FID and sFID")
    return scaled_down(images, resize_to)


def scaled_down(images: ImageSet, resize_to: int | None) -> ImageSet:
    """The same images, read as ``resize_to`` x ``resize_to`` pixels where they have more. Raises UserError."""
    if resize_to is None or max(images.height, images.width) <= resize_to:
        return images
    if images.height != images.width:
        raise UserError(
            f"{images.path}: {images.width} x {images.height} pixels cannot be scaled to {resize_to} x {resize_to}; "
            "resize_to takes square images"
        )
    return replace(images, height=resize_to, width=resize_to)


def first_of(images: ImageSet, count: int) -> ImageSet:
    """The set of its first ``count`` images."""
    return replace(images, count=count, labels=None if images.labels is None else images.labels[:count])


def _open_shards(path: Path, image_size: int | None) -> ImageSet:
    shards = open_shards(path, "images")
    size = image_size or shards.manifest.image_size
    if size is None:
        raise UserError(f"{path}: its images differ in size; set image_size, to which they are centre-cropped")
    labels = None
    if shards.manifest.classes is not None and LABEL_MEMBER in shards.manifest.members:
        labels = shards.labels(np.arange(len(shards)))
    return ImageSet(
        path, len(shards), size, size, labels, shards.manifest.classes, shards, {}, stored_size=(size, size)
    )


def _open_npz(path: Path) -> ImageSet:
    try:
        with zipfile.ZipFile(path) as archive:
            names = {name.removesuffix(".npy") for name in archive.namelist()}
            arrays = {name: _array(path, archive, name) for name in ("labels", PROVENANCE) if name in names}
            if "arr_0" in names:
                arrays["arr_0"] = _array(path, archive, "arr_0", streamed=True)
            statistics = {
                metric: (_array(path, archive, mean), _array(path, archive, covariance))
                for metric, (mean, covariance, _) in STATISTICS.items()
                if mean in names and covariance in names
            }
            about = json.loads(bytes(arrays[PROVENANCE])) if PROVENANCE in arrays else None
            if about is not None and not (isinstance(about["count"], int) and isinstance(about["extractor"], dict)):
                raise ValueError(f"{PROVENANCE} is not what eval.reference writes")
    except _DAMAGE as error:
        raise UserError(f"{path}: cannot be read as an .npz ({error}); make or copy it again") from None
    if "arr_0" not in names and not statistics:
        raise UserError(
            f"{path}: holds {', '.join(sorted(names)) or 'nothing'}, but images are called arr_0 and statistics mu and "
            "sigma (mu_s and sigma_s for sfid)"
        )
    for metric, (mean, covariance) in statistics.items():
        *called, dimensions = STATISTICS[metric]
        try:
            check_statistics(mean, covariance, dimensions, (called[0], called[1]))
        except ValueError as error:
            raise UserError(f"{path}: {error}; make or copy it again") from None
    if "arr_0" not in names:
        return ImageSet(path, 0, 0, 0, None, None, None, statistics, about)
    pixels, labels = arrays["arr_0"], arrays.get("labels")
    if pixels.dtype != np.uint8 or len(pixels.shape) != 4 or pixels.shape[-1] != 3 or 0 in pixels.shape:
        raise UserError(f"{path}: arr_0 is {pixels.dtype} {list(pixels.shape)}, not uint8 [n, height, width, 3]")
    if labels is not None:
        if labels.shape != pixels.shape[:1] or not np.issubdtype(labels.dtype, np.integer):
            raise UserError(f"{path}: labels is {labels.dtype} {list(labels.shape)}, not integers [{len(pixels)}]")
        if labels.max() >= MOST_CLASSES:
            raise UserError(f"{path}: labels holds {labels.max()}, which is no class number (0 to {MOST_CLASSES - 1})")
        labels = np.asarray(labels, np.int64)
    count, height, width, _ = pixels.shape
    return ImageSet(path, count, height, width, labels, None, pixels, statistics, about, (height, width))


_DAMAGE = (
    OSError,
    ValueError,
    KeyError,
    TypeError,
    EOFError,
    RuntimeError,
    struct.error,
    zlib.error,
    zipfile.BadZipFile,
)
"""What the readers of a damaged, cut or encrypted .npz raise."""


_HEADERS = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}


def _array(path: Path, archive: zipfile.ZipFile, name: str, streamed: bool = False) -> Any:
    """One array of the .npz; mapped instead of read where it is not compressed (50,000 images are 10 GB).

    streamed: a compressed array becomes PackedPixels. (In Fortran's order no picture lies in one piece: it is read
    whole, which is said.)
    Raises ValueError for anything but plain numbers, and for a file that ends too early.
    """
    entry = archive.getinfo(f"{name}.npy")
    with archive.open(entry) as member:
        version = npy.read_magic(member)
        if version not in _HEADERS:
            raise ValueError(f"version {version} of the .npy format is unknown")
        shape, fortran, dtype = _HEADERS[version](member)
        order: Literal["F", "C"] = "F" if fortran else "C"
        if dtype.hasobject:
            raise ValueError(f"{name} holds Python objects, which are not read")
        if entry.compress_type != zipfile.ZIP_STORED:
            if streamed and not fortran and shape:
                return PackedPixels(path, entry, Header(shape, dtype, member.tell()))
            if streamed:
                LOG.warning(f"{path}: {name} is read whole, {entry.file_size / 1e9:.2g} GB of memory on every rank")
            return np.frombuffer(member.read(), dtype).reshape(shape, order=order)
        header = member.tell()
    with open(path, "rb") as file:
        file.seek(entry.header_offset + 26)
        name_length, extra_length = struct.unpack("<HH", file.read(4))
    start = entry.header_offset + 30 + name_length + extra_length + header
    return np.memmap(path, dtype, "r", start, shape, order) if np.prod(shape) else np.empty(shape, dtype)


def choose(images: ImageSet, limit: int | None, seed: int) -> NDArray[np.int64]:
    """int64 [n], ascending: which images a comparison takes; all of them for limit None.

    Sets of equal length and labels are cut alike. Raises UserError for fewer images than ``limit``.
    """
    if limit is None:
        return np.arange(images.count)
    if images.count < limit:
        raise UserError(
            f"{images.path}: holds {images.count} images, but limit asks for {limit}; make more or lower limit"
        )
    return balanced(images.labels, images.count, limit, seed)


def balanced(labels: NDArray[np.int64] | None, count: int, limit: int, seed: int) -> NDArray[np.int64]:
    """int64 [min(limit, count)], ascending: numbers below ``count``, taken class by class in turn.

    The classes are as equal as they allow; within a class a hash of (seed, image number) decides.
    """
    if limit >= count:
        return np.arange(count)
    keys = prng.bits(seed, "evaluated-images", torch.arange(count)).numpy()
    classes = labels if labels is not None else np.zeros(count, np.int64)
    by_class = np.lexsort((keys, classes))
    starts = np.r_[0, np.flatnonzero(np.diff(classes[by_class])) + 1]
    lengths = np.diff(np.r_[starts, count])
    turn = np.empty(count, np.int64)  # 0 for the first image of its class, 1 for the second …
    turn[by_class] = np.arange(count) - np.repeat(starts, lengths)
    return np.sort(np.lexsort((keys, turn))[:limit])
