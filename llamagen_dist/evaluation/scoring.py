"""One evaluation from its config to its result: all that eval.evaluate does, for programs that score what they make."""

import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from llamagen_dist.config import ClassifierSection, EvaluateConfig
from llamagen_dist.console import LOG, main_rank_progress
from llamagen_dist.errors import UserError
from llamagen_dist.evaluation import classifier, inception, inception_weights, passport, record
from llamagen_dist.evaluation.clip_score import CLIPScore
from llamagen_dist.evaluation.comparison import Comparison
from llamagen_dist.evaluation.dinov2 import DINOv2
from llamagen_dist.evaluation.drawn import drawn_images
from llamagen_dist.evaluation.features import NO_ENCODERS, Encoders, Extraction, SetFeatures
from llamagen_dist.evaluation.image_sets import ImageSet, balanced, open_images
from llamagen_dist.evaluation.mistakes import Found
from llamagen_dist.files import write_bytes
from llamagen_dist.parallel.topology import Topology
from llamagen_dist.sampling.numbered import NumberedPictures
from llamagen_dist.tracking.provenance import versions


def evaluate(
    config: EvaluateConfig,
    topology: Topology,
    as_shipped: EvaluateConfig | None = None,
    opened: Mapping[Path, ImageSet] | None = None,
) -> dict[str, Any]:
    """The result as eval.evaluate writes it: ``n``, ``sets``, ``absent``, ``record`` (collective; equal on all ranks).

    as_shipped: the config file alone, to name what was overridden in it; None where nothing was, or nobody knows.
    opened: image sets that are open already, by the paths under which ``config`` names them.
    Raises UserError for whatever cannot be compared.
    """
    began = time.monotonic()
    known = dict(opened or {})
    if config.sample is not None:
        count = config.sample.images or config.limit
        assert count is not None
        numbered = NumberedPictures(config.sample, topology)
        known[config.sample.checkpoint] = drawn_images(numbered, count, config.resize_to)
    comparison = Comparison(config, known)
    if comparison.limit != config.limit:
        topology.log0(f"the smallest set has {comparison.limit} images: every set gives so many")
    mistakes = topology.broadcast_from_rank0(comparison.mistakes_of_pairs)
    extractor = inception_weights.open_extractor(config.inception) if comparison.needs_features else "not asked for"
    if isinstance(extractor, str):
        comparison.without_features(extractor)
        network, described = None, None
    else:
        network, described = extractor.network.to(topology.device), extractor.record
        comparison.check_statistics(described)
        if network.fc is None and "inception_score" in config.metrics:
            comparison.leave_out("inception_score", inception_weights.NO_LOGITS)
    judge = Judge(config.classifier, config, topology) if config.classifier is not None else None
    comparison.check_labels(None if judge is None else judge.classes)
    encoders = Encoders(
        DINOv2(config.dinov2, topology.device) if "fd_dinov2" in config.metrics and config.dinov2 else None,
        CLIPScore(config.clip, topology.device) if "clip_score" in config.metrics and config.clip else None,
    )
    extraction = Extraction(
        comparison.selections,
        network,
        None if judge is None else judge.network.classify,
        topology,
        config.batch,
        config.inception_score,
        encoders,
    )
    label = "features" if network else "images"
    with main_rank_progress(label, extraction.images_of_rank(), topology.rank, topology.world) as progress:
        measured = extraction.run(progress.advance if progress else lambda count, text: None)
    mistakes += comparison.mistakes_of_features(measured)
    result = scored(comparison, measured, mistakes, topology, described, judge, as_shipped, encoders)
    result["record"] |= {
        "device": str(topology.device.type),
        "ranks": topology.world,
        "seconds": round(time.monotonic() - began, 1),
    }
    return result


def scored(
    comparison: Comparison,
    measured: Sequence[SetFeatures],
    mistakes: Sequence[Found],
    topology: Topology,
    extractor: dict[str, object] | None,
    judge: "Judge | None" = None,
    as_shipped: EvaluateConfig | None = None,
    encoders: Encoders = NO_ENCODERS,
) -> dict[str, Any]:
    """What ``evaluate`` gives, save what the record says of the process (collective).

    measured: features of ``comparison.selections``. mistakes: in the data. extractor: its record.
    """
    config = comparison.config
    result: dict[str, Any] = {"n": comparison.n, "sets": {}}
    described_sets = {}
    for name in comparison.sets:
        result["sets"][name] = comparison.score(name, measured, topology)
        described_sets[name] = comparison.describe(name, measured, encoders.clip)
    if judge is not None:
        result["class_agreement_real"] = judge.real
    result["record"] = {
        "format": record.FORMAT,
        "protocol": passport.protocol(config, as_shipped),
        "bias": record.bias(comparison.n, inception.POOL_FEATURES, comparison.rough(measured, topology)),
        "metrics": passport.metrics(
            config,
            comparison.kid_subset,
            comparison.manifold,
            extractor,
            None if judge is None else judge.record,
            encoders.records(),
        ),
        "choice": {
            "limit": config.limit,
            "fewer": config.fewer,
            "taken": comparison.limit,
            "seed": config.seed,
            "policy": "class by class in turn, by hash",
        },
        "extractor": extractor,
        "sets": described_sets,
        "mistakes": [one.record() for one in mistakes],
        "batch": config.batch,
        "versions": versions("torch", "numpy"),
    }
    result["absent"] = comparison.absent
    return result


class Judge:
    """The classifier of real images, trained here; its own accuracy is ``real``."""

    def __init__(self, section: ClassifierSection, config: EvaluateConfig, topology: Topology) -> None:
        train, validation = (open_images(path, config.image_size) for path in (section.train, section.validation))
        for images in (train, validation):
            if images.labels is None:
                raise UserError(f"classifier: {images.path} has no labels; name real images that have")
        assert train.labels is not None
        assert validation.labels is not None
        self.classes = len(train.classes) if train.classes else int(train.labels.max()) + 1
        for images in (train, validation):
            images.check_labels(self.classes, "classifier", f"{train.path} has")
        chosen = balanced(train.labels, train.count, section.keep, section.seed)
        pixels = train.read(chosen)
        # the ranks train it together, so its bar counts the whole work
        with main_rank_progress("classifier", section.images, topology.rank, world=1) as progress:
            advance = progress.advance if progress else lambda count: None
            self.network = classifier.train(section, pixels, train.labels[chosen], self.classes, topology, advance)
        held_out = balanced(validation.labels, validation.count, section.keep, section.seed)
        right = [
            self.network.classify(validation.read(part)).cpu().numpy() == validation.labels[part]
            for part in np.split(held_out, range(config.batch, len(held_out), config.batch))
        ]
        self.real = float(np.concatenate(right).mean())
        self.record = {
            **section.model_dump(mode="json", exclude={"train", "validation"}),
            "train_sha256": classifier.data_sha256(pixels, train.labels[chosen]),
            "accuracy_on": f"{len(held_out)} held-out real images",
        }


def write(path: Path, result: Mapping[str, Any]) -> None:
    """The JSON file of a result. Raises UserError where it cannot be written."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_bytes(path, (json.dumps(result, indent=1, ensure_ascii=False, allow_nan=False) + "\n").encode())
    except OSError as error:
        raise UserError(f"out: {path} cannot be written ({error.strerror})") from None


def show(result: Mapping[str, Any]) -> None:
    """Print the numbers, the mistakes, and what is absent."""
    for name, values in result["sets"].items():
        LOG.info(f"{name}: " + "  ".join(f"{key} {value:.5g}" for key, value in values.items()))
    for mistake in result["record"]["mistakes"]:
        LOG.warning(f"MISTAKE in {mistake['set']}: {mistake['mistake']}: {mistake['what']}")
    for name, sides in result["record"]["sets"].items():
        for what, count in sides["images"].get("captions", {}).items():
            if what.startswith("longer_than") and count:
                LOG.warning(f"{name}: {count} captions are {what.replace('_', ' ')}: CLIP does not see their end")
    for metric, reason in result["absent"].items():
        LOG.info(f"{metric} is absent: {reason}")
    LOG.info(result["record"]["bias"])
