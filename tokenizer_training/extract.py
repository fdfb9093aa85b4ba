"""PROGRAM: turn image shards into token shards with a trained tokenizer.

    torchrun --nproc-per-node=8 -m tokenizer_training.extract CONFIG tokenizer=RUN images=SHARDS out=DIR

also plain ``python -m`` for one rank, or ``srun``. The same command again keeps the shards that are finished.
A shard is one unit of work and is encoded in batches of one fixed shape that start at its first image, so its
bytes do not depend on the number of ranks or on where an earlier process was cut off.
"""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from itertools import islice
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from PIL import Image

from llamagen_dist.checkpoint.store import identity, read_config, read_weights
from llamagen_dist.config import ExtractConfig, TokenizerConfigFile, TokenizerModelSection, UserError, load
from llamagen_dist.data import images
from llamagen_dist.data.manifest import MANIFEST, Manifest, ShardRecord
from llamagen_dist.data.shard_writer import Sample, ShardJob, label_text, shard_name
from llamagen_dist.data.shards import LABEL_MEMBER, Shards, open_shards
from llamagen_dist.data.tokens import CODES_MEMBER, codes_bytes
from llamagen_dist.launch.entry import run as run_program
from llamagen_dist.models.vq import VQModel
from llamagen_dist.parallel.topology import Topology, start
from llamagen_dist.tracking.progress import Progress
from llamagen_dist.training.build import build_vq

T = TypeVar("T")
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
    model = tokenizer(config).to(topology.device)
    sha256 = _agreed(topology, lambda: identity(config.tokenizer))
    for name, shards in sets.items():
        Extraction(config, topology, model, sha256, name, shards).run()


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


def tokenizer(config: ExtractConfig) -> VQModel:
    """The trained tokenizer, in evaluation mode. Raises UserError: not there, another kind, does not fit."""
    if not config.tokenizer.exists():
        raise UserError(f"tokenizer: {config.tokenizer} does not exist; give a run directory or a weights file")
    section: TokenizerModelSection | None = config.model
    trained = read_config(config.tokenizer)
    if trained is not None:
        if not isinstance(trained, TokenizerConfigFile):
            raise UserError(f"tokenizer: {config.tokenizer} is not a tokenizer's run")
        section = trained.model
    if section is None:
        raise UserError(f"tokenizer: {config.tokenizer} is a bare weights file; say what it is, as in model.size=VQ-16")
    model = build_vq(section)
    if model.config.codebook_size > 1 << 16:
        raise UserError(f"tokenizer: {model.config.codebook_size} codes do not fit into 16 bits (at most 65536)")
    if config.image_size % model.config.downsampling:
        raise UserError(
            f"image_size: {config.image_size} is not a multiple of {model.config.downsampling}, the "
            f"pixels per token of {config.tokenizer}"
        )
    weights = read_weights(config.tokenizer)
    weights.setdefault("quantize.codebook_used", model.state_dict()["quantize.codebook_used"])  # a statistic
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        first = " ".join(str(error).split())[:300]
        raise UserError(f"tokenizer: the weights in {config.tokenizer} do not fit its sizes: {first}") from None
    return model.eval()


def _agreed(topology: Topology, decide: Callable[[], T]) -> T:
    """What ``decide()`` returns on rank 0, on every rank; a UserError there is raised everywhere."""
    answer: list[Any] = [None, None]
    if topology.rank == 0:
        try:
            answer[0] = decide()
        except UserError as error:
            answer[1] = str(error)
    if topology.world > 1:
        dist.broadcast_object_list(answer, src=0)
    if answer[1] is not None:
        raise UserError(answer[1])
    result: T = answer[0]
    return result


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
        kept = _agreed(self.topology, lambda: self._finished(count))
        if kept is None:
            self._say(f"{self.job.folder}: complete already")
            return
        missing = [shard for shard in range(count) if shard not in kept]
        mine = missing[self.topology.rank :: self.topology.world]
        with self._progress(sum(len(self._samples(shard)) for shard in mine)) as progress:
            written = {
                shard: self.job.write(shard_name(shard), self._encoded(shard, progress), MEMBERS) for shard in mine
            }
        reports: list[dict[int, ShardRecord]] = [written]
        if self.topology.world > 1:
            reports = [{} for _ in range(self.topology.world)]
            dist.all_gather_object(reports, written)
        for report in reports:
            kept |= report
        _agreed(self.topology, lambda: self._finish([kept[shard] for shard in range(count)]))
        size = f"{len(self.shards):,} images x {self.crops} crops x {self.side * self.side} tokens"
        self._say(f"{self.job.folder}: {size}")

    def _say(self, text: str) -> None:
        if self.topology.rank == 0:
            print(text, flush=True)

    def _progress(self, images_of_rank: int) -> AbstractContextManager[Progress | None]:
        if self.topology.rank != 0:
            return nullcontext()
        whose = "" if self.topology.world == 1 else f" (rank 0 of {self.topology.world})"
        return Progress(self.label + whose, images_of_rank)

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
