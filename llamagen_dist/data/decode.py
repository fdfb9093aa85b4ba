"""The one way from an encoded picture to RGB with 8 bits: upright, on white, by rules that are all reported."""

import io
import struct
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFile

from llamagen_dist.config.pack import MOST_PIXELS

DECODE_ERRORS = (OSError, ValueError, SyntaxError, EOFError, Image.DecompressionBombError)
"""What PIL raises for a file that is not a whole, plausible image."""

TURNED = "turned upright, as the EXIF orientation says"
WHITE = "with an alpha channel, laid on white"
FRAMES = "with several pictures in one file, of which the first is taken"
UPPER_BITS = "with 16 bits per value, of which the upper 8 are kept"
FLOATS = "with floating-point values from 0 to 1, multiplied by 255"
AS_BYTES = "with 32-bit or floating-point values up to 255, rounded to 8 bits"
AS_WORDS = "with 32-bit or floating-point values up to 65,535, of whose 16 bits the upper 8 are kept"
AS_LONGS = "with 32-bit values, of which the upper 8 bits are kept"

_ORIENTATION = 0x0112
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def decode(data: bytes, most_pixels: int = MOST_PIXELS, formats: tuple[str, ...] | None = None) -> Image.Image:
    """Encoded bytes -> a loaded RGB image; see ``decode_and_tell``."""
    return decode_and_tell(data, most_pixels, formats)[0]


def decode_and_tell(
    data: bytes, most_pixels: int = MOST_PIXELS, formats: tuple[str, ...] | None = None
) -> tuple[Image.Image, list[str]]:
    """Encoded bytes -> (a loaded RGB image, what was done to it beyond decoding: the sentences above).

    data: a whole file. most_pixels: a larger picture is refused before it is unpacked. formats: the only ones that are
    taken, by PIL's names; None: all. Raises one of DECODE_ERRORS, also for values that no rule brings to 8 bits.
    """
    done: list[str] = []
    with Image.open(io.BytesIO(data), formats=formats) as image:
        if image.width * image.height > most_pixels:
            raise ValueError(f"{image.width} x {image.height} pixels, more than the limit of {most_pixels:,}")
        if _pictures(image) > 1:
            done.append(FRAMES)
        # How the values lie in the file: PIL itself cuts 16-bit colours to 8 bits and forgets that it did.
        layout = str(image.tile[0].args) if image.tile else ""
        deep = ";16" in layout or ";16" in image.mode or _largest_of_ppm(image) > 255
        turned_by_pil = image.format == "TIFF" and _orientation(image) in _UPRIGHT
        image.load()  # before the EXIF data are asked for: some formats hold them behind the pixels
        upright = _UPRIGHT.get(_orientation(image))
        shallow = _to_8_bits(image, deep, layout, done)
        if deep and shallow is image:
            done.append(UPPER_BITS)
            if np.max(image.info.get("transparency", 0)) > 255:
                raise ValueError("16-bit colours of which one is transparent; convert the picture to 8 bits")
        if shallow.has_transparency_data:
            white = Image.new("RGBA", shallow.size, "white")
            shallow = Image.alpha_composite(white, shallow.convert("RGBA"))
            done.append(WHITE)
        rgb = shallow.convert("RGB")
        if upright is not None:
            rgb = rgb.transpose(upright)
        if upright is not None or turned_by_pil:
            done.append(TURNED)
        return rgb, done


def _pictures(image: Image.Image) -> int:
    try:
        return int(getattr(image, "n_frames", 1))
    except DECODE_ERRORS:
        return 1  # what lies behind the first picture is damaged, and not needed


def _largest_of_ppm(image: ImageFile.ImageFile) -> int:
    """The largest value that a PPM or PGM file declares, to which PIL scales; 0 for other files."""
    if not image.tile or image.tile[0].codec_name not in ("ppm", "ppm_plain"):
        return 0
    return max((value for value in image.tile[0].args or () if isinstance(value, int)), default=0)


def _orientation(image: Image.Image) -> int:
    """The EXIF orientation, 1 where there is none. Data that cannot be read count as none, as for every viewer."""
    try:
        return int(image.getexif().get(_ORIENTATION, 1))
    except (*DECODE_ERRORS, struct.error, KeyError, TypeError, IndexError, OverflowError):
        return 1


def _to_8_bits(image: Image.Image, deep: bool, layout: str, done: list[str]) -> Image.Image:
    """Grey values of more than 8 bits -> 8 bits; every other image is returned as it is.

    Known to have 16 bits: the upper 8 of them. 32-bit integers and floats do not say which value is white: the least
    of 1 (floats only), 255, 65,535 and (integers only) 2^32 - 1 that none exceeds is taken for it. Refused (ValueError)
    where that would be a guess: negative or non-finite values, and floats that exceed such a limit, but not twofold.
    PIL's own conversion clips at 255: it would make 16-bit pictures white and floats from 0 to 1 black.
    """
    if not image.mode.startswith(("I", "F")):
        return image
    values: NDArray[Any] = np.asarray(image)
    if image.mode == "I" and ";32" in layout and "S" not in layout:
        values = values.view(np.uint32)  # PIL reads unsigned numbers as signed ones
    low, high = float(values.min()), float(values.max())
    if not (np.isfinite(low) and np.isfinite(high)) or low < 0:
        raise ValueError(f"values from {low:g} to {high:g}, which cannot be brought to 8 bits; convert the picture")
    if image.mode == "F":
        limits = ((1, FLOATS), (255, AS_BYTES), (65535, AS_WORDS))
        white, rule = next((limit for limit in limits if high <= limit[0]), (0, ""))
        if not white or any(limit < high < 2 * limit for limit, _ in limits):
            raise ValueError(f"floating-point values up to {high:g}, of which none says what is white; convert it")
    elif deep:
        white, rule = 65535, UPPER_BITS
    else:
        white, rule = next(
            limit for limit in ((255, AS_BYTES), (65535, AS_WORDS), (2**32 - 1, AS_LONGS)) if high <= limit[0]
        )
    if white > 255:
        bytes_ = (values / ((white + 1) // 256)).astype(np.uint8)
    else:
        bytes_ = np.rint(values * (255 / white)).astype(np.uint8)
    if getattr(image, "tag_v2", {}).get(262) == 0:  # a TIFF whose 0 is white, which PIL heeds for 8 bits only
        bytes_ = 255 - bytes_
    done.append(rule)
    key = image.info.get("transparency")
    if isinstance(key, int):
        bytes_ = np.where(values == key, np.uint8(255), bytes_)
        done.append(WHITE)
    return Image.fromarray(bytes_)
