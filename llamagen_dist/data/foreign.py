"""Looking after whole folders of shards: verify them, index those of another program, merge several into one."""

import errno
import hashlib
import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from llamagen_dist.data.classes import MOST_CLASSES
from llamagen_dist.data.index import TarIndex, all_spans, index_bytes, index_name, scan
from llamagen_dist.data.manifest import MANIFEST, Manifest, ShardRecord, read_manifest, write_manifest
from llamagen_dist.data.shards import CAPTION_MEMBER, IMAGE_MEMBERS, LABEL_MEMBER, Shards, open_shards
from llamagen_dist.data.tokens import CODES_MEMBER
from llamagen_dist.data.writer import ShardJob, refused_when_full, shard_name
from llamagen_dist.errors import UserError
from llamagen_dist.files import sha256_file, write_bytes, written_aside

_NO_LINK = (errno.EXDEV, errno.EPERM, errno.EMLINK, errno.EOPNOTSUPP, errno.EACCES)
Advance = Callable[[int, str], None]


def _no_progress(count: int, text: str) -> None: ...


def verify(shards: Shards, advance: Advance = _no_progress) -> None:
    """Read every byte and compare sha256 with the manifest. (Remote shards are compared as they arrive in the cache.)

    advance: called with (samples, shard name) after each shard.
    Raises UserError with one line for each damaged file, naming both hashes.
    """
    problems = []
    for record in shards.manifest.shards:
        if shards.cache is None:
            problems += _problems(shards, record)
        else:
            try:
                shards.cache.shard(record).close()
                if record.layout is None:
                    shards.cache.index(record).close()
            except UserError as error:
                problems.append(str(error))
        advance(record.samples, record.name)
    if problems:
        raise UserError("\n".join(problems))


def _problems(shards: Shards, record: ShardRecord) -> list[str]:
    """What is wrong with the files of one local shard, one sentence each."""
    expected, problems = [(record.name, record.sha256)], []
    if record.index_sha256 is not None:
        expected.append((index_name(record.name), record.index_sha256))
    for name, recorded in expected:
        path = shards.folder / name
        try:
            actual = sha256_file(path)
        except OSError as error:
            problems.append(f"{path}: cannot be read ({error.strerror})")
            continue
        if actual != recorded:
            problems.append(
                f"{path}: sha256 {actual}, but {MANIFEST} records {recorded}: its bytes have changed; copy or make "
                "it again"
            )
    return problems


def index_folder(folder: Path, classes: list[str] | None = None, advance: Advance = _no_progress) -> Manifest:
    """Make manifest.json and the indexes for every ``*.tar`` in ``folder`` (image shards, WebDataset naming).

    Where there is a manifest already, only its indexes are made again.
    classes: names of the labels in ``.cls``; without them the labels' numbers serve.
    advance: called with (1, shard name) after each tar.
    Raises UserError, leaving no file behind: no tars, a tar that is damaged, compressed or leaves its archive, token
    shards, samples without image, labels or captions (``.txt``) that only some samples have, labels that are not
    numbers of a class.
    """
    if (folder / MANIFEST).exists():
        return _index_again(folder, advance)
    paths = sorted(folder.glob("*.tar"))
    if not paths:
        raise UserError(f"{folder}: no *.tar files to index here")
    indexes: list[tuple[Path, TarIndex]] = []
    for path in paths:
        indexes.append((path, scan(path)))
        advance(1, path.name)
    members = tuple(sorted({member for _, index in indexes for member in index.members}))
    _check_members(folder, members)
    for path, index in indexes:
        _check_samples(path, index, members)
    written = []
    try:
        for path, index in indexes:
            written.append(_write_index(path, index.columns(members)))
        manifest = Manifest(
            kind="images",
            count=sum(record.samples for record in written),
            members=members,
            shards=tuple(written),
            source={"made_by": "llamagen shards index"},
            noticed={"ignored_files": ignored} if (ignored := sum(len(index.ignored) for _, index in indexes)) else {},
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
            f"{folder}: these are token shards; copy their {MANIFEST}, which names the tokenizer, or extract them again"
        )
    if not {*IMAGE_MEMBERS} & {*members}:
        raise UserError(f"{folder}: no images in these tars (only {', '.join(members)}; images are {IMAGE_MEMBERS})")


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
        beside = path.with_name(index_name(path.name))
        write_bytes(beside, index_bytes(index))
        size, sha256 = path.stat().st_size, sha256_file(path)
        return ShardRecord(path.name, len(index.spans), size, sha256, index_sha256=sha256_file(beside))
    except OSError as error:
        raise UserError(f"{path.parent}: cannot be written ({error.strerror}); copy the shards elsewhere") from None


def _with_classes(folder: Path, manifest: Manifest, classes: list[str] | None) -> Manifest:
    """Read every label once: they must all be there, and be numbers of a class."""
    limit = MOST_CLASSES if classes is None else len(classes)
    labels = Shards(folder, manifest).labels(range(manifest.count), limit)
    if classes is None:
        classes = [str(label) for label in range(int(labels.max(initial=-1)) + 1)]
    return replace(manifest, classes=classes)


def _index_again(folder: Path, advance: Advance) -> Manifest:
    manifest = read_manifest(folder)
    for record in manifest.shards:
        path = folder / record.name
        index = scan(path)
        if sha256_file(path) != record.sha256:  # an index of other bytes would make it look whole
            raise UserError(f"{path}: is not the shard that {MANIFEST} records; run llamagen shards verify {folder}")
        if len(index.spans) != record.samples:  # an earlier version read only the first of several tars in a file
            raise UserError(
                f"{path}: holds {len(index.spans)} samples, but {MANIFEST} records {record.samples}; delete {MANIFEST} "
                "and run the same command again"
            )
        if record.layout is None:
            _write_index(path, index.columns(manifest.members))
        advance(1, record.name)
    return manifest


def merge(folders: Sequence[Path], out: Path, copy: bool = False, advance: Advance = _no_progress) -> Manifest:
    """Put the shards of ``folders`` into ``out``: all of the first folder in its order, then all of the second, …

    The tars become hard links where the file system has them (a shard is never changed once it is written), else
    copies, which are compared with their sha256.
    copy: always copy.
    advance: called with (1, shard name) after each shard.
    Raises UserError: fewer than two folders, shards that do not go together (another kind, tokenizer, grid,
    crops, image size, padding, classes, captions or caption encoder), the same shard twice, a folder that cannot be
    written or holds something else.
    """
    if len(folders) < 2:
        raise UserError("name two or more folders of shards to merge")
    parts = [open_shards(folder) for folder in folders]
    first = parts[0].manifest
    for part in parts[1:]:
        if reasons := _differences(first, part.manifest):
            raise UserError(f"{part.folder}: cannot be merged with {parts[0].folder}: {'; '.join(reasons)}")
    _refuse_doubles(parts)
    manifests = [part.manifest for part in parts]
    members = first.members
    if any({*manifest.members} != {*members} for manifest in manifests):
        members = tuple(sorted({member for manifest in manifests for member in manifest.members}))
    source = {
        "made_by": "llamagen shards merge",
        "parts": [manifest.fingerprint() for manifest in manifests],
        "sources": [manifest.source for manifest in manifests],
    }
    job = ShardJob(out, source)
    if (complete := job.completed()) is not None:
        return complete
    job.begin()
    records: list[ShardRecord] = []
    for part in parts:
        for record in part.manifest.shards:
            name = shard_name(len(records))
            with refused_when_full(out):
                records.append(_link_shard(part, record, out, name, members, copy))
            advance(1, name)
    merged = replace(
        first,
        count=sum(manifest.count for manifest in manifests),
        members=members,
        shards=tuple(records),
        skipped=tuple(name for manifest in manifests for name in manifest.skipped),
        too_small=tuple(name for manifest in manifests for name in manifest.too_small),
        source=job.source,
        noticed={},  # counted and measured for one part only
    )
    job.finish(merged)
    return merged


def _differences(first: Manifest, other: Manifest) -> list[str]:
    """Why two sets do not go together, one reason each."""
    if first.kind != other.kind:
        return [f"one holds {first.kind}, the other {other.kind}"]
    pictures = {*IMAGE_MEMBERS} if first.kind == "images" else set[str]()

    def compared(manifest: Manifest) -> dict[str, Any]:
        return {
            "the tokenizers differ (sha256)": manifest.tokenizer_sha256,
            "codes": manifest.vocab_size,
            "grid of tokens": manifest.grid,
            "crops per image": manifest.crops,
            "image size": manifest.image_size,
            "padding": manifest.padding,
            # The encoder's path says nothing: equal hashes mean equal features.
            "the captions were encoded differently": manifest.captions and replace(manifest.captions, encoder=""),
            "parts of a sample": sorted({*manifest.members} - pictures),
        }

    pairs = zip(compared(first).items(), compared(other).values(), strict=True)
    reasons = [f"{what}: {_short(one)} and {_short(two)}" for (what, one), two in pairs if one != two]
    if first.classes != other.classes:
        reasons.insert(0, _class_difference(first.classes, other.classes))
    return reasons


def _class_difference(first: list[str] | None, other: list[str] | None) -> str:
    if first is None or other is None:
        return "only one of them has classes"
    label = next((n for n, pair in enumerate(zip(first, other, strict=False)) if pair[0] != pair[1]), None)
    if label is None:
        return f"{len(first)} and {len(other)} classes"
    return f"class {label} is {first[label]!r} and {other[label]!r}"


def _short(value: Any) -> str:
    text = " ".join(value) if isinstance(value, list) else str(value)
    return text if len(text) <= 200 else f"{text[:200]}…"


def _refuse_doubles(parts: Sequence[Shards]) -> None:
    seen: dict[str, Path] = {}
    for part in parts:
        for record in part.manifest.shards:
            path = part.folder / record.name
            if record.samples and record.sha256 in seen:
                raise UserError(f"{path}: has the same bytes as {seen[record.sha256]}; merge different shards")
            seen[record.sha256] = path


def _link_shard(
    part: Shards, record: ShardRecord, out: Path, name: str, members: tuple[str, ...], copy: bool
) -> ShardRecord:
    """One shard with its index under its new name. Raises UserError where a copy is not what it should be."""
    source = part.folder / record.name
    _link_or_copy(source, out / name, copy, record.sha256)
    own = part.manifest.members
    if record.layout is not None and {*own} == {*members}:
        layout = tuple(record.layout[own.index(member)] for member in members)
        return replace(record, name=name, layout=layout)
    if record.layout is not None:  # a layout cannot say that a member is absent
        index = scan(out / name)
    else:
        with part.open_index(record) as file:
            index = TarIndex(own, all_spans(file, record, own))
    path = out / index_name(name)
    write_bytes(path, index_bytes(index.columns(members)))
    return replace(record, name=name, stride=None, layout=None, index_sha256=sha256_file(path))


def _link_or_copy(source: Path, target: Path, copy: bool, sha256: str) -> None:
    try:
        if not copy:
            target.unlink(missing_ok=True)
            os.link(source.resolve(), target)
            return
    except OSError as error:
        if error.errno not in _NO_LINK:
            raise
    with written_aside(target) as aside:
        digest = hashlib.sha256()
        with open(source, "rb") as reading, open(aside, "wb") as writing:
            while block := reading.read(1 << 20):
                digest.update(block)
                writing.write(block)
        if digest.hexdigest() != sha256:
            raise UserError(f"{source}: sha256 {digest.hexdigest()}, but its manifest records {sha256}; copy it again")
