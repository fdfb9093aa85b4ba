"""What becomes of one picture on its way into a shard: kept as it is, or decoded, fitted and encoded again."""

import io
from dataclasses import dataclass
from typing import Literal

from PIL import Image

from llamagen_dist.config.pack import MOST_PIXELS, PackOptions
from llamagen_dist.data.decode import FRAMES, decode_and_tell
from llamagen_dist.data.images import center_crop

Fit = Literal["crop", "pad"]
_MEMBERS = {"png": ".png", "jpeg": ".jpg", "webp": ".webp"}
_KEPT = {"PNG": ".png", "JPEG": ".jpg", "MPO": ".jpg", "WEBP": ".webp"}
"""Formats that every reader of WebDataset shards decodes. (MPO: a JPEG with further pictures behind the first.)"""


class TooSmall(Exception):
    """The picture's shorter side is below the limit."""


@dataclass(frozen=True)
class ImageRecipe:
    """What becomes of pictures: by ``options``, with what was decided about the whole source.

    Without a format a picture is kept byte for byte where nothing is resized and every reader sees the same pixels in
    it; else it becomes a PNG.
    """

    options: PackOptions
    fit: Fit
    picture_size: tuple[int, int] | None
    """pad: the one (width, height) that all pictures must have."""

    @property
    def members(self) -> tuple[str, ...]:
        """The endings that may come out."""
        if self.options.format is not None:
            return (_MEMBERS[self.options.format],)
        return (".png",) if self.options.size is not None else tuple(sorted(set(_KEPT.values())))

    def stored(self, picture: bytes | Image.Image) -> tuple[str, bytes, list[str]]:
        """(member, encoded bytes, what was done to the pixels beyond decoding and fitting: decode's sentences).

        Raises TooSmall, or one of DECODE_ERRORS where the picture cannot be used.
        """
        image, done = opened(picture, self.options.max_pixels)
        if min(image.size) < self.options.min_side:
            raise TooSmall
        if self.options.size is None:
            # Other readers know nothing of orientations, deep values and white behind glass: where they would see other
            # pixels than ours the file is not kept, but encoded again. (Of several pictures they take the first, too.)
            if isinstance(picture, bytes) and self.options.format is None and not {*done} - {FRAMES}:
                with Image.open(io.BytesIO(picture)) as file:
                    member = _KEPT.get(file.format or "")
                if member is not None:
                    return member, picture, done
            return (*self._encoded(image), done)
        if self.fit == "crop":
            return (*self._encoded(center_crop(image, self.options.size)), done)
        if image.size != self.picture_size:
            raise ValueError(f"{image.width} x {image.height} pixels, where the others are {self.picture_size}")
        canvas = Image.new("RGB", (self.options.size, self.options.size))
        canvas.paste(image, padding(image.size, self.options.size)[:2])
        return (*self._encoded(canvas), done)

    def _encoded(self, image: Image.Image) -> tuple[str, bytes]:
        buffer = io.BytesIO()
        kind = self.options.format or "png"
        image.save(buffer, kind, **({} if kind == "png" else {"quality": self.options.quality}))
        return _MEMBERS[kind], buffer.getvalue()


def opened(picture: bytes | Image.Image, most_pixels: int = MOST_PIXELS) -> tuple[Image.Image, list[str]]:
    """What a source gave, as RGB, and what was done to it. Raises one of DECODE_ERRORS."""
    return (picture, []) if isinstance(picture, Image.Image) else decode_and_tell(picture, most_pixels)


def padding(picture: tuple[int, int], size: int) -> tuple[int, int, int, int]:
    """Zero pixels (left, top, right, bottom) around a (width, height) picture; an odd one goes right or below."""
    left, top = ((size - side) // 2 for side in picture)
    return left, top, size - picture[0] - left, size - picture[1] - top
