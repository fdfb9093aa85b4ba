"""PROGRAM: turn image shards into token shards with a trained tokenizer.

    torchrun --nproc-per-node=8 -m tokenizer_training.extract CONFIG tokenizer=RUN images=SHARDS out=DIR

also plain ``python -m`` for one rank, or ``srun``. The same command again keeps the shards that are finished.
A shard is one unit of work and is encoded in batches of one fixed shape that start at its first image, so its
bytes do not depend on the number of ranks or on where an earlier process was cut off.
"""

from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from PIL import Image

from llamagen_dist.config import ExtractConfig, UserError, load
from llamagen_dist.data import images
from llamagen_dist.data.manifest import MANIFEST, Manifest, ShardRecord
from llamagen_dist.data.shard_writer import Sample, ShardJob, label_text, shard_name
from llamagen_dist.data.shards import LABEL_MEMBER, Shards, open_shards
from llamagen_dist.data.tokens import CODES_MEMBER, codes_bytes
from llamagen_dist.launch.entry import run as run_program
from llamagen_dist.models.vq import VQModel
from llamagen_dist.parallel.topology import Topology, start
from llamagen_dist.sampling.load import Tokenizer, load_tokenizer
from llamagen_dist.tracking.progress import Progress, main_rank_progress

MEMBERS = (LABEL_MEMBER, CODES_MEMBER)


def main(argv: list[str]) -> None:
    if not argv:
        raise UserError("usage: python -m tokenizer_training.extract CONFIG tokenizer=PATH images=SHARDS out=DIR")
    config: ExtractConfig = load(argv[0], argv[1:], kind="extract")
    topology = start(threads=config.threads)
    torch.backends.cuda.matmul.allow_tf32 = False  # codes are chosen in full fp32
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cudnn.deterministic = True
    sets = image_sets(config)
    trained = tokenizer(config)
    model = trained.model.to(topology.device)
    for name, shards in sets.items():
        Extraction(config, topology, model, trained.sha256, name, shards).run()


def image_sets(config: ExtractConfig) -> dict[str, Shards]:
    """Sub-folder name ("" for the folder itself) -> open image shards. Raises UserError where they do not
    fit.
    """
    folders = {"": config.images}
    if not (config.images / MANIFEST).exists() and config.images.is_dir():
        inner = sorted(folder for folder in config.images.iterdir() if (folder / MANIFEST).exists())
        folders = {folder.name: folder for folder in inner} or folders
    sets = {name: open_shards(folder, "images") for name, folder in folders.items()}
    needed = config.image_size
    if config.crops == "ten_crop":
        needed = int(config.image_size * max(config.crop_ranges, default=1.0))
    for shards in sets.values():
        size = shards.manifest.image_size
        fits = size is None or (size >= needed if config.crops == "ten_crop" else size == needed)
        if not fits:
            raise UserError(
                f"images: {shards.folder} holds {size} x {size} pixels, but image_size: {config.image_size} "
                f"with crops: {config.crops} needs {needed} x {needed}; pack the images again, or change "
                "image_size or crops"
            )
        if shards.manifest.classes is None:
            raise UserError(f"images: {shards.folder} has no class labels (.cls), which token shards must hold")
    return sets


def tokenizer(config: ExtractConfig) -> Tokenizer:
    """The trained tokenizer. Raises UserError: not there, another kind, or codes that shards cannot hold."""

    def fits(model: VQModel) -> None:
        if model.config.codebook_size > 1 << 16:
            raise UserError(f"tokenizer: {model.config.codebook_size} codes do not fit into 16 bits (at most 65536)")
        if config.image_size % model.config.downsampling:
            raise UserError(
                f"image_size: {config.image_size} is not a multiple of {model.config.downsampling}, the "
                f"pixels per token of {config.tokenizer}"
            )

    return load_tokenizer(config.tokenizer, config.model, check=fits)


class Extraction:
    """One folder of image shards -> one folder of token shards."""

    def __init__(
        self,
        config: ExtractConfig,
        topology: Topology,
        model: VQModel,
        sha256: str,
        name: str,
        shards: Shards,
    ) -> None:
        self.config, self.topology, self.model, self.shards = config, topology, model, shards
        self.ranges = config.crop_ranges if config.crops == "ten_crop" else ()
        self.crops = {"center": 1, "center_flip": 2, "ten_crop": 10 * len(self.ranges)}[config.crops]
        self.side = config.image_size // model.config.downsampling
        self.sha256 = sha256
        source = {
            "made_by": "tokenizer_training.extract",
            "images": shards.manifest.fingerprint(),
            "tokenizer_sha256": sha256,
            "image_size": config.image_size,
            "crops": config.crops,
            "crop_ranges": self.ranges,
            "batch": config.batch,
            "samples_per_shard": config.samples_per_shard,
        }
        self.job = ShardJob(config.out / name, source)
        self.label = f"tokens {name}".strip()

    def run(self) -> None:
        """Write the shards that are missing, then the manifest (collective; UserErrors on every rank)."""
        count = -(-len(self.shards) // self.config.samples_per_shard)
        kept = self.topology.agreed(lambda: self._finished(count))
        if kept is None:
            self.topology.say(f"{self.job.folder}: complete already")
            return
        missing = [shard for shard in range(count) if shard not in kept]
        mine = missing[self.topology.rank :: self.topology.world]
        with main_rank_progress(
            self.label, sum(len(self._samples(shard)) for shard in mine), self.topology.rank, self.topology.world
        ) as progress:
            written = {
                shard: self.job.write(shard_name(shard), self._encoded(shard, progress), MEMBERS) for shard in mine
            }
        reports: list[dict[int, ShardRecord]] = [written]
        if self.topology.world > 1:
            reports = [{} for _ in range(self.topology.world)]
            dist.all_gather_object(reports, written)
        for report in reports:
            kept |= report
        self.topology.agreed(lambda: self._finish([kept[shard] for shard in range(count)]))
        size = f"{len(self.shards):,} images x {self.crops} crops x {self.side * self.side} tokens"
        self.topology.say(f"{self.job.folder}: {size}")

    def _finished(self, count: int) -> dict[int, ShardRecord] | None:
        """Shards of an earlier process; None when all is complete. Rank 0 only: it reads them all."""
        if self.job.completed() is not None:
            return None
        self.job.begin()
        found = {shard: self.job.finished(shard_name(shard)) for shard in range(count)}
        return {shard: record[0] for shard, record in found.items() if record is not None}

    def _finish(self, records: Sequence[ShardRecord]) -> None:
        held = self.shards.manifest
        manifest = Manifest(
            kind="tokens",
            count=held.count,
            members=MEMBERS,
            shards=tuple(records),
            classes=held.classes,
            image_size=self.config.image_size,
            padding=held.padding,
            source=self.job.source,
            tokenizer_sha256=self.sha256,
            tokenizer_path=str(self.config.tokenizer),
            vocab_size=self.model.config.codebook_size,
            grid=(self.side, self.side),
            crops=self.crops,
        )
        self.job.finish(manifest)

    def _samples(self, shard: int) -> range:
        first = shard * self.config.samples_per_shard
        return range(first, min(first + self.config.samples_per_shard, len(self.shards)))

    def _encoded(self, shard: int, progress: Progress | None) -> Iterator[Sample]:
        """The samples of one token shard."""
        samples = self._samples(shard)
        labels = self.shards.labels(samples)
        classes = self.shards.manifest.num_classes
        rows = self._rows(samples)
        for sample, label in zip(samples, labels, strict=True):
            codes = codes_bytes(np.stack(list(islice(rows, self.crops))))
            yield f"{sample:09d}", {LABEL_MEMBER: label_text(int(label), classes), CODES_MEMBER: codes}
            if progress is not None:
                progress.advance(1, shard_name(shard))

    def _rows(self, samples: range) -> Iterator[NDArray[np.uint16]]:
        """uint16 [tokens] for every crop of every sample, encoded ``batch`` crops at a time."""
        waiting: list[NDArray[np.uint8]] = []
        for views in self._views(samples):
            waiting += views
            while len(waiting) >= self.config.batch:
                yield from self._encode(waiting[: self.config.batch])
                del waiting[: self.config.batch]
        if waiting:
            yield from self._encode(waiting)

    def _views(self, samples: range) -> Iterator[list[NDArray[np.uint8]]]:
        """The crops of each sample, uint8 [S, S, 3]; decoded a few images ahead when there are workers."""
        if self.config.workers == 0:
            yield from (self._cut(images.read_image(self.shards, sample)) for sample in samples)
            return
        ahead: deque[Future[list[NDArray[np.uint8]]]] = deque()
        with ThreadPoolExecutor(self.config.workers) as threads:
            for sample in samples:
                ahead.append(threads.submit(self._decode_and_cut, sample, self.shards.image_bytes(sample)))
                if len(ahead) > 4 * self.config.workers:
                    yield ahead.popleft().result()
            while ahead:
                yield ahead.popleft().result()

    def _decode_and_cut(self, sample: int, data: bytes) -> list[NDArray[np.uint8]]:
        return self._cut(images.decode_sample(self.shards, sample, data))

    def _cut(self, image: Image.Image) -> list[NDArray[np.uint8]]:
        size = self.config.image_size
        if self.ranges:
            views = [view for crop_range in self.ranges for view in images.ten_crops(image, size, crop_range)]
        else:
            centre = images.center_crop(image, size)
            views = [centre, images.flip(centre)][: self.crops]
        return [np.asarray(view) for view in views]

    def _encode(self, views: list[NDArray[np.uint8]]) -> list[NDArray[np.uint16]]:
        """uint8 [S, S, 3] each -> uint16 [tokens] each. The batch is filled up with zeros."""
        size = self.config.image_size
        pixels = np.zeros((self.config.batch, size, size, 3), np.uint8)
        pixels[: len(views)] = views
        codes = self.model.encode(images.to_floats(pixels).to(self.topology.device))
        return list(codes.reshape(len(pixels), -1)[: len(views)].cpu().numpy().astype(np.uint16))


if __name__ == "__main__":
    run_program(main)
