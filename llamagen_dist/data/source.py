"""What packing asks of pictures, wherever they come from."""

import hashlib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

ENDINGS = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")
HIDDEN = "hidden files and folders (such as the ._ files of AppleDouble) passed over"


@dataclass(frozen=True)
class Caption:
    """The (long) caption of one image, and a short one where the source has it."""

    text: str
    short: str | None = None


@dataclass
class Source:
    """Rows of pictures, each with a class label, a caption, both or neither.

    Kept as columns and functions of the row's number: 10^8 pictures are a few arrays, and no object per picture.
    """

    name: str
    fingerprint: str
    """Changes when the images do (for files: when their names or sizes in bytes do), or labels or captions."""
    count: int
    title: Callable[[int], str]
    """How to name a picture to a person; plain UTF-8."""
    picture: Callable[[int], bytes | Image.Image]
    """The encoded file, or RGB where the source holds bare pixels. Raises OSError or ValueError."""
    caption: Callable[[int], Caption] | None = None
    """Of a source with captions. Raises OSError or ValueError where one is missing or not readable."""
    labels: NDArray[np.int64] | None = None
    classes: list[str] | None = None
    class_order: str | None = None
    """What decides the labels, where it is not the text order of the names or a class map."""
    repeats: int = 0
    """Pictures that an earlier row has too, as far as the source can tell."""
    uniform_size: tuple[int, int] | None = None
    """(width, height) where all images are known to share it."""
    notes: Sequence[str] = ()
    """For the log and the manifest; see ``Notes``."""


class Notes:
    """Sentences about a source: what was decided about it, and how much of what kind is not read."""

    def __init__(self, where: str) -> None:
        """where: what to call the source."""
        self.where = where
        self._decided = list[str]()
        self._counts = Counter[str]()
        self._first = dict[str, str]()

    def decided(self, sentence: str) -> None:
        self._decided.append(sentence)

    def skipped(self, kind: str, name: str, count: int = 1) -> None:
        """kind: the sentence from behind the number on. name: one of them; the first of a kind is named."""
        self._counts[kind] += count
        self._first.setdefault(kind, name)

    def sentences(self) -> list[str]:
        counted = [f"{many:,} {kind}, the first is {self._first[kind]}" for kind, many in self._counts.items()]
        return [*self._decided, *(f"{self.where}: {text}" for text in counted)]


def caption_of(record: Mapping[str, Any], key: str | None = None) -> Caption | None:
    """From one JSON object: ``text`` (or ``caption``), and ``short`` where there is one. None: it has no text.

    key: the one to take in place of these two. A list holds captions of one image: its longest becomes the caption, and
    its shortest the short one unless ``short`` names that. Raises ValueError for anything but (lists of) strings.
    """
    key = caption_key(record, key)
    text, short = record.get(key), record.get("short")
    if isinstance(text, list) and text and all(isinstance(one, str) for one in text):
        shortest = min(text, key=len)
        text = max(text, key=len)
        short = shortest if short is None and shortest != text else short
    if text is None or (isinstance(text, str) and not text.strip()):
        return None
    if not isinstance(text, str) or not isinstance(short, str | None):
        raise ValueError(f"{key} and short must be strings ({key} may be a list of some), not {text!r} and {short!r}")
    return Caption(text, short if short and short.strip() else None)


def caption_key(record: Mapping[str, Any], key: str | None) -> str:
    """The key that ``caption_of`` reads the captions from."""
    return key or ("text" if "text" in record or "caption" not in record else "caption")


def fingerprint_of(*parts: object) -> str:
    """sha256 (hex) over text, numbers and arrays."""
    digest = hashlib.sha256()
    for part in parts:
        data = part.tobytes() if isinstance(part, np.ndarray) else str(part).encode(errors="surrogateescape")
        digest.update(len(data).to_bytes(8, "little") + data)
    return digest.hexdigest()
