"""Images inside uncompressed tars, read where they lie: WebDataset shards, and a tar that holds one tar per class."""

import json
import os
import tarfile
from array import array
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from llamagen_dist.config.pack import PackOptions
from llamagen_dist.console import Progress
from llamagen_dist.data.classes import ClassMap, SampleClasses, first_double, folder_classes, refuse_splits
from llamagen_dist.data.index import entries, printable, scan
from llamagen_dist.data.manifest import MANIFEST, read_manifest
from llamagen_dist.data.shards import CAPTION_MEMBER, IMAGE_MEMBERS, LABEL_MEMBER, SHORT_CAPTION_MEMBER
from llamagen_dist.data.source import ENDINGS, Caption, Source, Tally, caption_key, caption_of, fingerprint_of
from llamagen_dist.errors import UserError

_JSON = ".json"
_PICTURES = (*IMAGE_MEMBERS, *(ending for ending in ENDINGS if ending not in IMAGE_MEMBERS))
"""Of several images in one sample, the first in this order is taken, as reading does."""
_LOOKED_AT = 100  # .json members that are read to learn whether they hold captions, and which keys


class _Spans:
    """Where the parts of each sample lie: (offset, size) in one of the files; (0, 0) = the sample lacks the part."""

    def __init__(self, files: Sequence[Path], file_of: NDArray[np.int32], spans: dict[str, NDArray[np.uint64]]) -> None:
        """file_of: int32 [n]. spans: "image" and the caption members that occur -> uint64 [n, 2]."""
        self.files, self.file_of, self.spans = files, file_of, spans

    def title(self, number: int) -> str:
        path = self.files[self.file_of[number]]
        offset = max((int(spans[number, 0]) for spans in self.spans.values()), default=0)
        with open(path, "rb") as file:
            file.seek(max(offset - tarfile.BLOCKSIZE, 0))
            try:  # the header in front of the data
                header = tarfile.TarInfo.frombuf(file.read(tarfile.BLOCKSIZE), "utf-8", "surrogateescape")
                return f"{path.name}: {printable(header.name)}"
            except tarfile.HeaderError:
                return f"{path.name}: sample {number - int(np.searchsorted(self.file_of, self.file_of[number]))}"

    def has(self, member: str, number: int) -> bool:
        return member in self.spans and self.spans[member][number, 0] != 0

    def read(self, member: str, number: int) -> bytes:
        if not self.has(member, number):
            raise ValueError(f"the sample has no {member}")
        offset, size = (int(value) for value in self.spans[member][number])
        return _read_at(self.files[self.file_of[number]], offset, size)

    def json(self, number: int) -> dict[str, object]:
        """The object in a sample's .json. Raises OSError or ValueError."""
        try:
            record = json.loads(self.read(_JSON, number))
        except RecursionError:
            raise ValueError("the .json is nested too deeply") from None
        return record if isinstance(record, dict) else {}

    def fingerprint(self, labels: NDArray[np.int64] | None, classes: list[str] | None) -> str:
        parts: list[object] = [path.name for path in self.files] + [path.stat().st_size for path in self.files]
        for key in sorted(self.spans):
            parts += [key, self.spans[key]]
        return fingerprint_of(*parts, self.file_of, "" if labels is None else labels, classes)


def _read_at(path: Path, offset: int, size: int) -> bytes:
    with open(path, "rb", buffering=0) as file:
        data = os.pread(file.fileno(), size, offset)
    if len(data) != size:
        raise OSError(f"{path} ends inside this sample")
    return data


def webdataset(name: str, paths: Sequence[Path], class_map: ClassMap | None, options: PackOptions) -> Source:
    """Shards of any program: an image per sample, ``.cls`` (a number or a name), captions in ``.txt`` or ``.json``.

    Shards of our own keep their class names. Raises UserError as ``scan`` does, without images, or where some samples
    have a class and others do not.
    """
    passed, indexes = Tally(), []
    with Progress(f"reading the headers of {Path(name).name}", len(paths)) as progress:
        for path in paths:
            indexes.append(scan(path))
            progress.advance(1, path.name)
    present = {member for index in indexes for member in index.members}
    pictures = [member for member in _PICTURES if member in present]
    if not pictures:
        raise UserError(
            f"{name}: no images in these tars (found {', '.join(sorted(present))}; wanted {', '.join(ENDINGS)})"
        )
    kept = [member for member in (CAPTION_MEMBER, SHORT_CAPTION_MEMBER, _JSON, LABEL_MEMBER) if member in present]
    file_of, columns = array("i"), dict[str, list[NDArray[np.uint64]]]()
    for number, (path, index) in enumerate(zip(paths, indexes, strict=True)):
        file_of.extend([number] * len(index.spans))
        spans = {member: index.spans[:, column] for column, member in enumerate(index.members)}
        absent = np.zeros((len(index.spans), 2), np.uint64)
        image, several = absent.copy(), np.zeros(len(absent), np.int64)
        for member in reversed(pictures):
            column = spans.get(member, absent)
            image = np.where(column[:, :1] != 0, column, image)
            several += column[:, 0] != 0
        columns.setdefault("image", []).append(image)
        for member in kept:
            columns.setdefault(member, []).append(spans.get(member, absent))
        if extra := int((several > 1).sum()):
            kind = f"samples with several images, of which only one is read (in the order {', '.join(pictures)})"
            passed.add(kind, f"sample {int(np.argmax(several > 1))} of {path.name}", extra)
        for member in sorted({*index.members} - {*pictures, *kept}):
            many = int((spans[member][:, 0] != 0).sum())
            passed.add(f"members {printable(member)} not read", f"in {path.name}", many)
        for ignored in index.ignored:
            passed.add(
                "files that are no part of a sample (hidden, or without an ending) passed over", printable(ignored)
            )
    joined = {key: np.concatenate(parts) for key, parts in columns.items()}
    joined_labels = joined.pop(LABEL_MEMBER, None)
    samples = _Spans(paths, np.array(file_of, np.int32), joined)
    json_captions = _look_at_json(name, samples, options, passed)
    labels, classes, notes = _classes(name, samples, joined_labels, class_map, options)
    if _JSON in joined and not json_captions:
        del joined[_JSON]  # the .json of these shards holds something else
    return Source(
        name,
        samples.fingerprint(labels, classes),
        len(file_of),
        samples.title,
        lambda number: samples.read("image", number),
        (lambda number: _caption(samples, number, options)) if len(samples.spans) > 1 else None,
        labels,
        classes,
        notes=[*notes, *passed.notes(name)],
    )


def _look_at_json(name: str, samples: _Spans, options: PackOptions, passed: Tally) -> bool:
    """Whether captions may come from .json members; names those of their keys that are not read."""
    if _JSON not in samples.spans:
        return False
    rows = np.nonzero(samples.spans[_JSON][:, 0])[0]
    holds_captions, unread = CAPTION_MEMBER in samples.spans, set[str]()
    for number in rows[:_LOOKED_AT]:
        try:
            record = samples.json(int(number))
            caption = caption_of(record, options.caption_key)
        except (OSError, ValueError):
            continue  # it is named when its turn comes
        holds_captions |= caption is not None
        used = {options.class_key} if caption is None else {options.class_key, caption_key(record, options.caption_key)}
        unread |= {*record} - used - {"short"}
    if unread:
        keys = ", ".join(repr(printable(key)) for key in sorted(unread))
        passed.add(f".json members whose keys {keys} are not read (--caption-key chooses)", "in sample 0", len(rows))
    if not holds_captions and options.caption_key is not None:
        raise UserError(
            f"--caption-key {options.caption_key}: no .json of {name} that was looked at has such a caption"
        )
    return holds_captions


def _classes(
    name: str,
    samples: _Spans,
    spans: NDArray[np.uint64] | None,
    class_map: ClassMap | None,
    options: PackOptions,
) -> tuple[NDArray[np.int64] | None, list[str] | None, list[str]]:
    """(labels, class names, notes) from ``.cls`` (spans: uint64 [n, 2]), or from the class key of ``.json``."""
    collected = SampleClasses(name, class_map)
    if options.class_key is not None and spans is not None:
        collected.notes.append(
            f"{name}: classes come from the key {options.class_key!r} of .json, not from {LABEL_MEMBER}"
        )
    firsts = np.searchsorted(samples.file_of, np.arange(len(samples.files)))
    for number, file in enumerate(samples.file_of):
        path = samples.files[file]
        at = f"sample {number - int(firsts[file])} of {path.name}"
        value: object = None
        try:
            if options.class_key is not None:
                value = samples.json(number).get(options.class_key) if samples.has(_JSON, number) else None
            elif spans is not None and spans[number, 0]:
                value = _read_at(path, int(spans[number, 0]), min(int(spans[number, 1]), 1024)).decode("utf-8")
        except (OSError, ValueError) as error:
            part = LABEL_MEMBER if options.class_key is None else _JSON
            raise UserError(f"{path}: {at}: {part} cannot be read ({error})") from None
        collected.add(value, at)
    labels, classes = collected.finish()
    if labels is None and options.class_key is not None:
        raise UserError(f"--class-key {options.class_key}: no .json of {name} has that key")
    folder = samples.files[0].parent
    if labels is not None and class_map is None and options.class_key is None and (folder / MANIFEST).exists():
        named = read_manifest(folder).classes
        if named is not None and len(named) >= len(classes or []):
            classes = named
    return labels, classes, collected.notes


def _caption(samples: _Spans, number: int, options: PackOptions) -> Caption:
    """From ``.txt`` and ``.short.txt``, else from ``.json``. Raises OSError or ValueError."""
    from_json = options.caption_key is not None or not samples.has(CAPTION_MEMBER, number)
    if from_json and samples.has(_JSON, number):
        caption = caption_of(samples.json(number), options.caption_key)
    else:
        short = SHORT_CAPTION_MEMBER
        caption = caption_of(
            {
                "text": samples.read(CAPTION_MEMBER, number).decode("utf-8"),
                "short": samples.read(short, number).decode("utf-8") if samples.has(short, number) else None,
            }
        )
    if caption is None:
        raise ValueError("the caption is missing or empty")
    return caption


def holds_tars(path: Path) -> bool:
    """Whether the first file in a tar is a tar itself, hidden ones aside. Raises UserError as ``entries`` does."""
    files = (os.path.basename(item.name) for item in entries(path))
    first = next((name for name in files if not name.startswith(".")), "")
    return first.lower().endswith(".tar")


def class_tars(path: Path, class_map: ClassMap | None) -> Source:
    """A tar of tars, one per class and named after it (ImageNet's training set), read without unpacking.

    Raises UserError as ``entries`` does, for a class twice or without images.
    """
    passed, inner, names = Tally(), list[tarfile.TarInfo](), list[str]()
    for item in entries(path):
        name = os.path.basename(item.name)
        if name.lower().endswith(".tar") and not name.startswith("."):
            inner.append(item)
            names.append(name[: -len(".tar")])
        else:
            passed.add("files that are no tars of a class passed over", printable(item.name))
    if twice := first_double(names):
        raise UserError(f"{path}: holds the class {twice!r} twice; every class may have one tar")
    if class_map is None:
        refuse_splits(names, str(path), "them one by one, unpacked")
    order = folder_classes(names, class_map, str(path))
    spans, labels = array("Q"), array("q")
    with Progress(f"reading the headers of {path.name}", len(inner)) as progress:
        for name, item in zip(names, inner, strict=True):
            before = len(labels)
            for image in entries(path, item.offset_data, item.offset_data + item.size):
                hidden = os.path.basename(image.name).startswith(".")
                if image.name.lower().endswith(ENDINGS) and not hidden:
                    spans.extend((image.offset_data, image.size))
                    labels.append(order.label_of[name])
                else:
                    kind = "hidden files (such as AppleDouble's ._ files)" if hidden else "files that are no images"
                    passed.add(f"{kind} passed over", f"{name}.tar: {printable(image.name)}")
            if len(labels) == before:
                raise UserError(f"{path}: {item.name}: no images in the tar of this class; leave it out")
            progress.advance(1, name)
    pairs = {"image": np.array(spans, np.uint64).reshape(-1, 2)}
    samples = _Spans([path], np.zeros(len(labels), np.int32), pairs)
    numbers = np.array(labels, np.int64)
    return Source(
        str(path),
        samples.fingerprint(numbers, order.names),
        len(labels),
        samples.title,
        lambda number: samples.read("image", number),
        labels=numbers,
        classes=order.names,
        class_order=order.order,
        notes=[*order.notes, *passed.notes(str(path))],
    )
