"""What becomes of one picture on its way into a shard: kept as it is, or decoded, fitted and encoded again."""

import io
from dataclasses import dataclass
from typing import Literal

from PIL import Image

from llamagen_dist.data.images import MOST_PIXELS, center_crop, decode

Fit = Literal["crop", "pad"]
Format = Literal["png", "jpeg", "webp"]
_MEMBERS = {"png": ".png", "jpeg": ".jpg", "webp": ".webp"}
_KEPT = {"PNG": ".png", "JPEG": ".jpg", "MPO": ".jpg", "WEBP": ".webp"}
"""Formats that every reader of WebDataset shards decodes. (MPO: a JPEG with further pictures behind the first.)"""


class TooSmall(Exception):
    """The picture's shorter side is below the limit."""


@dataclass(frozen=True)
class ImageRecipe:
    """size: side in pixels, None = pictures stay as they are. format: None = kept byte for byte where nothing is
    resized (and nothing is transparent), PNG elsewhere. quality: of JPEG and WebP, 1 … 100. min_side: the least shorter
    side. Transparent parts become white.
    """

    size: int | None
    fit: Fit
    picture_size: tuple[int, int] | None
    """pad: the one (width, height) that all pictures must have."""
    format: Format | None = None
    quality: int = 95
    min_side: int = 0
    most_pixels: int = MOST_PIXELS

    @property
    def members(self) -> tuple[str, ...]:
        """The endings that may come out."""
        if self.format is not None:
            return (_MEMBERS[self.format],)
        return (".png",) if self.size is not None else tuple(sorted(set(_KEPT.values())))

    def stored(self, picture: bytes | Image.Image) -> tuple[str, bytes]:
        """(member, encoded bytes). Raises TooSmall, or one of images.DECODE_ERRORS where it cannot be used."""
        image = opened(picture, self.most_pixels)
        if min(image.size) < self.min_side:
            raise TooSmall
        if self.size is None:
            member = None if self.format is not None or isinstance(picture, Image.Image) else _kept(picture)
            return (member, picture) if member and isinstance(picture, bytes) else self._encoded(image)
        if self.fit == "crop":
            return self._encoded(center_crop(image, self.size))
        if image.size != self.picture_size:
            raise ValueError(f"{image.width} x {image.height} pixels, where the others are {self.picture_size}")
        canvas = Image.new("RGB", (self.size, self.size))
        canvas.paste(image, padding(image.size, self.size)[:2])
        return self._encoded(canvas)

    def _encoded(self, image: Image.Image) -> tuple[str, bytes]:
        buffer = io.BytesIO()
        kind = self.format or "png"
        image.save(buffer, kind, **({} if kind == "png" else {"quality": self.quality}))
        return _MEMBERS[kind], buffer.getvalue()


def opened(picture: bytes | Image.Image, most_pixels: int = MOST_PIXELS) -> Image.Image:
    """What a source gave, as RGB. Raises one of images.DECODE_ERRORS."""
    return picture if isinstance(picture, Image.Image) else decode(picture, most_pixels)


def _kept(data: bytes) -> str | None:
    """The member that holds these bytes as they are; None where readers would not agree on the pixels."""
    with Image.open(io.BytesIO(data)) as image:
        return None if image.has_transparency_data else _KEPT.get(image.format or "")


def padding(picture: tuple[int, int], size: int) -> tuple[int, int, int, int]:
    """Zero pixels (left, top, right, bottom) around a (width, height) picture; an odd one goes right or
    below.
    """
    left, top = ((size - side) // 2 for side in picture)
    return left, top, size - picture[0] - left, size - picture[1] - top
