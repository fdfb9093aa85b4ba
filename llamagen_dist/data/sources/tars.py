"""Images inside uncompressed tars, read where they lie: WebDataset shards, and a tar that holds one tar per class."""

import json
import os
import tarfile
from array import array
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from llamagen_dist.console import Progress
from llamagen_dist.data.index import entries, printable, scan
from llamagen_dist.data.manifest import MANIFEST, read_manifest
from llamagen_dist.data.shards import CAPTION_MEMBER, IMAGE_MEMBERS, LABEL_MEMBER, SHORT_CAPTION_MEMBER
from llamagen_dist.data.sources.classes import ClassMap, SampleClasses, first_double, folder_classes
from llamagen_dist.data.sources.source import ENDINGS, Caption, caption_of, fingerprint_of
from llamagen_dist.errors import UserError

_JSON = ".json"
_PICTURES = (*IMAGE_MEMBERS, *(ending for ending in ENDINGS if ending not in IMAGE_MEMBERS))
"""Of several images in one sample, the first in this order is taken, as reading does."""


class TarSource:
    """Samples as spans (offset, size) of files; (0, 0) = the sample lacks the part."""

    uniform_size: tuple[int, int] | None = None
    repeats = 0

    def __init__(
        self,
        name: str,
        files: Sequence[Path],
        file_of: NDArray[np.int32],
        spans: dict[str, NDArray[np.uint64]],
        labels: NDArray[np.int64] | None,
        classes: list[str] | None,
    ) -> None:
        """file_of: int32 [n]. spans: "image" and the caption members that occur -> uint64 [n, 2]."""
        self.name, self._files, self._file_of, self._spans = name, files, file_of, spans
        self.labels, self.classes = labels, classes
        self.captioned = len(spans) > 1
        parts: list[object] = [path.name for path in files] + [path.stat().st_size for path in files]
        for key in sorted(spans):
            parts += [key, spans[key]]
        self.fingerprint = fingerprint_of(*parts, file_of, "" if labels is None else labels, classes)

    def __len__(self) -> int:
        return len(self._file_of)

    def title(self, number: int) -> str:
        path = self._files[self._file_of[number]]
        offset = max((int(spans[number, 0]) for spans in self._spans.values()), default=0)
        with open(path, "rb") as file:
            file.seek(max(offset - tarfile.BLOCKSIZE, 0))
            try:  # the header in front of the data
                header = tarfile.TarInfo.frombuf(file.read(tarfile.BLOCKSIZE), "utf-8", "surrogateescape")
                return f"{path.name}: {printable(header.name)}"
            except tarfile.HeaderError:
                return f"{path.name}: sample {number - int(np.searchsorted(self._file_of, self._file_of[number]))}"

    def picture(self, number: int) -> bytes:
        return self._read("image", number)

    def caption(self, number: int) -> Caption:
        """From ``.txt`` and ``.short.txt``, else from ``.json``."""
        if not self._has(CAPTION_MEMBER, number) and self._has(_JSON, number):
            found = _json_caption(self._read(_JSON, number))
        else:
            text = self._read(CAPTION_MEMBER, number).decode("utf-8")
            short = SHORT_CAPTION_MEMBER
            found = caption_of(
                {"text": text, "short": self._read(short, number).decode("utf-8") if self._has(short, number) else None}
            )
        if found is None:
            raise ValueError("the caption is missing or empty")
        return found

    def _has(self, member: str, number: int) -> bool:
        return member in self._spans and self._spans[member][number, 0] != 0

    def _read(self, member: str, number: int) -> bytes:
        if not self._has(member, number):
            raise ValueError(f"the sample has no {member}")
        offset, size = (int(value) for value in self._spans[member][number])
        return _read_at(self._files[self._file_of[number]], offset, size)


def _read_at(path: Path, offset: int, size: int) -> bytes:
    with open(path, "rb", buffering=0) as file:
        data = os.pread(file.fileno(), size, offset)
    if len(data) != size:
        raise OSError(f"{path} ends inside this sample")
    return data


def webdataset(name: str, paths: Sequence[Path], class_map: ClassMap | None) -> TarSource:
    """Shards of any program: an image per sample, ``.cls`` (a number or a name), captions in ``.txt`` or ``.json``.

    Shards of our own keep their class names. Raises UserError as ``scan`` does, without images, or where some samples
    have a class and others do not.
    """
    classes_found = SampleClasses(name, class_map)
    file_of, columns = array("i"), dict[str, list[NDArray[np.uint64]]]()
    indexes = []
    with Progress(f"reading the headers of {Path(name).name}", len(paths)) as progress:
        for path in paths:
            indexes.append(scan(path))
            progress.advance(1, path.name)
    found = {member for index in indexes for member in index.members}
    pictures = [member for member in _PICTURES if member in found]
    if not pictures:
        raise UserError(
            f"{name}: no images in these tars (found {', '.join(sorted(found))}; wanted {', '.join(ENDINGS)})"
        )
    kept = [member for member in (CAPTION_MEMBER, SHORT_CAPTION_MEMBER, _JSON) if member in found]
    for number, (path, index) in enumerate(zip(paths, indexes, strict=True)):
        file_of.extend([number] * len(index.spans))
        spans = {member: index.spans[:, column] for column, member in enumerate(index.members)}
        absent = np.zeros((len(index.spans), 2), np.uint64)
        image = absent.copy()
        for member in reversed(pictures):
            column = spans.get(member, absent)
            image = np.where(column[:, :1] != 0, column, image)
        columns.setdefault("image", []).append(image)
        for member in kept:
            columns.setdefault(member, []).append(spans.get(member, absent))
        for row, (offset, size) in enumerate(spans.get(LABEL_MEMBER, absent)):
            at = f"sample {row} of {path.name}"
            classes_found.add(_class_text(path, int(offset), int(size), at) if offset else None, at)
    labels, classes = classes_found.finish()
    folder = paths[0].parent
    if labels is not None and class_map is None and (folder / MANIFEST).exists():
        named = read_manifest(folder).classes
        if named is not None and len(named) >= len(classes or []):
            classes = named
    joined = {key: np.concatenate(parts) for key, parts in columns.items()}
    if _JSON in joined and CAPTION_MEMBER not in joined and not _any_caption(paths, file_of, joined[_JSON]):
        del joined[_JSON]  # the .json of these shards holds something else
    return TarSource(name, paths, np.array(file_of, np.int32), joined, labels, classes)


def _class_text(path: Path, offset: int, size: int, at: str) -> str:
    try:
        return _read_at(path, offset, min(size, 1024)).decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: {at}: {LABEL_MEMBER} cannot be read ({error})") from None


def _json_caption(data: bytes) -> Caption | None:
    try:
        record = json.loads(data)
    except RecursionError:
        raise ValueError("the .json is nested too deeply") from None
    return caption_of(record) if isinstance(record, dict) else None


def _any_caption(paths: Sequence[Path], file_of: Sequence[int], spans: NDArray[np.uint64]) -> bool:
    """Whether one of the first hundred .json members holds a caption."""
    for number in np.nonzero(spans[:, 0])[0][:100]:
        try:
            if (
                _json_caption(_read_at(paths[file_of[number]], int(spans[number, 0]), int(spans[number, 1])))
                is not None
            ):
                return True
        except (OSError, ValueError):
            continue  # it is named when its turn comes
    return False


def holds_tars(path: Path) -> bool:
    """Whether the first file in a tar is a tar itself. Raises UserError as ``entries`` does."""
    return any(item.name.lower().endswith(".tar") for item in [next(entries(path), None)] if item)


def class_tars(path: Path, class_map: ClassMap | None) -> TarSource:
    """A tar of tars, one per class and named after it (ImageNet's training set), read without unpacking.

    Raises UserError as ``entries`` does, for a class twice or without images.
    """
    inner = [item for item in entries(path) if item.name.lower().endswith(".tar")]
    names = [os.path.basename(item.name)[: -len(".tar")] for item in inner]
    if twice := first_double(names):
        raise UserError(f"{path}: holds the class {twice!r} twice; every class may have one tar")
    label_of, classes = folder_classes(names, class_map, str(path))
    spans, labels = array("Q"), array("q")
    with Progress(f"reading the headers of {path.name}", len(inner)) as progress:
        for name, item in zip(names, inner, strict=True):
            before = len(labels)
            for image in entries(path, item.offset_data, item.offset_data + item.size):
                if image.name.lower().endswith(ENDINGS):
                    spans.extend((image.offset_data, image.size))
                    labels.append(label_of[name])
            if len(labels) == before:
                raise UserError(f"{path}: {item.name}: no images in the tar of this class; leave it out")
            progress.advance(1, name)
    pairs = {"image": np.array(spans, np.uint64).reshape(-1, 2)}
    return TarSource(str(path), [path], np.zeros(len(labels), np.int32), pairs, np.array(labels, np.int64), classes)
