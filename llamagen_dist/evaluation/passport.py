"""Where the two sides of a comparison come from: who made the pictures and how, and what is known of the reference.

Everything here is read from files or counted, and says from where; what no file says is called unknown.
"""

import hashlib
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llamagen_dist.config import EvaluateConfig, difference
from llamagen_dist.data.shards import Shards
from llamagen_dist.errors import UserError
from llamagen_dist.evaluation import extrapolation, inception, inception_score, kid, record
from llamagen_dist.evaluation.image_sets import ImageSet
from llamagen_dist.evaluation.manifold import Convention
from llamagen_dist.evaluation.picture_files import PictureFiles
from llamagen_dist.files import json_if_there

UNKNOWN = "unknown"
EXTRACTOR = ("network", "weights_sha256", "arithmetic", "resize")
"""What of an extractor decides the features."""
_OF_THE_PROCESS = (  # what a record.json says that decides no picture, or that is a path
    *("checkpoint", "tokenizer", "sets", "meaning", "device", "ranks", "seconds_of_the_last_start", "image_shards"),
    "images_per_s_of_the_last_start",
    *("definitions", "region", "n"),
)
_PUBLISHED = {256: ("VIRTUAL_imagenet256_labeled.npz", 10000), 512: ("VIRTUAL_imagenet512.npz", 1000)}
"""Pixels -> name and number of pictures of ADM's references for ImageNet."""


def protocol(config: EvaluateConfig, as_shipped: EvaluateConfig | None) -> dict[str, Any]:
    """The name of the protocol (``unnamed`` where the file gives none) and every key of it that was overridden.

    as_shipped: the config file alone; None where it is incomplete without the command line.
    """
    ignored = ("generated", "sample", "reference", "sets", "out", "threads", "batch", "classifier", "inception.cache")
    changed = [] if as_shipped is None else difference(as_shipped, config, ignored)
    return {"name": config.protocol or "unnamed", "changed": changed}


def metrics(
    config: EvaluateConfig,
    kid_subset: int,
    convention: Convention,
    extractor: Mapping[str, Any] | None,
    classifier: dict[str, Any] | None,
    encoders: Mapping[str, dict[str, Any]],
) -> dict[str, Any]:
    """Metric -> everything besides the images that decides its value; equal for comparable results.

    extractor, classifier, encoders: their records.
    """
    network: dict[str, Any] = {}
    if extractor is not None:
        network = {key: extractor[key] for key in EXTRACTOR}
    pool = {**network, "features": inception.TAPS["fid"]}
    subsets = {"subsets": config.kid.subsets, "subset_size": kid_subset}
    hashed = config.kid.draw == "hashed"
    drawn = {"seed": config.seed} if hashed else {"seed": kid.TORCH_FIDELITY_SEED, "draw": "torch-fidelity"}
    kid_section = {**subsets, **drawn, "kernel": "(x.y / d + 1)^3, unbiased"}
    splits = 1 if config.inception_score == "whole" else inception_score.MEANING[config.inception_score]
    large = {"keep": config.keep, "subsample": config.subsample}
    details: dict[str, dict[str, Any]] = {
        "fid": {**pool, "covariance": "n - 1"},
        "sfid": {**network, "features": inception.TAPS["sfid"], "covariance": "n - 1"},
        "kid": {**pool, **kid_section, **large},
        "precision_recall": {**pool, **convention.describe(), **large},
        "density_coverage": {**pool, **convention.describe(), **large},
        "fid_infinity": {
            **pool,
            "points": config.fid_infinity_points,
            "smallest": extrapolation.SMALLEST,
            "seed": config.seed,
            **large,
        },
        "inception_score": {**network, "logits_sha256": (extractor or {}).get("logits_sha256"), "splits": splits},
        "class_agreement": classifier or {},
        **encoders,
    }
    return {metric: details[metric] for metric in record.VALUES if metric in config.metrics}


def made_by(images: ImageSet) -> dict[str, Any] | None:
    """How pictures were made: what the record.json beside an .npz says, or the GPT that draws them; None: unknown.

    eval.sample: weights, guidance and its schedule, temperature, top-k, top-p, seed and which class a sample has.
    eval.reconstruct: the tokenizer, and the hash of the image shards that it reconstructed (``images``).
    """
    if images.drawn is not None:
        return {key: value for key, value in images.drawn.items() if key not in _OF_THE_PROCESS}
    record = json_if_there(images.path.parent / "record.json") if images.path.suffix == ".npz" else None
    if record is None or record.get("n") != images.count:
        return None
    if images.path.stem in (record.get("sets") or ()):
        about = {"program": "eval.sample", "set": images.path.stem}
    elif images.path.name == "reconstruction.npz" and "images" in record:
        about = {"program": "eval.reconstruct"}
        record = {key: value for key, value in record.items() if key != "perturbed"}
    elif images.path.name == "perturbed.npz" and "perturbed" in record:
        about = {"program": "eval.reconstruct", "set": "perturbed"}
    else:
        return None
    return about | {key: value for key, value in record.items() if key not in _OF_THE_PROCESS}


def class_policy(labels: NDArray[np.int64] | None) -> str:
    """How often the classes occur, in words. labels: int64 [n] of the images that are scored."""
    if labels is None:
        return "no labels"
    counts = np.unique(labels, return_counts=True)[1]
    least, most = int(counts.min()), int(counts.max())
    return f"{len(counts)} classes, {most if least == most else f'{least} to {most}'} images of each"


def provenance(images: ImageSet) -> dict[str, Any]:
    """What is known of a reference: name, images behind its statistics, split, crop, and how that is known."""
    if images.provenance is not None:
        return {**images.provenance, "known_by": "the file itself (eval.reference)"}
    if isinstance(images.pixels, Shards):
        manifest = images.pixels.manifest
        folder = images.path.name
        return {
            "name": f"{images.path.parent.name}/{folder}",
            "count": images.count,
            "split": folder if folder in ("train", "validation") else UNKNOWN,
            "crop": f"stored as {manifest.image_size or 'mixed sizes'}, ADM's centre crop to {images.stored_size[1]}",
            "fingerprint": manifest.fingerprint(),
            "known_by": "the manifest of the image shards; the split by the folder's name",
        }
    if isinstance(images.pixels, PictureFiles):
        height, width = images.pixels.height, images.pixels.width
        crop = UNKNOWN if images.pixels.crop is None else f"ADM's centre crop to {images.pixels.crop}"
        known = {"split": UNKNOWN, "crop": f"{crop}, read as {width} x {height}", "known_by": "the picture files"}
        return {"name": images.path.name, "count": images.count, **known}
    if (published := _published(images)) is not None:
        return published
    return {"name": images.path.name, "count": images.count or None, "split": UNKNOWN, "crop": UNKNOWN, "known_by": ""}


def _published(images: ImageSet) -> dict[str, Any] | None:
    """ADM's ImageNet references, by their structure: four statistics, and 10,000 pictures of 256 (1,000 of 512).

    No hash of their arrays is known here, so a file that merely looks like one cannot be told from it.
    """
    height, width = images.stored_size
    name, pictures = _PUBLISHED.get(height, ("", 0))
    if height != width or images.count != pictures or set(images.statistics) != {"fid", "sfid"}:
        return None
    return {
        "name": name,
        "count": None,
        "split": "train",
        "crop": f"ADM's centre crop to {height}",
        "known_by": f"its structure only (mu, sigma, mu_s, sigma_s, {pictures:,} pictures of {height} pixels); no hash",
    }


def refuse_other_statistics(reference: ImageSet, extractor: Mapping[str, Any], size: tuple[int, int]) -> None:
    """Raises UserError where stored statistics were made with another network or size than the pictures are looked at.

    extractor: the record of this one. size: (width, height) of the pictures.
    Statistics that do not say how they were made cannot be checked.
    """
    about = reference.provenance
    if about is None or not reference.statistics:
        return
    here = {**{key: extractor[key] for key in EXTRACTOR}, "size": list(size)}
    there = {**about.get("extractor", {}), "resize": about.get("resize"), "size": about.get("size")}
    for key, value in here.items():
        if there.get(key) != value:
            raise UserError(
                f"{reference.path}: its statistics were made with {key} {there.get(key)}, but here it is {value}; make "
                "them again with eval.reference"
            )


def statistics_sha256(images: ImageSet) -> str:
    """sha256 (hex) over the bytes of all stored statistics."""
    digest = hashlib.sha256()
    for mean, covariance in images.statistics.values():
        digest.update(mean.tobytes())
        digest.update(covariance.tobytes())
    return digest.hexdigest()


def settings(result: Mapping[str, Any]) -> dict[str, str]:
    """``what: value`` of everything that results may differ in and still be compared, flat, for people to read."""
    record = result["record"]
    named = record.get("protocol") or {}
    flat = {"protocol": named.get("name", "unnamed"), "overridden": "; ".join(named.get("changed", [])) or "nothing"}
    for name, sides in record["sets"].items():
        images = sides.get("images", {})
        flat[f"{name}: classes"] = images.get("classes", UNKNOWN)
        for key, value in (images.get("made_by") or {}).items():
            if not isinstance(value, (dict, list)):
                flat[f"{name}: {key}"] = str(value)
    flat |= {f"version of {package}": version for package, version in (record.get("versions") or {}).items()}
    return flat
