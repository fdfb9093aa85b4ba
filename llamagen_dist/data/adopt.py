"""Indexing shards that another program wrote, so that they can be read by sample number."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from llamagen_dist.config import UserError
from llamagen_dist.data.index import TarIndex, index_bytes, index_name, scan
from llamagen_dist.data.manifest import (
    MANIFEST,
    Manifest,
    ShardRecord,
    read_manifest,
    write_manifest,
)
from llamagen_dist.data.shards import IMAGE_MEMBERS, LABEL_MEMBER, Shards
from llamagen_dist.files import sha256_file, write_bytes

_MOST_CLASSES = 1_000_000  # as in sources.classes


def index_folder(
    folder: Path,
    classes: list[str] | None = None,
    advance: Callable[[int, str], None] = lambda count, text: None,
) -> Manifest:
    """Make manifest.json and the indexes for every ``*.tar`` in ``folder`` (image shards, WebDataset naming).

    classes: names of the labels in ``.cls``; without them the labels' numbers serve. Where there is a
    manifest already, only its indexes are made again. advance: called with (1, shard name) after each tar.
    Raises UserError: no tars, a tar that is damaged, compressed or leaves its archive, samples without image,
    labels that are missing for some samples or are not numbers of a class.
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
    records = []
    for path, index in found:
        _write_index(path, index.columns(members))
        records.append(
            ShardRecord(
                path.name,
                len(index.spans),
                path.stat().st_size,
                sha256_file(path),
                index_sha256=sha256_file(folder / index_name(path.name)),
            )
        )
    if not any(member in members for member in IMAGE_MEMBERS):
        raise UserError(f"{folder}: no images in these tars (found {', '.join(members)}; wanted {IMAGE_MEMBERS})")
    count = sum(record.samples for record in records)
    manifest = Manifest("images", count, members, tuple(records), source={"made_by": "llamagen shards index"})
    if LABEL_MEMBER in members:
        manifest = _with_classes(folder, manifest, classes)
    elif classes is not None:
        raise UserError(f"{folder}: class names were given, but the samples have no {LABEL_MEMBER}")
    write_manifest(folder, manifest)
    return manifest


def _write_index(path: Path, index: TarIndex) -> None:
    try:
        write_bytes(path.with_name(index_name(path.name)), index_bytes(index))
    except OSError as error:
        raise UserError(f"{path.parent}: cannot be written ({error.strerror}); copy the shards elsewhere") from None


def _with_classes(folder: Path, manifest: Manifest, classes: list[str] | None) -> Manifest:
    """Read every label once: they must all be there, and be numbers of a class."""
    limit = _MOST_CLASSES if classes is None else len(classes)
    labels = Shards(folder, manifest).labels(range(manifest.count), limit)
    if classes is None:
        classes = [str(label) for label in range(int(labels.max(initial=-1)) + 1)]
    return replace(manifest, classes=classes)


def _index_again(folder: Path, advance: Callable[[int, str], None]) -> Manifest:
    manifest = read_manifest(folder)
    for record in manifest.shards:
        if record.layout is None:
            path = folder / record.name
            _write_index(path, scan(path).columns(manifest.members))
            if sha256_file(folder / index_name(record.name)) != record.index_sha256:
                raise UserError(
                    f"{path}: its index is not the one that {MANIFEST} records, so the shard has changed; "
                    f"check it with llamagen shards verify {folder}"
                )
        advance(1, record.name)
    return manifest
