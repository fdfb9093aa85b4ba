"""Which images are compared with which, which of them must be looked at, and the numbers that come out."""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from llamagen_dist.config import EvaluateConfig
from llamagen_dist.errors import UserError
from llamagen_dist.evaluation import (
    extrapolation,
    inception,
    kid,
    manifold,
    mistakes,
    passport,
)
from llamagen_dist.evaluation.clip_score import CAPTIONS, CLIPScore, captions_of
from llamagen_dist.evaluation.features import Selection, SetFeatures
from llamagen_dist.evaluation.frechet import Gaussian, frechet_distance, is_rough
from llamagen_dist.evaluation.image_sets import RESIZED, STATISTICS, ImageSet, balanced, choose, open_images
from llamagen_dist.evaluation.mistakes import Found
from llamagen_dist.parallel.topology import Topology

DISTANCES = ("fid", "sfid", "fd_dinov2")
KEPT_METRICS = ("kid", "precision_recall", "density_coverage")
"""They need the features themselves of both sides."""
REFERENCE_METRICS = (*DISTANCES, "fid_infinity", *KEPT_METRICS)
FEATURE_METRICS = (*REFERENCE_METRICS, "inception_score")
INCEPTION_METRICS = tuple(metric for metric in FEATURE_METRICS if metric != "fd_dinov2")
MANIFOLD_METRICS = {"precision_recall": ("precision", "recall"), "density_coverage": ("density", "coverage")}


@dataclass(frozen=True)
class Side:
    """One side of a comparison: the open images, and its index among the selections (None: only statistics)."""

    images: ImageSet
    selection: int | None


class Comparison:
    """All sets of one evaluation; every selection of images exists once, however often it is compared.

    Raises UserError for images that are missing, too few or of different sizes, before anything is computed.
    """

    def __init__(self, config: EvaluateConfig, opened: Mapping[Path, ImageSet] | None = None) -> None:
        """opened: image sets that need not be opened again, by the paths under which ``config`` names them."""
        self.config = config
        self.selections: list[Selection] = []
        self.absent: dict[str, str] = {}
        self._numbers: dict[tuple[str, bytes], int] = {}
        self._opened = {path.resolve(): images for path, images in (opened or {}).items()}
        self._known_radii: dict[int, Tensor] = {}
        convention = manifold.CONVENTIONS[config.manifold]
        self.manifold = convention._replace(k=config.neighbours or convention.k)
        self._left_out: set[str] = set()
        self._distances: dict[tuple[str, str], float] | None = None
        self.sets: dict[str, tuple[Side, Side]] = {}
        sides = {
            name: (self._open(pair.images), self._open(pair.reference, reference=True))
            for name, pair in config.pairs().items()
        }
        self.limit = self._limit([images for pair in sides.values() for images in pair])
        for name, pair in config.pairs().items():
            generated, reference = sides[name]
            sizes = {(images.height, images.width) for images in (generated, reference) if images.count}
            if len(sizes) > 1:
                raise UserError(
                    f"{name}: {pair.images} holds {generated.width} x {generated.height} pixels, but its reference "
                    f"{pair.reference} {reference.width} x {reference.height}; compare images of one size"
                )
            self.sets[name] = (Side(generated, self._select(generated, self.limit)), self._reference(reference))
        # 1000, or half of the smallest set whose features are kept
        least = min((len(s.kept) for s in self.selections if len(s.kept)), default=0)
        self.kid_subset = config.kid.subset_size or max(2, min(1000, least // 2))
        for name in self.sets:
            self._check(name)
        counts = {len(self.selections[side.selection]) for side, _ in self.sets.values() if side.selection is not None}
        self.n = counts.pop() if len(counts) == 1 else None
        """Images of every scored set; None where they differ."""

    def redrawn(self, images: ImageSet) -> "Comparison":
        """The same comparison of other images, as many and of the same size, where there is one set; what has been
        computed of its reference stays known."""
        ((name, (generated, reference)),) = self.sets.items()
        other = copy.copy(self)
        other.selections = [replace(self.selections[0], images=images), *self.selections[1:]]
        other.sets = {name: (replace(generated, images=images), reference)}
        other._known_radii = {number: radii for number, radii in self._known_radii.items() if number}
        other._distances, other.absent = None, {metric: self.absent[metric] for metric in self._left_out}
        return other

    def reference_gaussian(self, name: str, measured: Sequence[SetFeatures], topology: Topology) -> Gaussian | None:
        """What the FID of a set is a distance to; None where that is not known."""
        reference = self.sets[name][1]
        theirs = None if reference.selection is None else measured[reference.selection]
        return self._gaussian(reference, "fid", theirs, topology)

    @property
    def needs_features(self) -> bool:
        """Inception's."""
        return any(metric in INCEPTION_METRICS and metric not in self._left_out for metric in self.config.metrics)

    def _open(self, path: Path, reference: bool = False) -> ImageSet:
        """Once for each path; statistics without images are opened again, and refused, where images are needed."""
        key = path.resolve()
        if key not in self._opened or self._opened[key].pixels is None:
            self._opened[key] = open_images(path, self.config.image_size, reference, self.config.resize_to)
        return self._opened[key]

    def _limit(self, opened: list[ImageSet]) -> int | None:
        """Images per side; None: all. Sets with stored statistics have no images to be limited."""
        limit = self.config.limit
        if self.config.fewer == "refuse":
            return limit
        counts = [images.count for images in opened if not images.statistics]
        return min(counts if limit is None else [limit, *counts], default=None)

    def _reference(self, images: ImageSet) -> Side:
        wanted = {metric.removesuffix("_infinity") for metric in self.config.metrics if metric in REFERENCE_METRICS}
        if images.pixels is None or wanted <= images.statistics.keys():
            return Side(images, None)
        # stored statistics belong to all images: the pictures beside them are only a sample, of whatever length
        return Side(images, self._select(images, None if images.statistics else self.limit, reference=True))

    def _select(self, images: ImageSet, limit: int | None, reference: bool = False) -> int:
        config = self.config
        indices = choose(images, limit, config.seed)
        labels = None if images.labels is None else images.labels[indices]
        kept = np.arange(len(indices))
        if not self._looks_at_features(len(indices), labels):
            kept = kept[:0]
        elif len(indices) > config.keep:
            kept = balanced(labels, len(indices), config.subsample or 0, config.seed)
        scored = "clip_score" in config.metrics and not reference
        selection = Selection(images, indices, kept, captions_of(images, indices) if scored else None)
        number = self._numbers.setdefault(selection.key(), len(self.selections))
        if number == len(self.selections):
            self.selections.append(selection)
        elif selection.captions is not None:  # it was only a reference so far
            self.selections[number] = selection
        return number

    def _looks_at_features(self, count: int, labels: NDArray[np.int64] | None) -> bool:
        """Whether moments do not say all that the metrics (and the search for mistakes) need of so many images."""
        metrics = {"fid_infinity", *KEPT_METRICS} & set(self.config.metrics)
        return bool(metrics) or count <= inception.POOL_FEATURES or (self._consecutive_splits and labels is None)

    def _check(self, name: str) -> None:
        """Enough images for the metrics asked for; kept features where KID, precision and recall need them."""
        for side in self.sets[name]:
            if side.selection is None:
                continue
            selection, path = self.selections[side.selection], side.images.path
            if len(selection) < 2:
                why = f"{name}: {path} gives {len(selection)} images; a distribution needs at least two"
                for metric in FEATURE_METRICS:
                    self._lacking(metric, why)
                return
            kept = len(selection.kept)
            if kept == 0:
                continue
            if "kid" in self.config.metrics and kept < self.kid_subset:
                self._lacking(
                    "kid",
                    f"{name}: kid.subset_size: {self.kid_subset} images cannot be drawn from the {kept} of {path}; "
                    f"set kid.subset_size={max(2, kept // 2)}",
                )
            for metric in MANIFOLD_METRICS:
                if metric in self.config.metrics and kept <= self.manifold.k:
                    self._lacking(
                        metric, f"{name}: neighbours: {self.manifold.k} needs more images than the {kept} of {path}"
                    )
            if (
                "fid_infinity" in self.config.metrics
                and side is self.sets[name][0]
                and kept < extrapolation.FEWEST_IMAGES
            ):
                self._lacking("fid_infinity", f"{name}: no line over 1 / N from the {kept} images of {path}")

    def _lacking(self, metric: str, why: str) -> None:
        """Too few images for ``metric``: refuse, or leave it out, as ``fewer`` says."""
        if self.config.fewer == "refuse":
            raise UserError(why)
        if metric in self.config.metrics:
            self.leave_out(metric, why)

    def check_statistics(self, extractor: dict[str, object]) -> None:
        """Stored statistics fit this extractor. Raises UserError, see passport.refuse_other_statistics."""
        for generated, reference in self.sets.values():
            size = generated.images.width, generated.images.height
            passport.refuse_other_statistics(reference.images, extractor, size)

    def check_labels(self, classes: int | None) -> None:
        """Every labelled set fits the classifier's classes. classes: None without a classifier."""
        if "class_agreement" not in self.config.metrics or classes is None:
            return
        for name, (side, _) in self.sets.items():
            side.images.check_labels(classes, name, "the classifier knows")
        if bare := [name for name, (side, _) in self.sets.items() if side.images.labels is None]:
            self.absent["class_agreement"] = f"no labels in {', '.join(bare)}"

    def without_features(self, reason: str) -> None:
        """Record why the metrics that need the extractor are absent."""
        for metric in self.config.metrics:
            if metric in INCEPTION_METRICS and metric not in self._left_out:
                self.leave_out(metric, reason)

    def leave_out(self, metric: str, reason: str) -> None:
        self.absent[metric] = reason
        self._left_out.add(metric)

    def score(self, name: str, measured: Sequence[SetFeatures], topology: Topology) -> dict[str, float]:
        """The numbers of one set (collective): keys as in record.VALUES, and ``n``."""
        generated, reference = self.sets[name]
        assert generated.selection is not None
        mine = measured[generated.selection]
        theirs = None if reference.selection is None else measured[reference.selection]
        values: dict[str, float] = {"n": len(self.selections[generated.selection])}
        wanted = [metric for metric in self.config.metrics if metric not in self._left_out]
        if self._distances is None:
            self._distances = self._all_distances(measured, topology)
        for metric in DISTANCES:
            if (name, metric) in self._distances:
                values[metric] = self._distances[name, metric]
            elif metric in wanted:
                self._statistics_only(name, metric)
        for metric in ("fid_infinity", *KEPT_METRICS):
            if metric not in wanted or mine.pool is None:
                continue
            known = self._gaussian(reference, "fid", theirs, topology) if metric == "fid_infinity" else None
            pool = None if theirs is None else theirs.pool
            if known is None and pool is None:
                self._statistics_only(name, metric)
            elif not len(mine.pool) or (pool is not None and metric in KEPT_METRICS and not len(pool)):
                self.absent[metric] = (
                    f"more than keep: {self.config.keep} images in {name} or its reference; set subsample=10000 to "
                    "take so many of them"
                )
            elif metric == "fid_infinity":
                assert known is not None
                values |= self._extrapolated(name, mine.pool, known, topology)
            elif metric == "kid":
                assert pool is not None
                subsets = self._subsets(len(mine.pool), len(pool))
                values["kid_mean"], values["kid_std"] = kid.kid(mine.pool, pool, subsets, topology)
            elif MANIFOLD_METRICS[metric][0] not in values:
                assert pool is not None
                radii = self._radii(generated, mine.pool, topology), self._radii(reference, pool, topology)
                scores = manifold.manifold_scores(mine.pool, pool, self.manifold, topology, radii=radii)._asdict()
                asked = [key for one, keys in MANIFOLD_METRICS.items() if one in wanted for key in keys]
                values |= {key: scores[key] for key in asked}
        if "inception_score" in wanted and mine.score is not None:
            values["inception_score"], deviation = mine.score
            if self.config.inception_score != "whole":
                values["inception_score_std"] = deviation
        if "clip_score" in wanted:
            if mine.clip is not None:
                values["clip_score"] = float(mine.clip.mean())
            else:
                self.absent["clip_score"] = f"{name}: no captions of {generated.images.path} ({CAPTIONS} beside it)"
        labels = generated.images.labels
        if "class_agreement" in wanted and mine.classes is not None and labels is not None:
            truth = labels[self.selections[generated.selection].indices]
            values["class_agreement"] = float((mine.classes.cpu().numpy() == truth).mean())
        return values

    def _all_distances(self, measured: Sequence[SetFeatures], topology: Topology) -> dict[tuple[str, str], float]:
        """(set, metric) -> every Fréchet distance whose two sides are known (collective: the ranks share them out)."""
        jobs = []
        for name, (generated, reference) in self.sets.items():
            assert generated.selection is not None
            theirs = None if reference.selection is None else measured[reference.selection]
            for metric in (metric for metric in DISTANCES if metric in self.config.metrics):
                a: Gaussian | None = getattr(measured[generated.selection], metric)
                known = metric in reference.images.statistics or theirs is not None
                if metric not in self._left_out and a is not None and known:
                    jobs.append((name, metric, a, reference, theirs))
        mine: dict[tuple[str, str], float | str] = {}
        for name, metric, a, reference, theirs in jobs[topology.rank :: topology.world]:
            b = self._gaussian(reference, metric, theirs, topology)
            assert b is not None
            try:
                mine[name, metric] = frechet_distance(a, b)
            except ValueError as error:  # raised on every rank below: none may wait for one that has stopped
                mine[name, metric] = f"{name}: no {metric} of these sets: {error}"
        answers = {key: answer for part in topology.gather(mine) for key, answer in part.items()}
        if problems := [answer for answer in answers.values() if isinstance(answer, str)]:
            raise UserError(problems[0])
        return {key: float(answer) for key, answer in answers.items()}

    def rough(self, measured: Sequence[SetFeatures], topology: Topology) -> list[str]:
        """Paths of the sides of whose singular covariance moments alone are known, see ``frechet.is_rough``."""
        paths: dict[str, None] = {}
        for name, (generated, reference) in self.sets.items():
            if not any((name, metric) in (self._distances or {}) for metric in DISTANCES):
                continue
            assert generated.selection is not None
            mine = measured[generated.selection]
            theirs = None if reference.selection is None else measured[reference.selection]
            behind = [self._gaussian(reference, metric, theirs, topology) for metric in DISTANCES]
            for side, known in ((generated, [mine.fid, mine.sfid]), (reference, behind)):
                if any(gaussian is not None and is_rough(gaussian) for gaussian in known):
                    paths[str(side.images.path)] = None
        return list(paths)

    def _statistics_only(self, name: str, metric: str) -> None:
        """Say why a set has no value of ``metric``; the other sets may have one."""
        images = self.sets[name][1].images
        stored = " and ".join(array for kind in images.statistics for array in STATISTICS[kind][:2])
        reason = f"{name}: its reference {images.path} holds {stored} but no images (arr_0)"
        self.absent[metric] = "; ".join(filter(None, (self.absent.get(metric), reason)))

    def _gaussian(
        self, reference: Side, metric: str, features: SetFeatures | None, topology: Topology
    ) -> Gaussian | None:
        """The reference's stored statistics, or else those of its images. metric: ``fid`` or ``sfid``."""
        if metric not in reference.images.statistics:
            known: Gaussian | None = getattr(features, metric, None)
            return known
        mean, covariance = (torch.tensor(array, dtype=torch.float64) for array in reference.images.statistics[metric])
        count = (reference.images.provenance or {}).get("count")
        return Gaussian(mean.to(topology.device), covariance.to(topology.device), None, count)

    def _extrapolated(self, name: str, pool: Tensor, reference: Gaussian, topology: Topology) -> dict[str, float]:
        points = self.config.fid_infinity_points
        try:
            line = extrapolation.fid_infinity(pool, reference, points, self.config.seed, topology)
        except ValueError as error:
            raise UserError(f"{name}: no fid_infinity of these sets: {error}") from None
        return {"fid_infinity": line.value}

    def _subsets(self, generated: int, reference: int) -> kid.Subsets:
        number, size = self.config.kid.subsets, self.kid_subset
        if self.config.kid.draw == "torch-fidelity":
            return kid.torch_fidelity_subsets(generated, reference, number, size)
        return kid.hashed_subsets(generated, reference, number, size, self.config.seed)

    def _radii(self, side: Side, pool: Tensor, topology: Topology) -> Tensor:
        """``squared_radii`` of a side's kept images, once for each selection."""
        assert side.selection is not None
        if side.selection not in self._known_radii:
            self._known_radii[side.selection] = manifold.squared_radii(pool, self.manifold, topology)
        return self._known_radii[side.selection]

    @property
    def _consecutive_splits(self) -> bool:
        return "inception_score" in self.config.metrics and self.config.inception_score == "adm"

    def mistakes_of_pairs(self) -> list[Found]:
        """Mistakes that show before anything is computed; pictures are read. Raises UserError, see ``refuse``."""
        declared = {"samples": False, "reconstructions": True, None: None}[self.config.scores]
        found: list[Found] = []
        for name, (generated, reference) in self.sets.items():
            assert generated.selection is not None
            chosen = self.selections[generated.selection].indices
            made = passport.made_by(generated.images)
            said = {"eval.reconstruct": True, "eval.sample": False}.get((made or {}).get("program", ""))
            found += mistakes.of_reconstructions(
                name,
                (generated.images, chosen),
                (
                    reference.images,
                    None if reference.selection is None else self.selections[reference.selection].indices,
                ),
                said if declared is None else declared,
                made,
                passport.provenance(reference.images),
            )
            if self._consecutive_splits:
                labels = generated.images.labels
                found += mistakes.order_of_classes(name, None if labels is None else labels[chosen], None)
        mistakes.refuse(found, self.config.accept)
        return found

    def mistakes_of_features(self, measured: Sequence[SetFeatures]) -> list[Found]:
        """Mistakes that show in what was computed."""
        found: list[Found] = []
        for name, (generated, _) in self.sets.items():
            assert generated.selection is not None
            mine = measured[generated.selection]
            found += mistakes.duplicates(name, mine.digests)
            whole = mine.pool is not None and len(mine.pool) == len(self.selections[generated.selection])
            if self._consecutive_splits and generated.images.labels is None and whole:
                found += mistakes.order_of_classes(name, None, mine.pool)
        return found

    def describe(self, name: str, measured: Sequence[SetFeatures], clip: CLIPScore | None = None) -> dict[str, Any]:
        """Where the two sides of a set come from and what their pixels hash to."""

        def side(part: Side) -> dict[str, Any]:
            images = part.images
            if part.selection is None:
                behind = (images.provenance or {}).get("count")
                stored = {"statistics": sorted(images.statistics), "n": behind}
                return {"path": str(images.path), **stored, "sha256": passport.statistics_sha256(images)}
            selection = self.selections[part.selection]
            about: dict[str, Any] = {
                "path": str(images.path),
                "available": images.count,
                "n": len(selection),
                "features_kept": len(selection.kept),
                "sha256": measured[part.selection].sha256,
                "size": [images.width, images.height],
                "classes": passport.class_policy(None if images.labels is None else images.labels[selection.indices]),
            }
            if images.stored_size != (images.height, images.width):
                about["resized"] = f"from {images.stored_size[1]} x {images.stored_size[0]}: {RESIZED}"
            if clip is not None and selection.captions is not None:
                about["captions"] = clip.describe(selection.captions)
            if images.statistics:
                about |= {
                    "statistics": sorted(images.statistics),
                    "sha256_of_statistics": passport.statistics_sha256(images),
                }
            return about

        generated, reference = self.sets[name]
        return {
            "images": {**side(generated), "made_by": passport.made_by(generated.images)},
            "reference": {**side(reference), "provenance": passport.provenance(reference.images)},
        }
