"""Packing images into shards: every shard is one unit of work, and its bytes depend only on source and options."""

import multiprocessing
import os
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from threading import Thread
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from llamagen_dist import prng
from llamagen_dist.config.pack import PackOptions
from llamagen_dist.console import LOG, Progress
from llamagen_dist.data.classes import ClassMap
from llamagen_dist.data.decode import DECODE_ERRORS
from llamagen_dist.data.formats import open_source
from llamagen_dist.data.index import printable
from llamagen_dist.data.manifest import MANIFEST, Manifest, ShardRecord
from llamagen_dist.data.order import position_to_sample
from llamagen_dist.data.recipe import Fit, ImageRecipe, TooSmall, opened, padding
from llamagen_dist.data.shards import CAPTION_MEMBER, LABEL_MEMBER, SHORT_CAPTION_MEMBER
from llamagen_dist.data.source import Caption, Source
from llamagen_dist.data.writer import Sample, ShardJob, label_text, shard_name
from llamagen_dist.errors import UserError


@dataclass
class LeftOut:
    """What a shard lacks of its source, and what was changed; all of it goes into the manifest."""

    skipped: list[list[str]] = field(default_factory=list)
    """[name, reason] of every sample that could not be read."""
    small: list[str] = field(default_factory=list)
    """The names of those that are too small."""
    changed: dict[str, int] = field(default_factory=dict)
    """How many pictures each of decode's sentences holds for."""

    def __len__(self) -> int:
        return len(self.skipped) + len(self.small)


Packed = tuple[ShardRecord, LeftOut]


@dataclass(frozen=True)
class _Split:
    """One folder of shards to write: which images, in which order (shuffled, for readers that stream)."""

    source: Source
    job: ShardJob
    numbers: NDArray[np.int64]
    options: PackOptions
    recipe: ImageRecipe

    @property
    def members(self) -> tuple[str, ...]:
        labels = () if self.source.labels is None else (LABEL_MEMBER,)
        captions = (SHORT_CAPTION_MEMBER, CAPTION_MEMBER) if self.source.caption is not None else ()
        return (*labels, *self.recipe.members, *captions)

    @property
    def shards(self) -> int:
        return -(-len(self.numbers) // self.options.samples_per_shard)

    def pack(self, shard: int) -> tuple[int, Packed]:
        """Write one shard; returns its number, its record and what was left out."""
        left_out = LeftOut()
        extra = vars(left_out)  # filled while the samples are made, read after them
        record = self.job.write(shard_name(shard), self._samples(shard, left_out), self.members, extra)
        return shard, (record, left_out)

    def finished(self, shard: int) -> Packed | None:
        """What an earlier process made of this shard, if it need not be made again."""
        earlier = self.job.finished(shard_name(shard))
        # a shard of a version that did not count changes may hold pixels that this one would change
        if earlier is None or "changed" not in earlier[1] or (earlier[1]["skipped"] and not self.options.skip_bad):
            return None
        return earlier[0], LeftOut(**earlier[1])

    def _samples(self, shard: int, left_out: LeftOut) -> Iterator[Sample]:
        first, source = shard * self.options.samples_per_shard, self.source
        for position in range(first, min(first + self.options.samples_per_shard, len(self.numbers))):
            number = int(self.numbers[position])
            try:
                member, data, changed = self.recipe.stored(source.picture(number))
                parts = {member: data}
                if source.caption is not None:
                    parts |= _caption_parts(source.caption(number))
            except TooSmall:
                left_out.small.append(source.title(number))
                continue
            except DECODE_ERRORS as error:
                left_out.skipped.append([source.title(number), _reason(error)])
                continue
            for change in changed:
                left_out.changed[change] = left_out.changed.get(change, 0) + 1
            if source.labels is not None:
                parts[LABEL_MEMBER] = label_text(int(source.labels[number]), len(source.classes or []))
            yield f"{position:09d}", parts


def _reason(error: BaseException) -> str:
    """Of a missing file the reason alone: its path is the picture's name."""
    return (error.strerror if isinstance(error, OSError) else None) or str(error) or type(error).__name__


def _caption_parts(caption: Caption) -> dict[str, bytes]:
    parts = {CAPTION_MEMBER: caption.text.encode()}
    return parts if caption.short is None else parts | {SHORT_CAPTION_MEMBER: caption.short.encode()}


def pack(source_name: str, out: Path, options: PackOptions) -> dict[str, Manifest]:
    """Pack a source (see open_source) into ``out``, or ``out/train`` and ``out/validation`` with
    ``held_out``.

    Returns folder name -> manifest ("" without held_out). What is already complete and made from the same
    source with the same options is left alone. Raises UserError: bad source, unreadable images (unless
    skip_bad), a folder that cannot be written or holds something else.
    """
    class_map = None if options.class_map is None else ClassMap.read(options.class_map)
    source = open_source(source_name, options, class_map)
    others = ("train", "validation") if options.held_out is None else (".",)
    if taken := next((out / name for name in others if (out / name / MANIFEST).exists()), None):
        raise UserError(f"{taken}: already holds shards made with another --held-out; choose another --out")
    for note in source.notes:
        LOG.info(note)
    fit, picture_size = _how_to_fit(source, options)
    recipe = ImageRecipe(options, fit, picture_size)
    # Only what is not the default, so that shards packed before an option existed are still known as the same.
    chosen = {
        {"max_pixels": "most_pixels"}.get(name, name): getattr(options, name)
        for name in ("format", "quality", "min_side", "max_pixels", "caption_key", "class_key")
        if getattr(options, name) != PackOptions.model_fields[name].default
    }
    if class_map is not None:
        chosen["class_map"] = class_map.sha256
    if source.class_order is not None:  # such shards made when folders were always sorted as text have other labels
        chosen["class_order"] = source.class_order
    if options.held_out is not None and source.repeats:
        raise UserError(
            f"{source.name}: {source.repeats} lines name a picture that an earlier line names, so --held-out could put "
            "one picture into both parts; write its captions into one line, as a list"
        )
    if options.held_out is None:
        parts = {"": np.arange(source.count)}
    else:
        count = int(options.held_out if options.held_out >= 1 else round(options.held_out * source.count))
        mask = held_out_mask(source.labels, source.count, count)
        parts = {"train": np.nonzero(~mask)[0], "validation": np.nonzero(mask)[0]}
    manifests = {}
    for name, numbers in parts.items():
        identity = {
            "made_by": "llamagen pack",
            "source": printable(Path(source.name).name),
            "fingerprint": source.fingerprint,
            "split": name,
            "images": len(numbers),
            "size": options.size,
            "fit": fit,
            "held_out": options.held_out,
            "samples_per_shard": options.samples_per_shard,
            **chosen,
        }
        shuffled = numbers[position_to_sample(np.arange(len(numbers)), len(numbers), 0)[1]]
        split = _Split(source, ShardJob(out / name, identity), shuffled, options, recipe)
        manifests[name] = split.job.completed() or _pack_split(split)
    return manifests


def held_out_mask(labels: NDArray[np.int64] | None, count: int, held_out: int) -> NDArray[np.bool_]:
    """bool [count], ``held_out`` of them True: the same share of every class, chosen by a hash of the image
    number.

    Where the shares are not whole numbers the largest remainders are rounded up.
    labels: int64 [count], or None for one class.
    Raises UserError when nothing would be left to train on.
    """
    if not 0 < held_out < count:
        raise UserError(f"--held-out {held_out}: there are {count} images; hold out fewer, and at least one")
    labels = np.zeros(count, np.int64) if labels is None else labels
    sizes = np.bincount(labels)
    exact = sizes * held_out / count
    quota = np.floor(exact).astype(np.int64)
    quota[np.argsort(quota - exact, kind="stable")[: held_out - int(quota.sum())]] += 1
    rank = prng.bits(0, "held-out", torch.arange(count)).to(torch.int64).numpy()
    mask = np.zeros(count, np.bool_)
    for label, wanted in enumerate(quota):
        members = np.nonzero(labels == label)[0]
        mask[members[np.argsort(rank[members], kind="stable")[:wanted]]] = True
    return mask


def _how_to_fit(source: Source, options: PackOptions) -> tuple[Fit, tuple[int, int] | None]:
    picture, size = source.uniform_size, options.size
    if size is None:
        return "crop", None
    fit = options.fit or ("pad" if picture and max(picture) <= size and picture != (size, size) else "crop")
    if fit == "crop":
        return fit, None
    for number in range(source.count):
        try:
            picture = picture or opened(source.picture(number), options.max_pixels)[0].size
            break
        except DECODE_ERRORS:
            continue  # it is named when its turn comes
    if picture is not None and max(picture) > size:
        raise UserError(
            f"--fit pad: the images of {source.name} are {picture[0]} x {picture[1]} pixels, larger than --size {size}"
        )
    return fit, picture


def _pack_split(split: _Split) -> Manifest:
    """Write the shards that are not there yet, then the manifest."""
    split.job.begin(restart=True)
    done = {shard: packed for shard in range(split.shards) if (packed := split.finished(shard)) is not None}
    label = f"packing {split.job.folder.name}"
    with Progress(label, len(split.numbers)) as progress:
        progress.advance(sum(record.samples + len(left_out) for record, left_out in done.values()))
        for shard, packed in _each_shard(split, [n for n in range(split.shards) if n not in done]):
            done[shard] = packed
            progress.advance(packed[0].samples + len(packed[1]), packed[0].name)
    records = tuple(done[shard][0] for shard in range(split.shards))
    bad = [item for shard in range(split.shards) for item in done[shard][1].skipped]
    small = [name for shard in range(split.shards) for name in done[shard][1].small]
    changed = Counter[str]()
    for shard in range(split.shards):
        changed.update(done[shard][1].changed)
    count = sum(record.samples for record in records)
    if bad and not (split.options.skip_bad and count):
        advice = "none is left" if not count else "delete or replace them, or leave them out with --skip-bad"
        raise UserError(
            f"{split.source.name}: {len(bad)} of {len(split.numbers)} images cannot be read, the first is "
            f"{bad[0][0]} ({bad[0][1]}); {advice}"
        )
    if not count:
        raise UserError(
            f"{split.source.name}: all {len(small)} images are smaller than --min-side {split.options.min_side}"
        )
    size, picture = split.options.size, split.recipe.picture_size
    uniform = split.source.uniform_size
    square = uniform[0] if uniform is not None and uniform[0] == uniform[1] else None
    manifest = Manifest(
        kind="images",
        count=count,
        members=split.members,
        shards=records,
        classes=split.source.classes,
        image_size=size if size is not None else square,
        padding=padding(picture, size) if picture is not None and size is not None else None,
        skipped=tuple(sorted(name for name, _ in bad)),
        too_small=tuple(sorted(small)),
        source=split.job.source,
        noticed={
            key: value
            for key, value in (("changed", dict(sorted(changed.items()))), ("source", split.source.notes))
            if value
        },
    )
    split.job.finish(manifest)
    return manifest


def summary(manifest: Manifest) -> list[str]:
    """What became of a source, as sentences: the shards, then what was left out or changed."""
    classes = f", {len(manifest.classes)} classes" if manifest.classes else ""
    skipped = f", {len(manifest.skipped)} unreadable images left out" if manifest.skipped else ""
    small = f", {len(manifest.too_small)} left out below --min-side" if manifest.too_small else ""
    captions = ", with captions" if CAPTION_MEMBER in manifest.members else ""
    shards = f"{manifest.count:,} images in {len(manifest.shards)} shards"
    changed = [f"{many:,} images {what}" for what, many in manifest.noticed.get("changed", {}).items()]
    return [f"{shards}{classes}{captions}{skipped}{small}", *changed]


_split_of_worker: _Split | None = None


def _begin_worker(split: _Split, parent: int) -> None:
    global _split_of_worker  # the source reaches forked workers without being pickled
    _split_of_worker = split
    Thread(target=_leave_without, args=(parent,), daemon=True).start()


def _leave_without(parent: int) -> None:
    """End this worker when the main process was killed: it would wait for work forever."""
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)


def _pack_in_worker(shard: int) -> tuple[int, Packed]:
    assert _split_of_worker is not None
    return _split_of_worker.pack(shard)


def _each_shard(split: _Split, pending: list[int]) -> Iterator[tuple[int, Packed]]:
    jobs = min(split.options.jobs, len(pending))
    if jobs <= 1:
        yield from map(split.pack, pending)
        return
    with ExitStack() as stack:
        pool: Any = stack.enter_context(
            ProcessPoolExecutor(jobs, multiprocessing.get_context("fork"), _begin_worker, (split, os.getpid()))
        )
        stack.callback(pool.shutdown, cancel_futures=True)
        try:
            for future in as_completed([pool.submit(_pack_in_worker, shard) for shard in pending]):
                yield future.result()
        except BrokenProcessPool:
            raise UserError(
                f"{split.job.folder}: one of the {jobs} packing processes was killed, perhaps for want of memory; "
                "run the same command again with fewer --jobs"
            ) from None
