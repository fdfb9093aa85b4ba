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
from llamagen_dist.data.source import ENDINGS, HIDDEN, Caption, Notes, Source, caption_key, caption_of, fingerprint_of
from llamagen_dist.errors import UserError

_IMAGE = "image"  # the column of the picture, whichever its ending
_JSON = ".json"
_PICTURES = (*IMAGE_MEMBERS, *(ending for ending in ENDINGS if ending not in IMAGE_MEMBERS))
"""Of several images in one sample, the first in this order is taken, as reading does."""
_LOOKED_AT = 100  # .json members that are read to learn whether they hold captions, and which keys
_LONGEST_CLASS = 1024  # bytes of a .cls that are read

Spans = NDArray[np.uint64]


class _Samples:
    """Samples by number, in one or several tars."""

    def __init__(self, files: Sequence[Path], file_of: NDArray[np.int32], spans: dict[str, Spans]) -> None:
        """
        file_of: int32 [n], which of the files a sample lies in; ascending.
        spans: member (or "image") -> uint64 [n, 2] of (offset, size); (0, 0) where the sample lacks it.
        """
        self.files, self.file_of, self.spans = files, file_of, spans

    def at(self, number: int) -> str:
        file = self.file_of[number]
        return f"sample {number - int(np.searchsorted(self.file_of, file))} of {self.files[file].name}"

    def title(self, number: int) -> str:
        path = self.files[self.file_of[number]]
        offset = max(int(spans[number, 0]) for member, spans in self.spans.items() if member != LABEL_MEMBER)
        with open(path, "rb") as file:
            file.seek(max(offset - tarfile.BLOCKSIZE, 0))
            try:  # the header in front of the data
                header = tarfile.TarInfo.frombuf(file.read(tarfile.BLOCKSIZE), "utf-8", "surrogateescape")
                return f"{path.name}: {printable(header.name)}"
            except tarfile.HeaderError:
                return self.at(number)

    def has(self, member: str, number: int) -> bool:
        return member in self.spans and self.spans[member][number, 0] != 0

    def read(self, member: str, number: int, most: int | None = None) -> bytes:
        """The (first ``most``) bytes of a member. Raises OSError, or ValueError where the sample lacks it."""
        if not self.has(member, number):
            raise ValueError(f"the sample has no {member}")
        offset, size = (int(value) for value in self.spans[member][number])
        size = size if most is None else min(size, most)
        path = self.files[self.file_of[number]]
        with open(path, "rb", buffering=0) as file:
            data = os.pread(file.fileno(), size, offset)
        if len(data) != size:
            raise OSError(f"{path} ends inside this sample")
        return data

    def picture(self, number: int) -> bytes:
        return self.read(_IMAGE, number)

    def json(self, number: int) -> dict[str, object]:
        """The object in a sample's .json. Raises OSError or ValueError."""
        try:
            record = json.loads(self.read(_JSON, number))
        except RecursionError:
            raise ValueError("the .json is nested too deeply") from None
        return record if isinstance(record, dict) else {}

    def caption(self, number: int, key: str | None) -> Caption:
        """From ``.txt`` and ``.short.txt``, else (or where a key is chosen) ``.json``. Raises OSError or ValueError."""
        if self.has(_JSON, number) and (key is not None or not self.has(CAPTION_MEMBER, number)):
            caption = caption_of(self.json(number), key)
        else:
            members = {"text": CAPTION_MEMBER}
            if self.has(SHORT_CAPTION_MEMBER, number):
                members["short"] = SHORT_CAPTION_MEMBER
            caption = caption_of({name: self.read(member, number).decode() for name, member in members.items()})
        if caption is None:
            raise ValueError("the caption is missing or empty")
        return caption

    def fingerprint(self, labels: NDArray[np.int64] | None, classes: list[str] | None) -> str:
        parts: list[object] = [path.name for path in self.files] + [path.stat().st_size for path in self.files]
        for key in sorted({*self.spans} - {LABEL_MEMBER}):  # the labels are given
            parts += [key, self.spans[key]]
        return fingerprint_of(*parts, self.file_of, "" if labels is None else labels, classes)


def webdataset(
    name: str, paths: Sequence[Path], class_map: ClassMap | None, options: PackOptions, hidden: Sequence[str] = ()
) -> Source:
    """Shards of any program: an image per sample, ``.cls`` (a number or a name), captions in ``.txt`` or ``.json``.

    hidden: the names of hidden files beside the tars, which a note counts. Shards of our own keep their class names.
    Raises UserError as ``scan`` does, without images, or where some samples have a class and others do not.
    """
    notes, indexes = Notes(name), []
    with Progress(f"reading the headers of {Path(name).name}", len(paths)) as progress:
        for path in paths:
            indexes.append(scan(path))
            progress.advance(1, path.name)
    members = tuple(sorted({member for index in indexes for member in index.members}))
    pictures = [member for member in _PICTURES if member in members]
    if not pictures:
        raise UserError(f"{name}: no images in these tars, only {', '.join(members)}; images are {', '.join(ENDINGS)}")
    file_of = np.repeat(np.arange(len(paths), dtype=np.int32), [len(index.spans) for index in indexes])
    # One table for all samples: a few array operations then answer which of them have what, where a loop over the
    # samples would take minutes for the millions of a large set.
    table = np.concatenate([index.columns(members).spans for index in indexes])
    present = table[:, :, 0] != 0
    image = np.zeros((len(table), 2), np.uint64)
    for member in reversed(pictures):
        column = members.index(member)
        image = np.where(present[:, column, None], table[:, column], image)
    read = [m for m in (CAPTION_MEMBER, SHORT_CAPTION_MEMBER, _JSON, LABEL_MEMBER) if m in members]
    samples = _Samples(paths, file_of, {_IMAGE: image} | {m: table[:, members.index(m)].copy() for m in read})

    several = present[:, [members.index(member) for member in pictures]].sum(1) > 1
    if several.any():
        kind = f"samples with several images, of which only one is read (in the order {', '.join(pictures)})"
        notes.skipped(kind, samples.at(int(np.argmax(several))), int(several.sum()))
    for member in sorted({*members} - {*pictures, *read}):
        has = present[:, members.index(member)]
        where = paths[file_of[int(np.argmax(has))]].name
        notes.skipped(f"members {printable(member)} not read", f"in {where}", int(has.sum()))
    for ignored in (file for index in indexes for file in index.ignored):
        kind = "files that are no part of a sample (hidden, or without an ending) passed over"
        notes.skipped(kind, printable(ignored))
    for file in hidden:
        notes.skipped(HIDDEN, printable(file))

    json_captions = _look_at_json(samples, options, notes)
    labels, classes = _classes(samples, class_map, options, notes)
    if _JSON in samples.spans and not json_captions:
        del samples.spans[_JSON]  # the .json of these shards holds something else
    captioned = bool({*samples.spans} - {_IMAGE, LABEL_MEMBER})
    return Source(
        name,
        samples.fingerprint(labels, classes),
        len(file_of),
        samples.title,
        samples.picture,
        (lambda number: samples.caption(number, options.caption_key)) if captioned else None,
        labels,
        classes,
        notes=notes.sentences(),
    )


def _look_at_json(samples: _Samples, options: PackOptions, notes: Notes) -> bool:
    """Whether captions may come from .json members; names those of their keys that are not read."""
    if _JSON not in samples.spans:
        return False
    rows = np.nonzero(samples.spans[_JSON][:, 0])[0]
    has_captions, unread = CAPTION_MEMBER in samples.spans, set[str]()
    for number in rows[:_LOOKED_AT]:
        try:
            record = samples.json(int(number))
            caption = caption_of(record, options.caption_key)
        except (OSError, ValueError):
            continue  # it is named when its turn comes
        has_captions |= caption is not None
        used = {options.class_key} if caption is None else {options.class_key, caption_key(record, options.caption_key)}
        unread |= {*record} - used - {"short"}
    if unread:
        keys = ", ".join(repr(printable(key)) for key in sorted(unread))
        kind = f".json members whose keys {keys} are not read (--caption-key chooses)"
        notes.skipped(kind, "in sample 0", len(rows))
    if not has_captions and options.caption_key is not None:
        raise UserError(f"--caption-key {options.caption_key}: no .json of {notes.where} has such a caption")
    return has_captions


def _classes(
    samples: _Samples, class_map: ClassMap | None, options: PackOptions, notes: Notes
) -> tuple[NDArray[np.int64] | None, list[str] | None]:
    """(labels, class names) from ``.cls``, or from the class key of ``.json``."""
    key, collected = options.class_key, SampleClasses(notes, class_map)
    part = LABEL_MEMBER if key is None else _JSON
    if key is not None and LABEL_MEMBER in samples.spans:
        notes.decided(f"{notes.where}: classes come from the key {key!r} of .json, not from {LABEL_MEMBER}")
    for number in range(len(samples.file_of)):
        value: object = None
        try:
            if samples.has(part, number):
                value = samples.json(number).get(key) if key else samples.read(part, number, _LONGEST_CLASS).decode()
        except (OSError, ValueError) as error:
            path = samples.files[samples.file_of[number]]
            raise UserError(f"{path}: {samples.at(number)}: {part} cannot be read ({error})") from None
        collected.add(value, samples.at(number))
    labels, classes = collected.finish()
    if labels is None and key is not None:
        raise UserError(f"--class-key {key}: no .json of {notes.where} has that key")
    folder = samples.files[0].parent
    if labels is not None and class_map is None and key is None and (folder / MANIFEST).exists():
        named = read_manifest(folder).classes
        if named is not None and len(named) >= len(classes or []):
            classes = named
    return labels, classes


def holds_tars(path: Path) -> bool:
    """Whether the first file in a tar is a tar itself, hidden ones aside. Raises UserError as ``entries`` does."""
    files = (os.path.basename(item.name) for item in entries(path))
    first = next((name for name in files if not name.startswith(".")), "")
    return first.lower().endswith(".tar")


def class_tars(path: Path, class_map: ClassMap | None) -> Source:
    """A tar of tars, one per class and named after it (ImageNet's training set), read without unpacking.

    Raises UserError as ``entries`` does, for a class twice or without images.
    """
    notes, inner, names = Notes(str(path)), list[tarfile.TarInfo](), list[str]()
    for item in entries(path):
        name = os.path.basename(item.name)
        if name.lower().endswith(".tar") and not name.startswith("."):
            inner.append(item)
            names.append(name[: -len(".tar")])
        else:
            notes.skipped("files that are no tars of a class passed over", printable(item.name))
    if twice := first_double(names):
        raise UserError(f"{path}: holds the class {twice!r} twice; every class may have one tar")
    if class_map is None:
        refuse_splits(names, str(path), "them one by one, unpacked")
    order = folder_classes(names, class_map, notes)
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
                    notes.skipped(f"{kind} passed over", f"{name}.tar: {printable(image.name)}")
            if len(labels) == before:
                raise UserError(f"{path}: {item.name}: no images in the tar of this class; leave it out")
            progress.advance(1, name)
    pairs = np.array(spans, np.uint64).reshape(-1, 2)
    samples = _Samples([path], np.zeros(len(labels), np.int32), {_IMAGE: pairs})
    numbers = np.array(labels, np.int64)
    return Source(
        str(path),
        samples.fingerprint(numbers, order.names),
        len(labels),
        samples.title,
        samples.picture,
        labels=numbers,
        classes=order.names,
        class_order=order.order,
        notes=notes.sentences(),
    )
