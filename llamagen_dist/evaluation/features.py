"""Inception features of whole image sets on any number of ranks: every image once, in batches of one fixed shape.

The work is cut into batches that do not depend on the number of ranks (the last of a set is filled up with zeros,
whose features are dropped), and the batches are dealt to the ranks: no image is padded in, doubled or lost, and a
feature has the same bits wherever it was computed.
"""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby, islice
from math import lcm
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from llamagen_dist.errors import UserError
from llamagen_dist.evaluation.clip_score import CLIPScore
from llamagen_dist.evaluation.dinov2 import DINOv2
from llamagen_dist.evaluation.frechet import Gaussian, Moments, gaussian_of
from llamagen_dist.evaluation.image_sets import ImageSet
from llamagen_dist.evaluation.inception import LOGITS, POOL_FEATURES, SPATIAL_FEATURES, Inception
from llamagen_dist.evaluation.inception_score import SPLITS, ScoreSums
from llamagen_dist.parallel.topology import Topology


@dataclass(frozen=True)
class Selection:
    """Some images of a set."""

    images: ImageSet
    indices: NDArray[np.int64]
    """int64 [n], which images."""
    kept: NDArray[np.int64]
    """int64 [k]: positions in ``indices`` whose features are kept; all of them, or a subsample of a large set."""
    captions: Sequence[str] | None = None
    """What the images were drawn from, for the CLIP score; None where it is not known, or not wanted."""

    def key(self) -> tuple[str, bytes]:
        """Equal for the same images of the same path."""
        return str(self.images.path.resolve()), hashlib.sha256(self.indices.tobytes()).digest()

    def __len__(self) -> int:
        return len(self.indices)


@dataclass(frozen=True)
class SetFeatures:
    """What the metrics need of one selection; the same on every rank."""

    sha256: str
    """Of the pixels: the hash of every image's sha256, in order; independent of file format and batch."""
    pool: Tensor | None = None
    """float32 [k, 2048] of the kept images; None without an extractor."""
    fid: Gaussian | None = None
    sfid: Gaussian | None = None
    score: tuple[float, float] | None = None
    """Inception Score and its deviation over the splits, where the extractor gives logits."""
    classes: Tensor | None = None
    """int64 [n]: the classifier's answer for every image."""
    fd_dinov2: Gaussian | None = None
    clip: Tensor | None = None
    """float64 [n]: the CLIP score of every image."""
    digests: NDArray[np.uint8] = field(default_factory=lambda: np.empty((0, 32), np.uint8))
    """uint8 [n, 32]: sha256 of every image."""


Classify = Callable[[NDArray[np.uint8]], Tensor]
"""uint8 [n, H, W, 3] -> int64 [n]."""


def batches(selections: Sequence[Selection], batch: int) -> Iterator[tuple[int, slice]]:
    """(selection, positions) of every batch; none crosses from one selection into the next."""
    for number, selection in enumerate(selections):
        for start in range(0, len(selection), batch):
            yield number, slice(start, min(start + batch, len(selection)))


class Encoders(NamedTuple):
    """Other networks that look at every image; None where their metrics are not wanted."""

    dinov2: DINOv2 | None = None
    clip: CLIPScore | None = None

    def records(self) -> dict[str, dict[str, Any]]:
        """Metric -> what decides its values besides the images."""
        encoders = {"fd_dinov2": self.dinov2, "clip_score": self.clip}
        return {metric: {} if encoder is None else encoder.record() for metric, encoder in encoders.items()}


NO_ENCODERS = Encoders()


class Extraction:
    """Goes once through all selections, this rank's share of their batches."""

    def __init__(
        self,
        selections: Sequence[Selection],
        network: Inception | None,
        classify: Classify | None,
        topology: Topology,
        batch: int,
        splits: str = "whole",
        encoders: Encoders = NO_ENCODERS,
    ) -> None:
        """splits: of the Inception Score, a name in SPLITS."""
        self.selections, self.network, self.classify, self.topology = selections, network, classify, topology
        self.batch = batch
        self.dinov2, self.clip = dinov2, clip = encoders
        turns = groupby(batches(selections, batch), key=self._turn)
        mine = islice((list(turn) for _, turn in turns), topology.rank, None, topology.world)
        self.work = [one for turn in mine for one in turn]
        self.parts = [_Part(selection, network, classify is not None, topology, splits) for selection in selections]
        for part in self.parts:
            if dinov2 is not None:
                part.dinov2 = Distribution(len(part.selection), dinov2.dimensions, topology)
            if clip is not None and part.selection.captions is not None:
                part.clip = torch.zeros(len(part.selection), dtype=torch.float64, device=topology.device)

    def _turn(self, one: tuple[int, slice]) -> tuple[int, int]:
        """Batches of one turn go to one rank: images that are made together are made there alone."""
        number, rows = one
        return number, rows.start // lcm(self.batch, self.selections[number].images.together)

    def images_of_rank(self) -> int:
        return sum(rows.stop - rows.start for _, rows in self.work)

    def run(self, advance: Callable[[int, str], None] = lambda count, text: None) -> list[SetFeatures]:
        """One result per selection (collective).

        advance: called with the number of images of each batch and the name of their set.
        """
        for number, rows in self.work:
            selection, part = self.selections[number], self.parts[number]
            pixels = selection.images.read(selection.indices[rows])
            part.digests[rows] = [_digest(image) for image in pixels]
            if self.classify is not None:
                part.classes[rows] = self.classify(pixels).to(part.classes)
            if self.network is not None:
                part.add(rows, *self._features(pixels))
            if part.dinov2 is not None and self.dinov2 is not None:
                part.dinov2.add(rows, self.dinov2(torch.from_numpy(self._filled(pixels)))[: len(pixels)])
            if part.clip is not None and self.clip is not None and selection.captions is not None:
                captions = list(selection.captions[rows]) + [""] * (self.batch - len(pixels))
                part.clip[rows] = self.clip(self._filled(pixels), captions)[: len(pixels)].to(part.clip)
            advance(len(pixels), selection.images.path.name)
        return [part.finish() for part in self.parts]

    def _features(self, pixels: NDArray[np.uint8]) -> tuple[Tensor, Tensor, Tensor | None]:
        assert self.network is not None
        filled = torch.from_numpy(self._filled(pixels))
        pool, spatial, logits = self.network(filled.to(self.topology.device))
        n = len(pixels)
        return pool[:n], spatial[:n], None if logits is None else logits[:n]

    def _filled(self, pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
        filled = np.zeros((self.batch, *pixels.shape[1:]), np.uint8)
        filled[: len(pixels)] = pixels
        return filled


class Distribution:
    """The Gaussian of n features [d] that the ranks see a part of: their moments, or of few images the features."""

    def __init__(self, n: int, dimensions: int, topology: Topology) -> None:
        self.topology = topology
        self.kept = self.moments = None
        if n <= dimensions:  # no covariance of so few has a factor among its moments
            self.kept = torch.zeros(n, dimensions, device=topology.device)
        else:
            self.moments = Moments(dimensions, topology.device)
        self.not_finite = torch.zeros((), dtype=torch.float64, device=topology.device)

    def add(self, rows: slice, features: Tensor) -> None:
        self.not_finite += (~torch.isfinite(features).all(1)).sum()
        if self.kept is not None:
            self.kept[rows] = features
        elif self.moments is not None:
            self.moments.update(features)

    def gaussian(self, where: Path | str, network: str) -> Gaussian:
        """Collective. Raises UserError, on every rank, where features are not finite.

        where, network: for its message.
        """
        if bad := int(self.topology.sum(self.not_finite)):
            raise UserError(
                f"{where}: {bad} images have {network} features that are NaN or infinite; the weights are at fault"
            )
        if self.kept is not None:
            return gaussian_of(self.topology.sum(self.kept))
        assert self.moments is not None
        return self.moments.gaussian(self.topology)


class _Part:
    """What this rank has gathered of one selection."""

    def __init__(
        self, selection: Selection, network: Inception | None, classified: bool, topology: Topology, splits: str
    ) -> None:
        n, device = len(selection), topology.device
        self.topology, self.selection = topology, selection
        self.digests = np.zeros((n, 32), np.uint8)
        self.classes = torch.zeros(n if classified else 0, dtype=torch.int64, device=device)
        self.row_of = np.full(n, -1, np.int64)  # where a kept image's features go
        self.row_of[selection.kept] = np.arange(len(selection.kept))
        self.dinov2: Distribution | None = None
        self.clip: Tensor | None = None
        self.pool = self.spatial = self.score = None
        # (of pool, of spatial): all that is kept of large sets, so that memory does not grow with the images. A
        # covariance of fewer images than dimensions has no factor among its moments: there the features are kept.
        self.moments: list[Moments | None] = [None, None]
        self.not_finite = torch.zeros((), dtype=torch.float64, device=device)  # images; read once, at the end
        if network is None:
            return
        self.pool = torch.zeros(len(selection.kept), POOL_FEATURES, device=device)
        all_kept = len(selection.kept) == n
        if all_kept and n <= SPATIAL_FEATURES:
            self.spatial = torch.zeros(n, SPATIAL_FEATURES, device=device)
        else:
            self.moments[1] = Moments(SPATIAL_FEATURES, device)
        if not all_kept or n > POOL_FEATURES:
            self.moments[0] = Moments(POOL_FEATURES, device)
        if network.fc is not None:
            self.score = ScoreSums(SPLITS[splits](n), LOGITS, device)

    def add(self, rows: slice, pool: Tensor, spatial: Tensor, logits: Tensor | None) -> None:
        kept_rows = torch.from_numpy(self.row_of[rows]).to(pool.device)
        outputs = [pool, spatial] if logits is None else [pool, spatial, logits]
        self.not_finite += (~torch.isfinite(torch.cat(outputs, 1)).all(1)).sum()
        assert self.pool is not None
        self.pool[kept_rows[kept_rows >= 0]] = pool[kept_rows >= 0]
        if self.spatial is not None:
            self.spatial[rows] = spatial
        for moments, features in zip(self.moments, (pool, spatial), strict=True):
            if moments is not None:
                moments.update(features)
        if self.score is not None and logits is not None:
            self.score.update(rows, logits)

    def finish(self) -> SetFeatures:
        """Collective: adds up what the ranks have, each image's row being zero on all ranks but one.

        Raises UserError, on every rank, where features are not finite: no score may be made from them.
        """
        total = self.topology.sum
        digests = total(torch.from_numpy(self.digests).to(self.topology.device)).cpu().numpy()
        sha256 = hashlib.sha256(digests.tobytes()).hexdigest()
        classes = total(self.classes) if len(self.classes) else None
        clip = None if self.clip is None else total(self.clip)
        dinov2 = None if self.dinov2 is None else self.dinov2.gaussian(self.selection.images.path, "DINOv2")
        if self.pool is None:
            return SetFeatures(sha256, classes=classes, fd_dinov2=dinov2, clip=clip, digests=digests)
        if bad := int(total(self.not_finite)):
            raise UserError(
                f"{self.selection.images.path}: {bad} of {len(self.selection)} images have features that are NaN or "
                "infinite; the weights of the extractor, or this device, are at fault"
            )
        score = None if self.score is None else self.score.score(self.topology)
        pool = total(self.pool)
        kept = pool, None if self.spatial is None else total(self.spatial)
        fid, sfid = (self._gaussian(*pair) for pair in zip(self.moments, kept, strict=True))
        return SetFeatures(sha256, pool, fid, sfid, score, classes, dinov2, clip, digests)

    def _gaussian(self, moments: Moments | None, features: Tensor | None) -> Gaussian:
        if moments is not None:
            return moments.gaussian(self.topology)
        assert features is not None
        return gaussian_of(features)


def _digest(image: NDArray[np.uint8]) -> NDArray[np.uint8]:
    header = f"{image.shape}|".encode()
    return np.frombuffer(hashlib.sha256(header + image.tobytes()).digest(), np.uint8)
