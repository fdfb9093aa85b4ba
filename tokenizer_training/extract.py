"""PROGRAM: turn image shards into token shards with a trained tokenizer.

    torchrun --nproc-per-node=8 -m tokenizer_training.extract CONFIG tokenizer=RUN images=SHARDS out=DIR

also plain ``python -m`` for one rank, or ``srun``. The same command again keeps the shards that are finished.
``text_encoder=T5`` puts the captions and their features into the token shards too.
A shard is one unit of work and is encoded in batches of one fixed shape that start at its first image, so its
bytes do not depend on the number of ranks or on where an earlier process was cut off.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch

from llamagen_dist.config import ExtractConfig, load
from llamagen_dist.console import LOG, Progress, main_rank_progress
from llamagen_dist.data.manifest import MANIFEST, Manifest, ShardRecord
from llamagen_dist.data.shards import CAPTION_MEMBER, LABEL_MEMBER, Shards, open_shards
from llamagen_dist.data.text_encoder import CaptionEncoder
from llamagen_dist.data.tokens import CODES_MEMBER, codes_bytes
from llamagen_dist.data.writer import Sample, ShardJob, label_text, shard_name
from llamagen_dist.errors import UserError
from llamagen_dist.models.quantizers import quantizer_of
from llamagen_dist.models.vq import VQModel
from llamagen_dist.parallel.topology import Topology, start
from llamagen_dist.program import run as run_program
from llamagen_dist.sampling.load import Tokenizer, load_tokenizer
from tokenizer_training.caption_features import CaptionFeatures
from tokenizer_training.crops import CropCoder

Finished = dict[int, tuple[ShardRecord, dict[str, Any]]]
"""Shard number -> its record, and what was counted in it."""


def main(argv: list[str]) -> None:
    if not argv:
        raise UserError("usage: python -m tokenizer_training.extract CONFIG tokenizer=PATH images=SHARDS out=DIR")
    config: ExtractConfig = load(argv[0], argv[1:], kind="extract")
    topology = start(threads=config.threads)
    torch.backends.cuda.matmul.allow_tf32 = False  # codes are chosen in full fp32
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cudnn.deterministic = True
    sets = image_sets(config)
    trained = tokenizer(config, topology)
    captions = caption_features(config, topology)
    coder = CropCoder(config, trained.model.to(topology.device))
    jobs = [Extraction(config, topology, coder, trained, captions, name, shards) for name, shards in sets.items()]
    # before any begins, so that a refusal of the last leaves nothing half-done
    topology.broadcast_from_rank0(lambda: [extraction.job.completed() for extraction in jobs])
    for extraction in jobs:
        extraction.run()


def image_sets(config: ExtractConfig) -> dict[str, Shards]:
    """Sub-folder name ("" for the folder itself) -> open image shards. Raises UserError where they do not fit."""
    folders: dict[str, str | Path] = {"": config.images}
    if isinstance(config.images, Path) and not (config.images / MANIFEST).exists() and config.images.is_dir():
        inner = sorted(folder for folder in config.images.iterdir() if (folder / MANIFEST).exists())
        folders = {folder.name: folder for folder in inner} or folders
    sets = {name: open_shards(folder, "images", config.data) for name, folder in folders.items()}
    needed = config.image_size
    if config.crops == "ten_crop":
        needed = int(config.image_size * max(config.crop_ranges, default=1.0))
    for shards in sets.values():
        size = shards.manifest.image_size
        fits = size is None or (size >= needed if config.crops == "ten_crop" else size == needed)
        if not fits:
            raise UserError(
                f"images: {shards.location} holds {size} x {size} pixels, but image_size: {config.image_size} "
                f"with crops: {config.crops} needs {needed} x {needed}; pack the images again, or change "
                "image_size or crops"
            )
        captioned = CAPTION_MEMBER in shards.manifest.members
        if config.text_encoder is not None and not captioned:
            raise UserError(
                f"text_encoder: {shards.location} has no captions ({CAPTION_MEMBER}) to encode; leave the key out, or "
                "pack images with captions"
            )
        if config.text_encoder is None and shards.manifest.classes is None:
            hint = "it has captions: set text_encoder=PATH" if captioned else "pack images with classes or captions"
            raise UserError(
                f"images: {shards.location} has no class labels ({LABEL_MEMBER}), and token shards need those or "
                f"encoded captions; {hint}"
            )
    return sets


def tokenizer(config: ExtractConfig, topology: Topology) -> Tokenizer:
    """The trained tokenizer. Raises UserError: not there, another kind, or codes that shards cannot hold."""

    def fits(model: VQModel) -> None:
        if model.config.codebook_size > 1 << 16:
            raise UserError(f"tokenizer: {model.config.codebook_size} codes do not fit into 16 bits (at most 65536)")
        if (why := model.config.uncoded(config.image_size)) is not None:
            raise UserError(f"image_size: {config.image_size} {why} {config.tokenizer}")

    return load_tokenizer(config.tokenizer, config.model, check=fits, topology=topology, weights=config.weights)


def caption_features(config: ExtractConfig, topology: Topology) -> CaptionFeatures | None:
    """None without ``text_encoder``. Raises UserError where there is none at that path."""
    if config.text_encoder is None:
        return None
    encoder = CaptionEncoder(config.text_encoder, topology.device, config.max_caption_tokens)
    return CaptionFeatures(encoder, str(config.text_encoder), config.max_caption_tokens, config.short_captions)


class Extraction:
    """One folder of image shards -> one folder of token shards."""

    def __init__(
        self,
        config: ExtractConfig,
        topology: Topology,
        coder: CropCoder,
        trained: Tokenizer,
        captions: CaptionFeatures | None,
        name: str,
        shards: Shards,
    ) -> None:
        self.config, self.topology, self.coder = config, topology, coder
        self.trained, self.captions, self.shards = trained, captions, shards
        self.members: tuple[str, ...] = (CODES_MEMBER,)
        if shards.manifest.classes is not None:
            self.members = (LABEL_MEMBER, *self.members)
        source: dict[str, Any] = {
            "made_by": "tokenizer_training.extract",
            "images": shards.manifest.fingerprint(),
            "tokenizer_sha256": trained.sha256,
            "image_size": config.image_size,
            "crops": config.crops,
            "crop_ranges": config.crop_ranges if config.crops == "ten_crop" else (),
            "precision": config.precision,
            "batch": config.batch,
            "samples_per_shard": config.samples_per_shard,
        }
        if captions is not None:
            self.members += captions.members
            source["captions"] = {key: value for key, value in asdict(captions.encoding).items() if key != "encoder"}
        self.job = ShardJob(config.out / name, source)
        self.label = f"tokens {name}".strip()
        self.stop = self.job.folder / ".stopped.tmp"
        """Exists once a rank had to stop: the others then end with their shard, not hours later."""

    def run(self) -> None:
        """Write the shards that are missing, then the manifest (collective; UserErrors on every rank)."""
        if self.topology.broadcast_from_rank0(self._begun):
            self.topology.log0(f"{self.job.folder}: complete already")
            return
        noticed = self.topology.broadcast_from_rank0(self._precision)
        count = -(-len(self.shards) // self.config.samples_per_shard)
        done = self._gathered(self._finished(range(self.topology.rank, count, self.topology.world)))
        missing = [shard for shard in range(count) if shard not in done]
        mine = missing[self.topology.rank :: self.topology.world]
        with main_rank_progress(
            self.label, sum(len(self._samples(shard)) for shard in mine), self.topology.rank, self.topology.world
        ) as progress:
            done |= self._gathered(*self._written(mine, progress))
        reports = [done[shard] for shard in range(count)]
        if self.captions is not None:
            for key in ("empty_captions", "captions_at_limit"):
                noticed[key] = sum(counts[key] for _, counts in reports)
        self.topology.broadcast_from_rank0(lambda: self._finish([record for record, _ in reports], noticed))
        for line in self._summary(noticed):
            self.topology.log0(f"{self.job.folder}: {line}")

    def _begun(self) -> bool:
        """Whether all is complete already. Rank 0 only."""
        if self.job.completed() is not None:
            return True
        if self.captions is not None and isinstance(self.config.images, Path):  # else it would fetch every shard
            self.captions.check(self.shards)
        self.job.begin()
        self.stop.unlink(missing_ok=True)
        return False

    def _precision(self) -> dict[str, Any]:
        """How many codes a rounded encoder changes. Rank 0 only."""
        if self.config.precision == "fp32":
            return {}
        changed, compared = self.coder.changed_codes(self.shards)
        share = f"{changed:,} of {compared:,} codes ({changed / compared:.2%})"
        LOG.info(f"{self.job.folder}: precision: bf16 changes {share} of fp32's, by comparison on a sample")
        return {"bf16_changed_codes": changed, "bf16_compared_codes": compared}

    def _finished(self, shards: Sequence[int]) -> Finished:
        """Those that an earlier process finished; every byte of them is read."""
        kept = {shard: self.job.finished(shard_name(shard)) for shard in shards}
        return {shard: finished for shard, finished in kept.items() if finished is not None}

    def _gathered(self, mine: Finished, refusal: str = "") -> Finished:
        """Every rank's (collective). Raises UserError on all of them where one was refused something."""
        reports = self.topology.gather((mine, refusal))
        if sentences := [sentence for _, sentence in reports if sentence]:
            raise UserError(sentences[0])
        return {shard: finished for report, _ in reports for shard, finished in report.items()}

    def _finish(self, records: Sequence[ShardRecord], noticed: dict[str, Any]) -> None:
        images = self.shards.manifest
        manifest = Manifest(
            kind="tokens",
            count=images.count,
            members=self.members,
            shards=tuple(records),
            classes=images.classes,
            image_size=self.config.image_size,
            padding=images.padding,
            source=self.job.source,
            tokenizer_sha256=self.trained.sha256,
            tokenizer_path=str(self.config.tokenizer),
            quantizer=quantizer_of(self.trained.model.state_dict()),
            vocab_size=self.trained.model.config.codebook_size,
            grid=self.coder.grid,
            order="prefix" if self.trained.model.config.tokens == "prefix" else None,
            crops=self.coder.crops,
            captions=None if self.captions is None else self.captions.encoding,
            noticed=noticed,
        )
        self.job.finish(manifest)

    def _summary(self, noticed: dict[str, Any]) -> Iterator[str]:
        text = f"{len(self.shards):,} images x {self.coder.crops} crops x {math.prod(self.coder.grid)} tokens"
        if self.captions is None:
            yield text
            return
        yield f"{text}, and captions of up to {self.config.max_caption_tokens} x {self.captions.encoding.dim} features"
        if empty := noticed["empty_captions"]:
            yield f"{empty:,} empty captions (once cleaned), encoded as the end mark alone"
        if cut := noticed["captions_at_limit"]:
            yield f"{cut:,} captions fill all {self.config.max_caption_tokens} tokens; anything beyond was cut"

    def _samples(self, shard: int) -> range:
        first = shard * self.config.samples_per_shard
        return range(first, min(first + self.config.samples_per_shard, len(self.shards)))

    def _written(self, shards: Sequence[int], progress: Progress | None) -> tuple[Finished, str]:
        """These shards, or those before a rank was refused something, and the sentence if it was this one."""
        written: Finished = {}
        for shard in shards:
            if self.stop.exists():
                break
            try:
                written[shard] = self._write(shard, progress)
            except UserError as error:
                with suppress(OSError):  # a full disk, perhaps
                    self.stop.touch()
                return written, str(error)
        return written, ""

    def _write(self, shard: int, progress: Progress | None) -> tuple[ShardRecord, dict[str, Any]]:
        counts = {} if self.captions is None else {"empty_captions": 0, "captions_at_limit": 0}
        record = self.job.write(shard_name(shard), self._encoded(shard, counts, progress), self.members, counts)
        return record, counts

    def _encoded(self, shard: int, counts: dict[str, int], progress: Progress | None) -> Iterator[Sample]:
        """The samples of one token shard."""
        samples, classes = self._samples(shard), self.shards.manifest.classes
        labels = None if classes is None else self.shards.labels(samples)
        rows = self.coder.rows(self.shards, samples)
        captions = None if self.captions is None else self.captions.parts(self.shards, samples, counts)
        for row, sample in enumerate(samples):
            parts: dict[str, bytes] = {}
            if classes is not None and labels is not None:
                parts[LABEL_MEMBER] = label_text(int(labels[row]), len(classes))
            parts[CODES_MEMBER] = codes_bytes(np.stack(list(islice(rows, self.coder.crops))))
            if captions is not None:
                parts |= next(captions)
            yield f"{sample:09d}", parts
            if progress is not None:
                progress.advance(1, shard_name(shard))


if __name__ == "__main__":
    run_program(main)
