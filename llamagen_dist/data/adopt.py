"""Indexing shards that another program wrote, so that they can be read by sample number."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np

from llamagen_dist.data.classes import MOST_CLASSES
from llamagen_dist.data.index import TarIndex, index_bytes, index_name, scan
from llamagen_dist.data.manifest import (
    MANIFEST,
    Manifest,
    ShardRecord,
    read_manifest,
    write_manifest,
)
from llamagen_dist.data.shards import CAPTION_MEMBER, IMAGE_MEMBERS, LABEL_MEMBER, Shards
from llamagen_dist.data.tokens import CODES_MEMBER
from llamagen_dist.errors import UserError
from llamagen_dist.files import sha256_file, write_bytes


def index_folder(
    folder: Path,
    classes: list[str] | None = None,
    advance: Callable[[int, str], None] = lambda count, text: None,
) -> Manifest:
    """Make manifest.json and the indexes for every ``*.tar`` in ``folder`` (image shards, WebDataset naming).

    classes: names of the labels in ``.cls``; without them the labels' numbers serve. Where there is a
    manifest already, only its indexes are made again. advance: called with (1, shard name) after
    each tar. Raises UserError, leaving no file behind: no tars, a tar that is damaged, compressed or leaves its
    archive, token shards, samples without image, labels or captions (``.txt``) that only some samples have, labels
    that are not numbers of a class.
    """
    if (folder / MANIFEST).exists():
        return _index_again(folder, advance)
    paths = sorted(folder.glob("*.tar"))
    if not paths:
        raise UserError(f"{folder}: no *.tar files to index here")
    found: list[tuple[Path, TarIndex]] = []
    for path in paths:
        found.append((path, scan(path)))
        advance(1, path.name)
    members = tuple(sorted({member for _, index in found for member in index.members}))
    _check_members(folder, members)
    for path, index in found:
        _check_samples(path, index, members)
    written = []
    try:
        for path, index in found:
            written.append(_write_index(path, index.columns(members)))
        manifest = Manifest(
            kind="images",
            count=sum(record.samples for record in written),
            members=members,
            shards=tuple(written),
            source={"made_by": "llamagen shards index"},
            noticed={"ignored_files": ignored} if (ignored := sum(len(index.ignored) for _, index in found)) else {},
        )
        if LABEL_MEMBER in members:
            manifest = _with_classes(folder, manifest, classes)
        elif classes is not None:
            raise UserError(f"{folder}: class names were given, but the samples have no {LABEL_MEMBER}")
    except UserError:
        for record in written:
            (folder / index_name(record.name)).unlink(missing_ok=True)
        raise
    write_manifest(folder, manifest)
    return manifest


def _check_members(folder: Path, members: tuple[str, ...]) -> None:
    if CODES_MEMBER in members:
        raise UserError(
            f"{folder}: these are token shards, and only their {MANIFEST} says which tokenizer made them; copy it from "
            "where they were made, or extract them again"
        )
    if not {*IMAGE_MEMBERS} & {*members}:
        raise UserError(f"{folder}: no images in these tars (found {', '.join(members)}; wanted {IMAGE_MEMBERS})")


def _check_samples(path: Path, index: TarIndex, members: tuple[str, ...]) -> None:
    """Every sample needs an image, and a caption where others have one."""
    for needed in (IMAGE_MEMBERS, *((name,) for name in (CAPTION_MEMBER, LABEL_MEMBER) if name in members)):
        present = [index.spans[:, n, 0] != 0 for n, member in enumerate(index.members) if member in needed]
        lacking = ~np.logical_or.reduce(present) if present else np.ones(len(index.spans), np.bool_)
        if lacking.any():
            what = "image" if needed == IMAGE_MEMBERS else needed[0]
            raise UserError(
                f"{path}: {int(lacking.sum())} of {len(lacking)} samples have no {what}, the first is sample "
                f"{int(np.argmax(lacking))}; leave them out with: llamagen pack {path.parent} --skip-bad --out SHARDS"
            )


def _write_index(path: Path, index: TarIndex) -> ShardRecord:
    """The index beside a tar, and its record."""
    try:
        place = path.with_name(index_name(path.name))
        write_bytes(place, index_bytes(index))
        size, sha256 = path.stat().st_size, sha256_file(path)
        return ShardRecord(path.name, len(index.spans), size, sha256, index_sha256=sha256_file(place))
    except OSError as error:
        raise UserError(f"{path.parent}: cannot be written ({error.strerror}); copy the shards elsewhere") from None


def _with_classes(folder: Path, manifest: Manifest, classes: list[str] | None) -> Manifest:
    """Read every label once: they must all be there, and be numbers of a class."""
    limit = MOST_CLASSES if classes is None else len(classes)
    labels = Shards(folder, manifest).labels(range(manifest.count), limit)
    if classes is None:
        classes = [str(label) for label in range(int(labels.max(initial=-1)) + 1)]
    return replace(manifest, classes=classes)


def _index_again(folder: Path, advance: Callable[[int, str], None]) -> Manifest:
    manifest = read_manifest(folder)
    for record in manifest.shards:
        path = folder / record.name
        index = scan(path)
        if sha256_file(path) != record.sha256:  # an index of other bytes would make it look whole
            raise UserError(
                f"{path}: is not the shard that {MANIFEST} records; look for the damage with llamagen shards verify "
                f"{folder}"
            )
        if len(index.spans) != record.samples:  # an earlier version read only the first of several tars in a file
            raise UserError(
                f"{path}: holds {len(index.spans)} samples, but {MANIFEST} records {record.samples}; delete {MANIFEST} "
                "and run the same command again"
            )
        if record.layout is None:
            _write_index(path, index.columns(manifest.members))
        advance(1, record.name)
    return manifest
