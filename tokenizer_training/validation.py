"""What held-out images look like after the tokenizer, while it trains: errors, LPIPS, rFID, and the codes in use."""

import hashlib
import json
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from llamagen_dist.config import LPIPSSection, TokenizerConfigFile
from llamagen_dist.data.images import load_images, to_floats
from llamagen_dist.data.shards import Shards
from llamagen_dist.errors import UserError
from llamagen_dist.evaluation.features import Distribution
from llamagen_dist.evaluation.frechet import Gaussian, frechet_distance
from llamagen_dist.evaluation.image_quality import Region, both_ssims, psnr, unpadded
from llamagen_dist.evaluation.inception import POOL_FEATURES
from llamagen_dist.evaluation.inception_weights import open_extractor
from llamagen_dist.evaluation.perceptual import LPIPS, SMALLEST_SIDE, large_enough
from llamagen_dist.evaluation.record import bias
from llamagen_dist.files import written_aside
from llamagen_dist.models.vq import VQModel, code_histogram, to_uint8
from llamagen_dist.parallel.clock import Clock
from llamagen_dist.parallel.topology import Topology
from tokenizer_training.prefixes import measured_lengths, prefix_psnr

KEPT = "originals.safetensors"
_PIECE = 32  # pictures of 299 x 299 pixels at once: 256 would take gigabytes


class Validation:
    """The first ``validation.images`` held-out images, the same ones every time.

    perceptual: of the loss, which is measured with what it is trained with.

    Raises UserError for weights that are missing or wrong, and for images that a metric cannot look at: when a run
    starts, not hours later.
    """

    def __init__(
        self, config: TokenizerConfigFile, topology: Topology, held_out: Shards, perceptual: LPIPS | None
    ) -> None:
        self.topology, self.held_out = topology, held_out
        self.batch, self.size = config.validation.batch, config.data.image_size
        self.count = min(config.validation.images or len(held_out), len(held_out))
        manifest = held_out.manifest
        self.region = unpadded(manifest.padding, self.size, manifest.image_size)
        usable = perceptual is not None and large_enough(self.size, self.region)
        self.perceptual = [perceptual] if perceptual is not None and usable else []
        if config.validation.lpips is not None:
            self._add(config.validation.lpips)
        self.lengths = measured_lengths(config)
        self.rfid = ReconstructionFID(config, topology, held_out, self.count) if config.validation.rfid else None

    def _add(self, section: LPIPSSection) -> None:
        if not large_enough(self.size, self.region):
            smallest = f"{SMALLEST_SIDE} x {SMALLEST_SIDE} pixels"
            raise UserError(f"validation.lpips: needs pictures of at least {smallest}; leave it out")
        added = LPIPS(section.trunk, section.weights, "validation.lpips.weights", "leave validation.lpips out")
        for known in self.perceptual:
            if known.trunk.sha256 == added.trunk.sha256:
                return
            if known.name == added.name:
                raise UserError(
                    f"validation.lpips: {section.weights} and the loss's VGG16 are two files whose numbers would both "
                    f"be called {added.name}; use one of them"
                )
        self.perceptual.append(added.to(self.topology.device))

    @torch.no_grad()
    def measure(self, model: VQModel, clock: Clock) -> tuple[dict[str, float], Tensor]:
        """Scores, and how often each code occurred, int64 (K,) (collective; every rank returns the same numbers).

        Each image is counted once on whatever number of ranks.

        val_loss: mean squared error of pixels in [-1, 1]. psnr (dB), ssim and ssim_llamagen (data range 2): means of
        per-image values of the 8-bit pictures, on the part that is not padding; so is lpips, under the name of its
        VGG16. codebook_usage: share of all codes that occur at all; codebook_perplexity: how many would do if all
        were used alike. psnr_at_K: of the first K prefix tokens. rfid: of whole 8-bit pictures.
        """
        model.eval()
        names = ["val_loss", "psnr", "ssim", "ssim_llamagen", *(network.name for network in self.perceptual)]
        names += [f"psnr_at_{length}" for length in self.lengths]
        sums = torch.zeros(len(names), dtype=torch.float64)
        histogram = torch.zeros(model.config.codebook_size, dtype=torch.int64)
        if self.rfid is not None:
            self.rfid.begin()
        mine = range(self.topology.dp_rank, self.count, self.topology.dp)
        for start in range(0, len(mine), self.batch):
            numbers = mine[start : start + self.batch]
            pixels = load_images(self.held_out, numbers, self.size)
            images = to_floats(pixels).to(self.topology.device)
            with clock.part("compute"):  # a sign of life for the watchdog
                reconstruction, _, codes = model(images)
                original, shown = torch.from_numpy(pixels).permute(0, 3, 1, 2), to_uint8(reconstruction).cpu()
                error = F.mse_loss(reconstruction.double(), images.double(), reduction="none").mean((1, 2, 3))
                of_prefixes = prefix_psnr(model, codes, original, self.region, self.lengths)
                of_all = self._sums(error.cpu(), shown, original, self.region)
                sums += torch.cat([of_all, torch.tensor(of_prefixes, dtype=torch.float64)])
                if self.rfid is not None:
                    self.rfid.add(slice(numbers.start, numbers.stop, numbers.step), shown, original)
            histogram += code_histogram(codes, len(histogram)).cpu()
        model.train()
        sums, histogram = self._total(sums), self._total(histogram)
        scores = dict(zip(names, (sums / self.count).tolist(), strict=True))
        if not math.isfinite(scores["val_loss"]):  # as bytes a NaN is a black pixel, which would have a score
            scores |= dict.fromkeys(names[1:], math.nan)
        if self.rfid is not None:
            scores["rfid"] = self.rfid.distance() if math.isfinite(scores["val_loss"]) else math.nan
        health = model.quantize.health(histogram)
        scores |= {f"codebook_{name}": float(health[name]) for name in ("usage", "perplexity")}
        return scores, histogram

    def _sums(self, error: Tensor, shown: Tensor, original: Tensor, region: Region | None) -> Tensor:
        looks = [network.distances(shown, original, region) for network in self.perceptual]
        parts = [error, psnr(shown, original, region), *both_ssims(shown, original, region), *looks]
        return torch.stack([part.sum().double() for part in parts])

    def _total(self, values: Tensor) -> Tensor:
        return self.topology.sum(values.to(self.topology.device)).cpu()

    def describe(self) -> Mapping[str, Any]:
        """For summary.json: what must be known beside an rFID."""
        return {} if self.rfid is None else {"rfid_of": self.rfid.record}


class ReconstructionFID:
    """FID of reconstructions against their own originals, whose statistics are computed once in a run.

    They are kept beside the run's other files, with what they are of: a run that resumes reads them.
    """

    def __init__(self, config: TokenizerConfigFile, topology: Topology, held_out: Shards, count: int) -> None:
        if count < 2:
            raise UserError(
                f"validation.rfid: a covariance needs at least two held-out images, and there is {count}; raise "
                "validation.images, or set rfid to false"
            )
        extractor = open_extractor(config.validation.inception)
        if isinstance(extractor, str):
            reason = extractor.replace("inception.weights", "validation.inception.weights")
            raise UserError(f"validation.rfid: {reason}")
        self.topology, self.count = topology, count
        self.network = extractor.network.to(topology.device)
        self.record = {"images": count, "bias": bias(count, POOL_FEATURES), "extractor": extractor.record}
        topology.log0(f"validation.rfid: {self.record['bias']}")
        source = {"images": held_out.manifest.fingerprint(), "count": count, "size": config.data.image_size}
        self.of = json.dumps(source | {"extractor": extractor.record}, sort_keys=True)
        self.file = config.run_dir / KEPT
        self.originals: Gaussian | None = None
        """On rank 0 alone; ``known`` on every rank."""
        self.known = False
        self._parts: list[Distribution] = []

    def begin(self) -> None:
        """Collective."""
        if not self.known:
            if self.topology.rank == 0:
                self.originals = read_gaussian(self.file, self.of, self.topology.device)
            self.known = self.topology.broadcast_from_rank0(lambda: self.originals is not None)
        self._parts = [Distribution(self.count, POOL_FEATURES, self.topology) for _ in range(1 if self.known else 2)]

    def add(self, rows: slice, shown: Tensor, original: Tensor) -> None:
        """rows: which of the images. shown, original: uint8 (B, 3, S, S)."""
        for part, pictures in zip(self._parts, (shown, original), strict=False):
            pieces = pictures.permute(0, 2, 3, 1).contiguous().to(self.topology.device).split(_PIECE)
            with _without_tf32():
                part.add(rows, torch.cat([self.network(piece).pool for piece in pieces]))

    def distance(self) -> float:
        """Of all that was added since ``begin`` (collective)."""
        shown, *originals = (part.gaussian("validation.rfid", "Inception") for part in self._parts)
        self._parts, self.known = [], True

        def compare() -> float:
            if originals:
                self.originals = originals[0]
                write_gaussian(self.file, self.of, self.originals)
            assert self.originals is not None
            try:
                return frechet_distance(self.originals, shown)
            except ValueError as error:
                raise UserError(f"validation.rfid: {error}") from None

        return self.topology.broadcast_from_rank0(compare)


@contextmanager
def _without_tf32() -> Iterator[None]:
    """Features as eval.reconstruct computes them; a GPU's convolutions round to TF32 otherwise."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before


def read_gaussian(path: Path, of: str, device: torch.device) -> Gaussian | None:
    """What ``write_gaussian`` wrote there of the same images; None where it is not there, of others, or damaged."""
    try:
        with safe_open(path, "pt") as file:
            about = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in sorted(file.keys())}
        if about.get("of") != of or about.get("sha256") != _digest(tensors):
            return None
        # a copy, as a mapped file's alignment may decide the last bits
        tensors = {name: tensor.clone().to(device) for name, tensor in tensors.items()}
        return Gaussian(tensors["mean"], tensors.get("covariance"), tensors.get("factor"), int(about["count"]))
    except (OSError, SafetensorError, KeyError):
        return None


def write_gaussian(path: Path, of: str, gaussian: Gaussian) -> None:
    """of: what it was made from. Raises UserError where the disk does not take it."""
    parts = {"mean": gaussian.mean, "covariance": gaussian.covariance, "factor": gaussian.factor}
    tensors = {name: part.cpu().contiguous() for name, part in sorted(parts.items()) if part is not None}
    about = {"of": of, "count": str(gaussian.count), "sha256": _digest(tensors)}
    try:
        with written_aside(path) as aside:
            save_file(tensors, aside, about)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path}: cannot be written ({error}); free some disk space (34 MB)") from None


def _digest(tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name, tensor in tensors.items():
        digest.update(f"{name}|{tuple(tensor.shape)}|".encode())
        digest.update(tensor.numpy().tobytes())
    return digest.hexdigest()
