"""What packing asks of a source of images."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image

ENDINGS = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")


@dataclass(frozen=True)
class Caption:
    """The (long) caption of one image, and a short one where the source has it."""

    text: str
    short: str | None = None


class Source(Protocol):
    """Images by number, each with a class label, a caption, both or neither."""

    name: str
    fingerprint: str
    """Changes when the images do (for files: when their names or sizes in bytes do), or labels or captions."""
    classes: list[str] | None
    labels: NDArray[np.int64] | None
    captioned: bool
    repeats: int
    """Samples whose picture another sample has too, as far as the source can tell."""
    uniform_size: tuple[int, int] | None
    """(width, height) where all images are known to share it."""

    def __len__(self) -> int: ...

    def title(self, number: int) -> str:
        """How to name image ``number`` to a person; plain UTF-8."""
        ...

    def picture(self, number: int) -> bytes | Image.Image:
        """The encoded file, or RGB where the source holds bare pixels. Raises OSError or ValueError."""
        ...

    def caption(self, number: int) -> Caption:
        """Of a captioned source. Raises OSError or ValueError where it is missing or not readable."""
        ...


def caption_of(record: Mapping[str, Any]) -> Caption | None:
    """From one JSON object: ``text`` (or ``caption``), and ``short`` where there is one. None: it has no text.

    A list holds captions of one image: its longest becomes the caption, and its shortest the short one unless ``short``
    names that. Raises ValueError for anything but (lists of) strings.
    """
    text, short = record.get("text", record.get("caption")), record.get("short")
    if isinstance(text, list) and text and all(isinstance(one, str) for one in text):
        shortest = min(text, key=len)
        text = max(text, key=len)
        short = shortest if short is None and shortest != text else short
    if text is None or (isinstance(text, str) and not text.strip()):
        return None
    if not isinstance(text, str) or not isinstance(short, str | None):
        raise ValueError(f"text and short must be strings (text may be a list of some), not {text!r} and {short!r}")
    return Caption(text, short if short and short.strip() else None)


def fingerprint_of(*parts: object) -> str:
    """sha256 (hex) over text, numbers and arrays."""
    digest = hashlib.sha256()
    for part in parts:
        data = part.tobytes() if isinstance(part, np.ndarray) else str(part).encode(errors="surrogateescape")
        digest.update(len(data).to_bytes(8, "little") + data)
    return digest.hexdigest()
