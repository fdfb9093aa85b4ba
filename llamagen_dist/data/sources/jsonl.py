"""A .jsonl file: one JSON object a line, ``{"image_path": …, "text": …}``."""

import json
import os
from array import array
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llamagen_dist.data.index import printable
from llamagen_dist.data.sources.classes import ClassMap, SampleClasses
from llamagen_dist.data.sources.source import Caption, caption_of, fingerprint_of
from llamagen_dist.errors import UserError
from llamagen_dist.files import sha256_file


class JsonlSource:
    """Keys of a line: ``image_path`` (relative paths count from the file's folder), ``text`` and ``short`` (see
    ``caption_of``), ``class`` (a number or a name). Empty lines are passed over.

    Only where the lines begin is kept in memory; they are read again when their turn comes. Raises UserError, naming
    the line: not JSON or UTF-8, not an object, a key twice, no image_path, captions or classes of another type.
    """

    uniform_size: tuple[int, int] | None = None

    def __init__(self, path: Path, class_map: ClassMap | None = None) -> None:
        self.name, self._path, self.captioned = str(path), path, False
        lines, starts, sizes, found = array("q"), array("q"), array("q"), SampleClasses(str(path), class_map)
        pictures, place = array("q"), 0
        try:
            with open(path, "rb") as file:
                for number, line in enumerate(file, 1):
                    if line.strip():
                        record, caption = _parsed(path, number, line)
                        self.captioned |= caption is not None
                        found.add(record.get("class"), f"line {number}")
                        lines.append(number)
                        pictures.append(hash(record["image_path"]))
                        starts.append(place)
                        sizes.append(_size(path.parent / record["image_path"]))
                    place += len(line)
        except OSError as error:
            raise UserError(f"{path}: cannot be read ({error.strerror})") from None
        if not lines:
            raise UserError(f'{path}: no images found; write one JSON object a line, with "image_path" and "text"')
        self._lines, self._starts = np.array(lines), np.array(starts)
        self.repeats = len(pictures) - len(np.unique(np.array(pictures)))
        labels, classes = found.finish()
        self.labels: NDArray[np.int64] | None = labels
        self.classes: list[str] | None = classes
        self.fingerprint = fingerprint_of(sha256_file(path), np.array(sizes))

    def __len__(self) -> int:
        return len(self._starts)

    def title(self, number: int) -> str:
        return f"line {self._lines[number]} ({printable(self._record(number)[0]['image_path'])})"

    def picture(self, number: int) -> bytes:
        return (self._path.parent / self._record(number)[0]["image_path"]).read_bytes()

    def caption(self, number: int) -> Caption:
        caption = self._record(number)[1]
        if caption is None:
            raise ValueError('the caption is missing ("text" is absent or empty)')
        return caption

    def _record(self, number: int) -> tuple[dict[str, Any], Caption | None]:
        with open(self._path, "rb") as file:
            file.seek(int(self._starts[number]))
            return _parsed(self._path, int(self._lines[number]), file.readline())


def _size(path: Path) -> int:
    try:
        return os.path.getsize(path)
    except OSError:
        return -1  # it is named with the other unreadable images when its turn comes


def _parsed(path: Path, number: int, line: bytes) -> tuple[dict[str, Any], Caption | None]:
    try:
        record = json.loads(line.decode("utf-8"), object_pairs_hook=_without_doubles)
        if not isinstance(record, dict):
            raise ValueError("not a JSON object")
        image = record.get("image_path")
        if not isinstance(image, str) or not image or "\0" in image:
            raise ValueError(f'"image_path" must be the path of an image, not {image!r}')
        if b"\\u" in line:
            json.dumps(record, ensure_ascii=False).encode()  # half a surrogate pair can be written, but is no text
        return record, caption_of(record)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: line {number}: {error}; correct or delete that line") from None


def _without_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    record = dict(pairs)
    if len(record) != len(pairs):
        raise ValueError("a key comes twice")
    return record
