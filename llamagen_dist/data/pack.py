"""Packing images into shards: every shard is one unit of work, and its bytes depend only on source and
options.
"""

import io
import multiprocessing
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from llamagen_dist import prng
from llamagen_dist.config import UserError
from llamagen_dist.data.images import DECODE_ERRORS, center_crop
from llamagen_dist.data.manifest import MANIFEST, Manifest, ShardRecord
from llamagen_dist.data.order import position_to_sample
from llamagen_dist.data.shard_writer import Sample, ShardJob, label_text, shard_name
from llamagen_dist.data.shards import LABEL_MEMBER
from llamagen_dist.data.sources import Source, open_source
from llamagen_dist.tracking.progress import Progress

Fit = Literal["crop", "pad"]


@dataclass(frozen=True)
class PackOptions:
    """size: side in pixels, None = images stay as they are. held_out: images (>= 1) or a share (< 1) kept
    apart.

    fit: ``crop`` scales and centre-crops (ADM's way), ``pad`` puts zeros around smaller images, None chooses
    pad for arrays smaller than size and crop for all else. skip_bad: leave unreadable images out, and list
    them in the manifest. jobs: processes.
    """

    size: int | None = None
    held_out: float | None = None
    fit: Fit | None = None
    skip_bad: bool = False
    samples_per_shard: int = 2500
    jobs: int = 1


def held_out_mask(labels: NDArray[np.int64] | None, count: int, held_out: int) -> NDArray[np.bool_]:
    """bool [count], ``held_out`` of them True: the same share of every class, chosen by a hash of the image
    number.

    labels: int64 [count], or None for one class. Where the shares are not whole numbers the largest
    remainders are rounded up. Raises UserError when nothing would be left to train on.
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


@dataclass(frozen=True)
class _Split:
    """One folder of shards to write: which images, in which order (shuffled, for readers that stream)."""

    source: Source
    job: ShardJob
    numbers: NDArray[np.int64]
    options: PackOptions
    fit: Fit
    picture_size: tuple[int, int] | None
    """pad: the one (width, height) that all images must have."""

    @property
    def members(self) -> tuple[str, ...]:
        images = (".png",) if self.options.size is not None else (".jpg", ".png")
        return images if self.source.labels is None else (LABEL_MEMBER, *images)

    @property
    def shards(self) -> int:
        return -(-len(self.numbers) // self.options.samples_per_shard)

    def pack(self, shard: int) -> tuple[int, ShardRecord, list[list[str]]]:
        """Write one shard; returns its number, its record and [name, reason] of every unreadable image."""
        bad: list[list[str]] = []
        record = self.job.write(shard_name(shard), self._samples(shard, bad), self.members, {"skipped": bad})
        return shard, record, bad

    def _samples(self, shard: int, bad: list[list[str]]) -> Iterator[Sample]:
        first = shard * self.options.samples_per_shard
        for place in range(first, min(first + self.options.samples_per_shard, len(self.numbers))):
            number = int(self.numbers[place])
            try:
                member, data = self._encoded(number)
            except DECODE_ERRORS as error:
                bad.append([self.source.title(number), str(error) or type(error).__name__])
                continue
            parts = {member: data}
            if self.source.labels is not None:
                parts[LABEL_MEMBER] = label_text(int(self.source.labels[number]), len(self.source.classes or []))
            yield f"{place:09d}", parts

    def _encoded(self, number: int) -> tuple[str, bytes]:
        image = self.source.image(number)
        size = self.options.size
        if size is None:
            original = self.source.original(number)
            return original if original is not None else (".png", _png(image))
        if self.fit == "crop":
            return ".png", _png(center_crop(image, size))
        if image.size != self.picture_size:
            raise ValueError(f"{image.width} x {image.height} pixels, where the others are {self.picture_size}")
        canvas = Image.new("RGB", (size, size))
        canvas.paste(image, _padding(image.size, size)[:2])
        return ".png", _png(canvas)


def _png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def _padding(picture: tuple[int, int], size: int) -> tuple[int, int, int, int]:
    """Zero pixels (left, top, right, bottom) around a (width, height) picture; an odd one goes right or
    below.
    """
    left, top = ((size - side) // 2 for side in picture)
    return left, top, size - picture[0] - left, size - picture[1] - top


def pack(source_name: str, out: Path, options: PackOptions) -> dict[str, Manifest]:
    """Pack a source (see open_source) into ``out``, or ``out/train`` and ``out/validation`` with
    ``held_out``.

    Returns folder name -> manifest ("" without held_out). What is already complete and made from the same
    source with the same options is left alone. Raises UserError: bad source, unreadable images (unless
    skip_bad), a folder that cannot be written or holds something else.
    """
    source = open_source(source_name)
    others = ("train", "validation") if options.held_out is None else (".",)
    if taken := next((out / name for name in others if (out / name / MANIFEST).exists()), None):
        raise UserError(f"{taken}: already holds shards made with another --held-out; choose another --out")
    fit, picture_size = _how_to_fit(source, options)
    if options.held_out is None:
        parts = {"": np.arange(len(source))}
    else:
        count = int(options.held_out if options.held_out >= 1 else round(options.held_out * len(source)))
        mask = held_out_mask(source.labels, len(source), count)
        parts = {"train": np.nonzero(~mask)[0], "validation": np.nonzero(mask)[0]}
    manifests = {}
    for name, numbers in parts.items():
        identity = {
            "made_by": "llamagen pack",
            "source": Path(source.name).name,
            "fingerprint": source.fingerprint,
            "split": name,
            "images": len(numbers),
            "size": options.size,
            "fit": fit,
            "held_out": options.held_out,
            "samples_per_shard": options.samples_per_shard,
        }
        shuffled = numbers[position_to_sample(np.arange(len(numbers)), len(numbers), 0)[1]]
        split = _Split(source, ShardJob(out / name, identity), shuffled, options, fit, picture_size)
        manifests[name] = split.job.completed() or _pack_split(split)
    return manifests


def _how_to_fit(source: Source, options: PackOptions) -> tuple[Fit, tuple[int, int] | None]:
    picture, size = source.uniform_size, options.size
    if size is None:
        return "crop", None
    fit = options.fit or ("pad" if picture and max(picture) <= size and picture != (size, size) else "crop")
    if fit == "crop":
        return fit, None
    for number in range(len(source)):
        try:
            picture = picture or source.image(number).size
            break
        except DECODE_ERRORS:
            continue  # it is named when its turn comes
    if picture is not None and max(picture) > size:
        raise UserError(
            f"--fit pad: the images of {source.name} are {picture[0]} x {picture[1]} pixels, larger than "
            f"--size {size}; use --fit crop or a larger --size"
        )
    return fit, picture


def _pack_split(split: _Split) -> Manifest:
    """Write the shards that are not there yet, then the manifest."""
    split.job.begin(restart=True)
    done: dict[int, tuple[ShardRecord, list[list[str]]]] = {}
    for shard in range(split.shards):
        found = split.job.finished(shard_name(shard))
        if found is not None and (split.options.skip_bad or not found[1]["skipped"]):
            done[shard] = (found[0], found[1]["skipped"])
    label = f"packing {split.job.folder.name}"
    with Progress(label, len(split.numbers)) as progress:
        progress.advance(sum(record.samples for record, _ in done.values()))
        for shard, record, bad in _each_shard(split, [n for n in range(split.shards) if n not in done]):
            done[shard] = (record, bad)
            progress.advance(record.samples + len(bad), record.name)
    records = tuple(done[shard][0] for shard in range(split.shards))
    bad = [item for shard in range(split.shards) for item in done[shard][1]]
    count = len(split.numbers) - len(bad)
    if bad and not (split.options.skip_bad and count):
        advice = "none is left" if not count else "delete or replace them, or leave them out with --skip-bad"
        raise UserError(
            f"{split.source.name}: {len(bad)} of {len(split.numbers)} images cannot be read, the first is "
            f"{bad[0][0]} ({bad[0][1]}); {advice}"
        )
    size, picture = split.options.size, split.picture_size
    uniform = split.source.uniform_size
    square = uniform[0] if uniform is not None and uniform[0] == uniform[1] else None
    manifest = Manifest(
        kind="images",
        count=count,
        members=split.members,
        shards=records,
        classes=split.source.classes,
        image_size=size if size is not None else square,
        padding=_padding(picture, size) if picture is not None and size is not None else None,
        skipped=tuple(sorted(name for name, _ in bad)),
        source=split.job.source,
    )
    split.job.finish(manifest)
    return manifest


_split_of_worker: _Split | None = None


def _begin_worker(split: _Split) -> None:
    global _split_of_worker  # the source reaches forked workers without being pickled
    _split_of_worker = split


def _pack_in_worker(shard: int) -> tuple[int, ShardRecord, list[list[str]]]:
    assert _split_of_worker is not None
    return _split_of_worker.pack(shard)


def _each_shard(split: _Split, pending: list[int]) -> Iterator[tuple[int, ShardRecord, list[list[str]]]]:
    jobs = min(split.options.jobs, len(pending))
    if jobs <= 1:
        yield from map(split.pack, pending)
        return
    with ExitStack() as stack:
        pool: Any = stack.enter_context(
            ProcessPoolExecutor(jobs, multiprocessing.get_context("fork"), _begin_worker, (split,))
        )
        stack.callback(pool.shutdown, cancel_futures=True)
        for future in as_completed([pool.submit(_pack_in_worker, shard) for shard in pending]):
            yield future.result()
