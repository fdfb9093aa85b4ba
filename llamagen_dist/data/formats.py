"""The kinds of sources that can be packed: a folder of classes, JSON lines, .npz files, tars, and the embedded set."""

import errno
import glob
import hashlib
import json
import os
import re
import struct
import tokenize
import zipfile
import zlib
from array import array
from collections import Counter
from pathlib import Path
from stat import S_ISDIR, S_ISREG
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from llamagen_dist.config.pack import PackOptions
from llamagen_dist.data import fashion_mnist
from llamagen_dist.data.classes import MOST_CLASSES, ClassMap, SampleClasses, folder_classes, refuse_splits
from llamagen_dist.data.index import printable
from llamagen_dist.data.manifest import MANIFEST
from llamagen_dist.data.source import ENDINGS, HIDDEN, Caption, Notes, Source, caption_key, caption_of, fingerprint_of
from llamagen_dist.data.tar_sources import class_tars, holds_tars, webdataset
from llamagen_dist.errors import UserError
from llamagen_dist.files import sha256_file

_ARRAYS = ("arr_0", "arr_1", "labels")


def open_source(name: str, options: PackOptions | None = None, class_map: ClassMap | None = None) -> Source:
    """``builtin:fashion-mnist``, a folder with one sub-folder per class, an .npz file, a .jsonl file, a folder or a
    glob of WebDataset tars, one such tar, or a tar that holds one tar per class.

    options: its split, caption_key and class_key say how to read. class_map: which labels the classes get, and their
    names. Raises UserError for anything else, without images, or where an option does not fit.
    """
    options = options or PackOptions()
    try:
        source = _opened(name, options, class_map)
    except OSError as error:
        raise UserError(f"{error.filename or name}: cannot be read ({error.strerror})") from None
    if source.labels is not None and source.classes is not None:
        # Labels that are numbers may leave some out: no reason to refuse, but nothing can be learnt about such a class.
        empty = np.nonzero(np.bincount(source.labels, minlength=len(source.classes)) == 0)[0]
        if len(empty):
            counts, first = f"{len(empty)} of {len(source.classes)}", source.classes[empty[0]]
            source.notes = [*source.notes, f"{name}: {counts} classes have no images, the first is {first!r}"]
    return source


def count(name: str, options: PackOptions | None = None) -> int:
    """How many pictures packing would read, without reading any (of an .npz not even its arrays).

    Raises UserError as ``open_source`` does.
    """
    if Path(name).suffix == ".npz" and Path(name).is_file():
        try:
            with zipfile.ZipFile(name) as archive, archive.open("arr_0.npy") as file:
                major, _ = np.lib.format.read_magic(file)
                read = np.lib.format.read_array_header_1_0 if major == 1 else np.lib.format.read_array_header_2_0
                return int(read(file)[0][0])
        except _NPZ_ERRORS as error:
            raise UserError(f"{name}: not a readable .npz file ({error})") from None
    return fashion_mnist.COUNT if name == f"builtin:{fashion_mnist.NAME}" else open_source(name, options).count


def _opened(name: str, options: PackOptions, class_map: ClassMap | None) -> Source:
    if name.startswith("builtin:"):
        if name != f"builtin:{fashion_mnist.NAME}":
            raise UserError(f"{name}: unknown; the one embedded data set is builtin:{fashion_mnist.NAME}")
        _refuse_options(name, options, "split", "caption_key", "class_key")
        return _embedded(name, class_map)
    path = Path(name)
    if options.split is not None:
        if not (path / options.split).is_dir():
            raise UserError(f"--split {options.split}: {path} holds no such folder")
        name, path = str(path / options.split), path / options.split
    if path.is_dir():
        if shards := sorted(manifest.parent.name for manifest in path.glob(f"*/{MANIFEST}")):
            raise UserError(f"{name}: holds folders of shards ({', '.join(shards)}); name one of them")
        tars = sorted(tar for tar in path.glob("*.tar") if not tar.name.startswith("."))
        if not tars:
            _refuse_options(name, options, "caption_key", "class_key")
            return _folder(path, class_map)
        if any(entry.is_dir() and not entry.name.startswith(".") for entry in path.iterdir()):
            raise UserError(
                f"{name}: holds both tar files and folders; name the tars as '{name}/*.tar', or move them elsewhere"
            )
        prefixes = [start[0] for tar in tars if (start := re.match(r"[A-Za-z]+", tar.name))]
        refuse_splits(sorted({*prefixes}), name, f"one of them as '{name}/{prefixes[0] if prefixes else ''}*.tar'")
        return webdataset(name, tars, class_map, options, [e.name for e in sorted(path.iterdir()) if e.name[0] == "."])
    if path.is_file() and path.suffix == ".npz":
        _refuse_options(name, options, "caption_key", "class_key")
        return _npz(path, class_map)
    if path.is_file() and path.suffix == ".jsonl":
        return _jsonl(path, class_map, options)
    if path.is_file() and path.suffix == ".tar":
        if not holds_tars(path):
            return webdataset(name, [path], class_map, options)
        _refuse_options(name, options, "caption_key", "class_key")
        return class_tars(path, class_map)
    if not path.exists() and glob.has_magic(name):
        matches = sorted(Path(match) for match in glob.glob(name))
        if matches and all(match.suffix == ".tar" for match in matches):
            return webdataset(name, matches, class_map, options)
        raise UserError(
            f"{name}: matches {'other files than tars' if matches else 'no file'}; give a pattern such as 'data/*.tar'"
        )
    what = "not a folder or a file of a known kind" if path.exists() else "no such folder or file"
    raise UserError(
        f"{name}: {what}; give a folder with one sub-folder per class, a folder or a pattern of WebDataset tars, a "
        f".jsonl, .npz or .tar file, or builtin:{fashion_mnist.NAME}"
    )


def _refuse_options(name: str, options: PackOptions, *names: str) -> None:
    for option in names:
        if getattr(options, option) is not None:
            what = "has no splits" if option == "split" else "is neither a .jsonl file nor WebDataset tars"
            raise UserError(f"--{option.replace('_', '-')}: {name} {what}; leave the option away")


# --- a folder with one sub-folder per class


def _folder(folder: Path, class_map: ClassMap | None) -> Source:
    """Labels in the order of the class names, or of the class map; files may lie deeper.

    Raises UserError: no images, images outside a class folder, a class folder without images, folders that are the
    parts of a data set and no classes.
    """
    notes, names, loose = Notes(str(folder)), list[str](), list[str]()
    for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
        status = _status(entry)
        if entry.name.startswith("."):
            notes.skipped(HIDDEN, printable(entry.name))
        elif status is not None and S_ISDIR(status.st_mode):
            names.append(entry.name)
        elif entry.name.lower().endswith(ENDINGS):
            loose.append(entry.name)
        elif status is None:
            raise UserError(f"{entry.path}: this link leads nowhere, so a class may be missing; mend or remove it")
        else:
            notes.skipped(_other(entry.name), printable(entry.name))
    if loose:
        raise UserError(
            f"{folder}: {len(loose)} images lie outside a class folder, so their labels are missing; the first is "
            f"{printable(loose[0])}"
        )
    if class_map is None:
        _refuse_parts(folder, names)
    order = folder_classes(names, class_map, notes)
    paths, labels, digest = list[str](), array("q"), hashlib.sha256()
    for name in names:
        images = sorted(_images_below(folder, name, notes))
        if not images and len(names) > 1:
            raise UserError(f"{folder / name}: no images in this class folder; remove it, or put images there")
        for path, size in images:
            relative = os.path.relpath(path, folder)
            digest.update(f"{relative}\0{size}\0".encode(errors="surrogateescape"))
            paths.append(relative)
            labels.append(order.label_of[name])
    if not paths:
        raise UserError(f"{folder}: no images found; expected one sub-folder per class with {', '.join(ENDINGS)} files")
    below = {os.path.dirname(path) for path in paths}
    if len(names) == 1 and len(below - {names[0]}) > 1:
        notes.decided(
            f"{folder}: one class, {names[0]!r}, whose images lie in {len(below)} folders; if these are the classes, "
            f"pack {folder / names[0]}"
        )
    return Source(
        str(folder),
        digest.hexdigest(),
        len(paths),
        lambda number: printable(paths[number]),
        lambda number: (folder / paths[number]).read_bytes(),
        labels=np.array(labels, np.int64),
        classes=order.names,
        class_order=order.order,
        notes=notes.sentences(),
    )


def _refuse_parts(folder: Path, names: list[str]) -> None:
    """Refuse ``train/`` and ``val/`` as classes, in the folder or below its only one."""
    if len(names) == 1:
        only = folder / names[0]
        inner = sorted(entry.name for entry in os.scandir(only) if (s := _status(entry)) and S_ISDIR(s.st_mode))
        refuse_splits(inner, str(only), f"one of them by its path, such as {only / (inner or [''])[0]}")
        refuse_splits(names if inner else [], str(folder), f"it with --split {names[0]}", least=1)
    refuse_splits(names, str(folder), "one of them with --split NAME")


def _status(entry: "os.DirEntry[str]") -> os.stat_result | None:
    """Of what a link leads to; None where it leads nowhere."""
    try:
        return entry.stat()
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ELOOP, errno.ENOTDIR):
            return None
        raise


def _other(name: str) -> str:
    ending = printable(os.path.splitext(name)[1].lower())
    return f"files that are no images ({ending or 'no ending'}) passed over"


def _images_below(root: Path, name: str, notes: Notes) -> list[tuple[str, int]]:
    """(path, bytes) of every image file of a class, at any depth, also behind links; -1 bytes for a link that leads
    nowhere, which is named with the other unreadable images when its turn comes.
    """
    images, pending = [], [os.path.join(root, name)]
    # Each folder is read once, and none above the class: a link to one would bring in other classes, or never end.
    above = [os.stat(path) for path in (root.resolve(), *root.resolve().parents)]
    seen = {(status.st_dev, status.st_ino) for status in above}
    while pending:
        folder = pending.pop()
        status = os.stat(folder)
        if (status.st_dev, status.st_ino) in seen:
            kind = "linked folders passed over, as they are read already or hold this one"
            notes.skipped(kind, _shown(root, folder))
            continue
        seen.add((status.st_dev, status.st_ino))
        for entry in os.scandir(folder):
            inner, is_image = _status(entry), entry.name.lower().endswith(ENDINGS)
            if entry.name.startswith("."):
                notes.skipped(HIDDEN, _shown(root, entry.path))
            elif inner is not None and S_ISDIR(inner.st_mode):
                pending.append(entry.path)
            elif is_image and (inner is None or S_ISREG(inner.st_mode)):
                images.append((entry.path, -1 if inner is None else inner.st_size))
            elif inner is None:
                notes.skipped("links that lead nowhere passed over", _shown(root, entry.path))
            else:
                kind = "pipes and devices passed over" if is_image else _other(entry.name)
                notes.skipped(kind, _shown(root, entry.path))
    return images


def _shown(root: Path, path: str) -> str:
    return printable(os.path.relpath(path, root))


# --- JSON lines


def _jsonl(path: Path, class_map: ClassMap | None, options: PackOptions) -> Source:
    """Keys of a line: ``image_path`` (relative paths count from the file's folder), ``text`` and ``short`` (see
    ``caption_of``), ``class`` (a number or a name). Empty lines are passed over, other keys are named.

    Only where the lines begin is kept in memory; they are read again when their turn comes. Raises UserError, naming
    the line: not JSON or UTF-8, not an object, a key twice, no image_path, captions or classes of another type.
    """
    notes, captioned, begin = Notes(str(path)), False, 0
    classes = SampleClasses(notes, class_map)
    lines, starts, sizes, pictures = (array("q") for _ in range(4))
    class_key, keys, unread = options.class_key or "class", dict[str, None](), Counter[str]()
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                record, caption = _parsed(path, number, line, options)
                captioned |= caption is not None
                classes.add(record.get(class_key), f"line {number}")
                lines.append(number)
                pictures.append(hash(record["image_path"]))
                starts.append(begin)
                sizes.append(_size(path.parent / record["image_path"]))
                keys.update(dict.fromkeys(record))
                unread.update({*record} - {"image_path", "short", class_key, caption_key(record, options.caption_key)})
            begin += len(line)
    if not lines:
        raise UserError(f'{path}: no images found; write one JSON object a line, with "image_path" and "text"')
    for option, key in (("--caption-key", options.caption_key), ("--class-key", options.class_key)):
        if key is not None and key not in keys:
            raise UserError(f"{option} {key}: no line of {path} has that key; it has {', '.join(map(repr, keys))}")
    labels, names = classes.finish()
    if unread:
        named = ", ".join(f"{printable(key)!r} ({many:,} lines)" for key, many in sorted(unread.items()))
        notes.decided(f"{path}: keys that are not read: {named}; --caption-key and --class-key choose others")

    def row(number: int) -> tuple[dict[str, Any], Caption | None]:
        with open(path, "rb") as file:
            file.seek(starts[number])
            return _parsed(path, lines[number], file.readline(), options)

    def caption_at(number: int) -> Caption:
        caption = row(number)[1]
        if caption is None:
            raise ValueError(f'the caption is missing ("{options.caption_key or "text"}" is absent or empty)')
        return caption

    return Source(
        str(path),
        fingerprint_of(sha256_file(path), np.array(sizes)),
        len(lines),
        lambda number: f"line {lines[number]} ({printable(row(number)[0]['image_path'])})",
        lambda number: (path.parent / row(number)[0]["image_path"]).read_bytes(),
        caption_at if captioned else None,
        labels,
        names,
        repeats=len(pictures) - len(np.unique(np.array(pictures))),
        notes=notes.sentences(),
    )


def _size(path: Path) -> int:
    try:
        return os.path.getsize(path)
    except OSError:
        return -1  # it is named with the other unreadable images when its turn comes


def _parsed(path: Path, number: int, line: bytes, options: PackOptions) -> tuple[dict[str, Any], Caption | None]:
    try:
        text = line.decode("utf-8-sig" if number == 1 else "utf-8")  # editors of some systems mark UTF-8 files
        record = json.loads(text, object_pairs_hook=_without_doubles)
        if not isinstance(record, dict):
            raise ValueError("not a JSON object")
        image = record.get("image_path")
        if not isinstance(image, str) or not image or "\0" in image:
            keys = f"; its keys are {', '.join(map(repr, record))}" if image is None else ""
            raise ValueError(f'"image_path" must be the path of an image, not {image!r}{keys}')
        if b"\\u" in line:
            json.dumps(record, ensure_ascii=False).encode()  # half a surrogate pair can be written, but is no text
        return record, caption_of(record, options.caption_key)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: line {number}: {error}; correct or delete that line") from None


def _without_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    record = dict(pairs)
    if len(record) != len(pairs):
        raise ValueError("a key comes twice")
    return record


# --- pixels in memory: the embedded data set and .npz files

_NPZ_ERRORS = (
    OSError, ValueError, EOFError, KeyError, IndexError, RuntimeError, MemoryError, OverflowError, zlib.error,
    struct.error, zipfile.BadZipFile, tokenize.TokenError,
)  # fmt: skip


def _pixels(
    name: str,
    fingerprint: str,
    pixels: NDArray[np.uint8],
    labels: NDArray[np.int64] | None,
    classes: list[str] | None,
    notes: Notes,
) -> Source:
    """pixels: uint8 [n, H, W, 3] or [n, H, W] (grey)."""
    return Source(
        name,
        fingerprint,
        len(pixels),
        lambda number: f"{name}[{number}]",
        lambda number: Image.fromarray(pixels[number]).convert("RGB"),
        labels=labels,
        classes=classes,
        uniform_size=(pixels.shape[2], pixels.shape[1]),
        notes=notes.sentences(),
    )


def _embedded(name: str, class_map: ClassMap | None) -> Source:
    notes, (pixels, labels) = Notes(name), fashion_mnist.load()
    classes = list(fashion_mnist.CLASSES) if class_map is None else class_map.for_numbers(labels, notes)
    return _pixels(name, fashion_mnist.SHA256, pixels, labels, classes, notes)


def _npz(path: Path, class_map: ClassMap | None) -> Source:
    """arr_0 uint8 [n, H, W, 3] or [n, H, W], and arr_1 or labels: integers [n]. Raises UserError for anything else."""
    notes = Notes(str(path))
    try:
        _check_memory(path)
        with np.load(path, allow_pickle=False) as file:
            names = list(file.files)
            arrays = {name: file[name] for name in _ARRAYS if name in names}
    except _NPZ_ERRORS as error:
        raise UserError(f"{path}: not a readable .npz file ({str(error) or type(error).__name__})") from None
    pixels = arrays.get("arr_0")
    shape = None if pixels is None else pixels.shape
    grey_or_rgb = shape is not None and (len(shape) == 3 or (len(shape) == 4 and shape[3] == 3))
    if pixels is None or pixels.dtype != np.uint8 or not grey_or_rgb:
        given = "nothing" if pixels is None else f"{pixels.dtype} {list(pixels.shape)}"
        raise UserError(f"{path}: arr_0 must be uint8 [images, height, width, 3], but it is {given}")
    if not pixels.size:
        raise UserError(f"{path}: no images found (arr_0 is empty)")
    key = next((key for key in ("labels", "arr_1") if key in arrays), None)
    if unread := sorted({*names} - {"arr_0", key}):
        notes.decided(f"{path}: arrays that are not read: {', '.join(printable(name) for name in unread)}")
    if key is None and class_map is not None:
        raise UserError(f"{path}: a class map was given, but the file has no labels")
    labels = None if key is None else _labels(path, arrays[key], len(pixels))
    classes = None if labels is None else [str(label) for label in range(int(labels.max()) + 1)]
    if labels is not None and class_map is not None:
        classes = class_map.for_numbers(labels, notes)
    return _pixels(path.name, sha256_file(path), pixels, labels, classes, notes)


def _labels(path: Path, labels: NDArray[Any], count: int) -> NDArray[np.int64]:
    """The labels of ``count`` images as int64 [n]. Raises UserError where they are anything but class numbers."""
    if labels.shape != (count,) or not np.issubdtype(labels.dtype, np.integer) or labels.min() < 0:
        raise UserError(f"{path}: the labels must be {count} integers from 0, not {labels.dtype} {list(labels.shape)}")
    if (largest := int(labels.max())) >= MOST_CLASSES:
        raise UserError(f"{path}: image {int(labels.argmax())} has the label {largest}, not below {MOST_CLASSES:,}")
    return labels.astype(np.int64)


def _check_memory(path: Path) -> None:
    """A small .npz may unpack to any size, and all of it goes into memory."""
    with zipfile.ZipFile(path) as archive:
        needed = sum(item.file_size for item in archive.infolist() if item.filename.removesuffix(".npy") in _ARRAYS)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if needed > memory:
        raise UserError(
            f"{path}: unpacks to {needed / 1e9:,.1f} GB, more than this machine's {memory / 1e9:,.1f} GB of memory"
        )
