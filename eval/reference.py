"""PROGRAM: reference statistics of any data set, for FID, sFID and (with some of its pictures) precision, recall, KID.

    torchrun --nproc-per-node=8 -m eval.reference images=PATH out=FILE.npz [image_size=256] [key=value ...]

also plain ``python -m`` for one rank, ``srun``, or with a config file (kind: reference) as the first word. PATH is a
folder of image shards, a folder or zip of pictures, or an .npz. The file has the arrays of ADM's references (mu, sigma,
mu_s, sigma_s, arr_0) and in ``provenance`` what they are statistics of; eval.evaluate takes it as ``reference``.
"""

import json
from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llamagen_dist.config import InceptionSection, ReferenceConfig, load, parse
from llamagen_dist.config.loader import resolve
from llamagen_dist.console import main_rank_progress
from llamagen_dist.errors import UserError
from llamagen_dist.evaluation import inception_weights, passport
from llamagen_dist.evaluation.features import Extraction, Selection, SetFeatures
from llamagen_dist.evaluation.image_sets import PROVENANCE, STATISTICS, ImageSet, balanced, choose, open_images
from llamagen_dist.parallel.topology import full_fp32, start
from llamagen_dist.program import run as run_program
from llamagen_dist.sampling.chunks import write_npz
from llamagen_dist.tracking.provenance import versions

BLOCK = 64  # pictures in memory while the file is written


def main(argv: list[str]) -> None:
    if not argv:
        raise UserError("usage: python -m eval.reference [CONFIG] images=PATH out=FILE.npz [key=value ...]")
    config = _config(argv)
    topology = start(threads=config.threads)
    full_fp32()
    images = open_images(config.images, config.image_size, resize_to=config.resize_to)
    indices = choose(images, config.limit, config.seed)
    if len(indices) < 2:
        raise UserError(f"{config.images}: gives {len(indices)} images; a covariance needs at least two")
    extractor = _extractor(config.inception)
    selection = Selection(images, indices, kept=np.empty(0, np.int64))  # moments only, however many images there are
    extraction = Extraction([selection], extractor.network.to(topology.device), None, topology, config.batch)
    with main_rank_progress("features", extraction.images_of_rank(), topology.rank, topology.world) as progress:
        (measured,) = extraction.run(progress.advance if progress else lambda count, text: None)
    about = _provenance(config, images, indices, measured.sha256, extractor.record)
    topology.broadcast_from_rank0(lambda: _write(config, images, indices, measured, about))
    topology.log0(
        f"{config.out}: statistics of {about['count']:,} images of {about['name']} (split: {about['split']}; crop: "
        f"{about['crop']}), {about['pictures']:,} pictures"
    )


def _config(argv: list[str]) -> ReferenceConfig:
    config: ReferenceConfig
    if "=" in argv[0]:
        config = resolve({"kind": "reference", **parse(argv)}, "eval.reference", kind="reference")
    else:
        config = load(argv[0], argv[1:], kind="reference")
    if config.out.suffix != ".npz" or config.out.is_dir():
        raise UserError(f"out: {config.out} must be the name of an .npz file")
    return config


def _extractor(section: InceptionSection) -> inception_weights.Extractor:
    extractor = inception_weights.open_extractor(section)
    if isinstance(extractor, str):
        raise UserError(f"no statistics without the extractor: {extractor}")
    return extractor


def _provenance(
    config: ReferenceConfig, images: ImageSet, indices: NDArray[np.int64], sha256: str, extractor: dict[str, object]
) -> dict[str, Any]:
    """What the file says of itself, as JSON can hold it."""
    known = passport.provenance(images)
    return {
        "name": config.name or known["name"],
        "count": len(indices),
        "of": images.count,
        "sha256": sha256,
        "split": config.split or known["split"],
        "crop": known["crop"],
        "size": [images.width, images.height],
        "cropped": [*images.stored_size[::-1]],
        "fingerprint": known.get("fingerprint"),
        "classes": passport.class_policy(None if images.labels is None else images.labels[indices]),
        "pictures": min(config.pictures, len(indices)),
        "seed": config.seed,
        "extractor": {key: extractor[key] for key in passport.EXTRACTOR},
        "resize": extractor["resize"],
        "versions": versions("torch", "numpy"),
    }


def _write(
    config: ReferenceConfig, images: ImageSet, indices: NDArray[np.int64], measured: SetFeatures, about: dict[str, Any]
) -> None:
    """Rank 0 only."""
    labels = None if images.labels is None else images.labels[indices]
    shown = indices[balanced(labels, len(indices), config.pictures, config.seed)]
    arrays: dict[str, NDArray[Any]] = {PROVENANCE: np.frombuffer(json.dumps(about).encode(), np.uint8)}
    for metric, (mean, covariance, _) in STATISTICS.items():
        gaussian = getattr(measured, metric)
        arrays[mean], arrays[covariance] = gaussian.mean.cpu().numpy(), gaussian.covariance.cpu().numpy()

    def blocks() -> Iterator[NDArray[np.uint8]]:
        for first in range(0, len(shown), BLOCK):
            yield images.read(shown[first : first + BLOCK])

    try:
        config.out.parent.mkdir(parents=True, exist_ok=True)
        shown_labels = None if images.labels is None or not len(shown) else images.labels[shown]
        write_npz(config.out, shown_labels, len(shown), blocks(), arrays)
    except OSError as error:
        raise UserError(f"out: {config.out} cannot be written ({error.strerror})") from None


if __name__ == "__main__":
    run_program(main)
