"""PROGRAM: held-out images through the tokenizer and back: PSNR, SSIM, LPIPS, codebook usage and (rfid=true) rFID.

    torchrun --nproc-per-node=8 -m eval.reconstruct CONFIG tokenizer=RUN images=SHARDS out=DIR

also plain ``python -m`` for one rank, or ``srun``. The same command again resumes where it was cut off. Images are
computed at the same position of the same batch shape on any number of ranks, so the files' bytes do not depend on it.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from llamagen_dist.config import EvaluateConfig, LPIPSSection, ReconstructConfig, load
from llamagen_dist.console import LOG
from llamagen_dist.data.images import load_images, to_floats
from llamagen_dist.data.shards import LABEL_MEMBER, Shards, open_shards
from llamagen_dist.errors import UserError
from llamagen_dist.evaluation import passport, scoring
from llamagen_dist.evaluation.image_quality import SSIM_WINDOW, psnr, psnr_pooled, ssim, ssim_llamagen, unpadded
from llamagen_dist.evaluation.image_sets import first_of, open_images
from llamagen_dist.evaluation.mistakes import of_statistics, range_of_ssim
from llamagen_dist.evaluation.perceptual import LPIPS, SMALLEST_SIDE, large_enough
from llamagen_dist.evaluation.perturbed import perturb
from llamagen_dist.evaluation.rate import shortest_prefixes
from llamagen_dist.files import read_json
from llamagen_dist.parallel.topology import Topology, full_fp32, start
from llamagen_dist.program import run as run_program
from llamagen_dist.sampling.chunks import Chunk, ChunkFolder, write_npz
from llamagen_dist.sampling.load import Tokenizer, check_first_tokens, load_tokenizer
from llamagen_dist.sampling.pictures import decode_tokens
from llamagen_dist.tracking.provenance import versions

SET = "reconstruction"
RESULT, RFID, PERTURBED = f"{SET}.npz", "rfid.json", "perturbed.npz"
METRICS = {"psnr": psnr, "ssim": ssim, "ssim_llamagen": ssim_llamagen}


def main(argv: list[str]) -> None:
    if not argv:
        raise UserError("usage: python -m eval.reconstruct CONFIG tokenizer=PATH images=SHARDS out=DIR [key=value …]")
    config: ReconstructConfig = load(argv[0], argv[1:], kind="reconstruct")
    topology = start(threads=config.threads)
    full_fp32()  # codes are chosen so
    tokenizer = load_tokenizer(config.tokenizer, config.model, topology=topology, weights=config.weights)
    images, size = open_shards(config.images, "images"), picture_size(config, tokenizer)
    if config.reference is not None:
        check_reference(config, config.reference, images, size)  # hours before it is needed
    if (stored := images.manifest.image_size) is not None and stored < size:
        topology.log0(f"image_size: {config.images} holds {stored} x {stored} pixels, which are enlarged to {size}")
    if tokenizer.trained_on == images.manifest.fingerprint():
        topology.log0(f"images: {tokenizer.path} was trained on {config.images}: these scores are not held-out ones")
    Reconstruction(config, topology, tokenizer, images, size).run()


def picture_size(config: ReconstructConfig, tokenizer: Tokenizer) -> int:
    """Pixels along a side. Raises UserError where nothing says it or the tokenizer cannot cut it into tokens."""
    size, factor = config.image_size or tokenizer.image_size, tokenizer.model.config.downsampling
    if size is None:
        raise UserError(
            f"image_size: the weights file {tokenizer.path} does not know it; set image_size=256, for example"
        )
    if size % factor == 0 and (why := tokenizer.model.config.uncoded(size)) is not None:
        raise UserError(f"image_size: {size} {why} {tokenizer.path}")
    if size % factor or size < SSIM_WINDOW:
        raise UserError(
            f"image_size: {size} must be a multiple of {factor}, the pixels per token of {tokenizer.path}, and at "
            f"least {SSIM_WINDOW} for SSIM"
        )
    return size


def check_reference(config: ReconstructConfig, path: Path, images: Shards, size: int) -> None:
    """Raises UserError where the reference of the rFID is not of these images, cropped and scaled alike, as far as it
    says what it is of; pictures are looked at later."""
    reference, compared = open_images(path, size, True, config.resize_to), min(size, config.resize_to or size)
    known = passport.provenance(reference)
    has = known.get("size") if reference.statistics else [reference.width, reference.height]
    if has is not None and has != [compared, compared]:
        raise UserError(
            f"reference: {path} is of {has[0]} x {has[1]} pixels, but reconstructions of {size} x {size} are compared "
            f"at {compared} x {compared}; crop and scale both alike (image_size, resize_to)"
        )
    if reference.statistics:
        for one in of_statistics("reference", reference, images.manifest.fingerprint(), (size, size), known):
            if one.certain:
                raise UserError(f"reference: {one.mistake}: {one.what}")


class Reconstruction:
    """One folder of image shards, chunk by chunk."""

    def __init__(
        self, config: ReconstructConfig, topology: Topology, tokenizer: Tokenizer, images: Shards, size: int
    ) -> None:
        self.config, self.topology, self.tokenizer, self.images, self.size = config, topology, tokenizer, images, size
        tokenizer.model.to(topology.device)
        self.count = min(config.limit or len(images), len(images))
        known = tokenizer.trained_on
        self.seen = None if known is None else known == images.manifest.fingerprint()
        self.region = unpadded(images.manifest.padding, size, images.manifest.image_size)
        check_first_tokens(tokenizer, config.first_tokens, "first_tokens")
        if config.least_psnr is not None:  # which needs prefixes as the first of one token is
            check_first_tokens(tokenizer, 1, "least_psnr")
        made_from: dict[str, Any] = {
            "tokenizer_sha256": tokenizer.sha256,
            "images": images.manifest.fingerprint(),
            "image_size": size,
            "n": self.count,
            "batch": config.batch,
            "first_tokens": config.first_tokens,
            "least_psnr": config.least_psnr,
        }
        self.lpips: LPIPS | None = None
        self.scored = [*METRICS, *(["tokens"] if tokenizer.model.config.token_count is not None else [])]
        if config.lpips is not None:
            self.lpips = self._open_lpips(config.lpips)
            self.scored.append(self.lpips.name)
            made_from["lpips_trunk"] = self.lpips.trunk.sha256
        self.neighbours: Tensor | None = None
        results = [RESULT]
        if config.perturb is not None:
            self.neighbours = self._neighbours(config.perturb.neighbours)
            made_from["perturbed"] = config.perturb.model_dump()
            results.append(PERTURBED)
        self.output = ChunkFolder(config.out, made_from, results, topology, [SET], self.count, config.batch)

    def _open_lpips(self, section: LPIPSSection) -> LPIPS:
        if not large_enough(self.size, self.region):
            raise UserError(f"lpips: needs pictures of at least {SMALLEST_SIDE} x {SMALLEST_SIDE} pixels; leave it out")
        return LPIPS(section.trunk, section.weights, "lpips.weights", "leave lpips out").to(self.topology.device)

    def _neighbours(self, count: int) -> Tensor:
        codes = self.tokenizer.model.config.codebook_size
        if count >= codes:
            raise UserError(f"perturb.neighbours: {count} needs a codebook of more than {codes} codes; lower it")
        every = torch.arange(codes, device=self.topology.device)
        return self.tokenizer.model.quantize.neighbours(every, count).cpu()

    def run(self) -> None:
        """Compute what is missing, then write the results (collective; UserErrors on every rank)."""
        if (missing := self.output.missing()) is not None:
            self.output.make(
                missing, "reconstructions", lambda chunks: ((chunk, self._arrays(chunk)) for chunk in chunks)
            )
            averages = self.topology.broadcast_from_rank0(self._finish)
            shown = ", ".join(f"{name} {value:.4g}" for name, value in averages.items())
            self.topology.log0(f"{self.config.out}: {self.count:,} images, {shown}")
        elif self.config.claimed_ssim is not None:
            self.topology.broadcast_from_rank0(self._add_claim)
        if self.config.rfid:
            self._measure_rfid()

    def _arrays(self, chunk: Chunk) -> dict[str, NDArray[Any]]:
        """images uint8 [n, S, S, 3], codes int64 [n, N], and one float64 [n] per metric. The batch is filled up.

        perturbed: uint8 [n, S, S, 3], where it is wanted.
        """
        n = len(chunk.samples)
        originals = np.zeros((self.config.batch, self.size, self.size, 3), np.uint8)
        originals[:n] = load_images(self.images, chunk.samples, self.size)
        codes = self.tokenizer.model.encode(to_floats(originals).to(self.topology.device)).flatten(1)
        codes = codes[:, : self.config.first_tokens]
        lengths = torch.full((len(codes),), codes.shape[1])
        if (least := self.config.least_psnr) is not None:
            pixels = torch.from_numpy(originals).permute(0, 3, 1, 2)
            lengths = shortest_prefixes(self.tokenizer.model, codes.unsqueeze(1), pixels, least, self.region)
        rebuilt = decode_tokens(self.tokenizer.model, codes, lengths)
        shown, truth = (torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous() for pixels in (rebuilt, originals))
        arrays = {metric: score(shown[:n], truth[:n], self.region).numpy() for metric, score in METRICS.items()}
        if self.lpips is not None:  # of the whole batch: its shape may decide the last bits
            arrays[self.lpips.name] = self.lpips.distances(shown, truth, self.region)[:n].numpy()
        if self.neighbours is not None and self.config.perturb is not None:
            section, start = self.config.perturb, chunk.samples.start
            numbers = torch.arange(start, start + self.config.batch)
            changed = perturb(codes.cpu(), self.neighbours, section.share, section.seed, numbers)
            arrays["perturbed"] = decode_tokens(self.tokenizer.model, changed)[:n]
        arrays["tokens"] = lengths[:n].numpy().astype(np.float64)
        return {"images": rebuilt[:n], "codes": codes[:n].cpu().numpy(), **arrays}

    def _finish(self) -> dict[str, float]:
        """reconstruction.npz and the record with the averages. Rank 0 only."""
        labels = None
        if LABEL_MEMBER in self.images.manifest.members and self.images.manifest.classes is not None:
            labels = self.images.labels(range(self.count))
        quantizer = self.tokenizer.model.quantize
        counts = torch.zeros(quantizer.codebook_size, dtype=torch.int64)
        scores: dict[str, list[NDArray[np.float64]]] = {metric: [] for metric in self.scored}

        def blocks() -> Iterator[NDArray[np.uint8]]:
            for _, arrays in self.output.load(SET):
                counted = np.arange(arrays["codes"].shape[1]) < arrays["tokens"][:, None]
                counts.add_(torch.from_numpy(arrays["codes"][counted]).bincount(minlength=len(counts)))
                for metric in self.scored:
                    scores[metric].append(arrays[metric])
                yield arrays["images"]

        write_npz(self.config.out / RESULT, labels, self.count, blocks())
        if self.config.perturb is not None:
            perturbed = (arrays["perturbed"] for _, arrays in self.output.load(SET))
            write_npz(self.config.out / PERTURBED, labels, self.count, perturbed)
        averages = {metric: float(np.concatenate(values).mean()) for metric, values in scores.items()}
        averages["psnr_pooled"] = float(psnr_pooled(torch.from_numpy(np.concatenate(scores["psnr"]))))
        health = quantizer.health(counts.to(self.topology.device))
        averages |= {f"codebook_{name}": float(health[name]) for name in ("usage", "perplexity")}
        if "tokens" in averages:
            averages["bits_per_image"] = averages["tokens"] * quantizer.bits
        self.output.finish(
            averages
            | self._claim(averages)
            | {
                "tokenizer": str(self.config.tokenizer),
                "image_shards": str(self.config.images),
                "region": self.region,
                "trained_on_these_images": self.seen,
                **({} if self.lpips is None else {"perceptual": self.lpips.record()}),
                "definitions": {
                    "psnr": "dB, mean over images, 8-bit pictures against the stored originals",
                    "psnr_pooled": "dB, of the error of all pixels together, which published values are not",
                    "ssim": "7 x 7 uniform window, mean over images, data range 1",
                    "ssim_llamagen": "the same with data range 2, as in LlamaGen's published numbers",
                    "lpips": "of the part that is compared, 8-bit pictures, mean over images; off unless asked for",
                    "perturbed": "a share of each image's codes replaced by one of their nearest neighbours; the FID "
                    "of these pictures against the originals is the pFID",
                    "region": "(left, top, right, bottom) of the part that is not padding, which alone is compared; "
                    "null: the whole picture",
                    "trained_on_these_images": "true: these scores are not held-out ones; null: the weights do not say "
                    "what they were trained on",
                    "tokens": "of prefix tokens: how many an image was decoded from, mean over images",
                    "bits_per_image": "tokens x log2(codes), without what would say how many tokens there are",
                    "codebook_usage": "share of all codes that occur at least once in these images",
                    "codebook_perplexity": "how many codes would do if all were used alike in these images",
                },
                "device": str(self.topology.device),
                "ranks": self.topology.world,
                "versions": versions("torch", "numpy"),
            }
        )
        return averages

    def _measure_rfid(self) -> None:
        """rfid.json, and ``rfid`` (with ``perturb``, ``pfid`` too) in the record (collective), unless they are there.

        Raises UserError for a reference that is not of these images. Without the extractor ``absent`` says what is
        missing.
        """
        config = self.config
        described = config.model_dump(mode="json", include={"reference", "resize_to", "inception"})
        if self.topology.broadcast_from_rank0(
            lambda: read_json(self.output.record).get("rfid_of") == described and (config.out / RFID).exists()
        ):
            return
        scores, reference = {"rfid": "generated"}, config.reference or config.images
        compared: dict[str, Any] = {"generated": config.out / RESULT, "reference": reference}
        if config.perturb is not None:  # both at once: the features of the originals are computed once
            scores["pfid"] = "perturbed"
            files = {"generated": RESULT, "perturbed": PERTURBED}
            compared = {
                "sets": {name: {"images": config.out / file, "reference": reference} for name, file in files.items()}
            }
        comparison = EvaluateConfig(
            kind="evaluate",
            protocol="reconstruction",
            **compared,
            out=config.out / RFID,
            metrics=("fid", "sfid"),
            scores="reconstructions",
            limit=None,
            image_size=self.size,
            resize_to=config.resize_to,
            batch=config.batch,
            inception=config.inception,
        )
        originals = first_of(open_images(config.images, self.size, resize_to=config.resize_to), self.count)
        result = scoring.evaluate(comparison, self.topology, opened={config.images: originals})
        if "fid" in result["sets"]["generated"]:
            added = {key: result["sets"][name]["fid"] for key, name in scores.items()} | {"rfid_of": described}
        else:
            added = {"absent": dict.fromkeys(scores, result["absent"]["fid"])}

        def write() -> None:
            scoring.write(comparison.out, result)
            known = read_json(self.output.record).items()
            self.output.finish({key: value for key, value in known if key not in ("absent", *scores)} | added)
            scoring.show(result)

        self.topology.broadcast_from_rank0(write)

    def _claim(self, averages: Mapping[str, Any]) -> dict[str, str]:
        """For the record: which data range an SSIM from elsewhere was computed with; empty where none is claimed."""
        if self.config.claimed_ssim is None:
            return {}
        claim = range_of_ssim(self.config.claimed_ssim, averages["ssim"], averages["ssim_llamagen"])
        LOG.info(f"claimed_ssim: {claim}")
        return {"claimed_ssim": claim}

    def _add_claim(self) -> None:
        record = read_json(self.output.record)
        self.output.finish(record | self._claim(record))


if __name__ == "__main__":
    run_program(main)
