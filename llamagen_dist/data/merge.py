"""Several folders of shards become one, without reading their samples again."""

import errno
import hashlib
import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from llamagen_dist.data.index import TarIndex, all_spans, index_bytes, index_name, scan
from llamagen_dist.data.manifest import Manifest, ShardRecord
from llamagen_dist.data.shard_writer import ShardJob, refused_when_full, shard_name
from llamagen_dist.data.shards import IMAGE_MEMBERS, Shards, open_shards
from llamagen_dist.errors import UserError
from llamagen_dist.files import sha256_file, write_bytes, written_aside

_NO_LINK = (errno.EXDEV, errno.EPERM, errno.EMLINK, errno.EOPNOTSUPP, errno.EACCES)


def merge(
    folders: Sequence[Path],
    out: Path,
    copy: bool = False,
    advance: Callable[[int, str], None] = lambda count, text: None,
) -> Manifest:
    """Put the shards of ``folders`` into ``out``: all of the first folder in its order, then all of the second, …

    The tars become hard links where the file system has them (a shard is never changed once it is written), else
    copies, which are compared with their sha256. copy: always copy. advance: called with (1, shard name) after each
    shard. Raises UserError: fewer than two folders, shards that do not go together (another kind, tokenizer, grid,
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
                records.append(_place(part, record, out, name, members, copy))
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
    reasons = []

    def compare(what: str, one: Any, two: Any) -> None:
        if one != two:
            reasons.append(f"{what}: {_short(one)} and {_short(two)}")

    compare("the tokenizers differ (sha256)", first.tokenizer_sha256, other.tokenizer_sha256)
    compare("codes", first.vocab_size, other.vocab_size)
    compare("grid of tokens", first.grid, other.grid)
    compare("crops per image", first.crops, other.crops)
    compare("image size", first.image_size, other.image_size)
    compare("padding", first.padding, other.padding)
    if first.classes != other.classes:
        reasons.append(_class_difference(first.classes, other.classes))
    # The encoder's path says nothing: equal hashes mean equal features.
    encodings = [m.captions and replace(m.captions, encoder="") for m in (first, other)]
    compare("the captions were encoded differently", *encodings)
    pictures = {*IMAGE_MEMBERS} if first.kind == "images" else set[str]()
    compare("parts of a sample", *(sorted({*m.members} - pictures) for m in (first, other)))
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
                raise UserError(
                    f"{path}: has the same bytes as {seen[record.sha256]}, so its samples would be there twice; merge "
                    "different shards"
                )
            seen[record.sha256] = path


def _place(
    part: Shards, record: ShardRecord, out: Path, name: str, members: tuple[str, ...], copy: bool
) -> ShardRecord:
    """One shard with its index under its new name. Raises UserError where a copy is not what it should be."""
    source = part.folder / record.name
    _link_or_copy(source, out / name, copy, record.sha256)
    held = part.manifest.members
    if record.layout is not None and {*held} == {*members}:
        layout = tuple(record.layout[held.index(member)] for member in members)
        return replace(record, name=name, layout=layout)
    if record.layout is not None:  # a layout cannot say that a member is absent
        index = scan(out / name)
    else:
        with part.open_index(record) as file:
            index = TarIndex(held, all_spans(file, record, held))
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
