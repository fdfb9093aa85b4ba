"""PROGRAM: the training images nearest to samples, to see whether a model draws what it learnt or copies it.

    torchrun --nproc-per-node=8 -m eval.neighbours configs/eval/neighbours.yaml samples=PATH images=PATH out=DIR

also plain ``python -m`` for one rank, or ``srun``. A PATH is an .npz (arr_0) or a folder of image shards. A sample that
lies much nearer to a training image than training images lie to each other is a suspected copy.
"""

import json
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from llamagen_dist.config import NeighboursConfig, load
from llamagen_dist.console import LOG, main_rank_progress
from llamagen_dist.errors import UserError
from llamagen_dist.evaluation import inception_weights, neighbours
from llamagen_dist.evaluation.image_sets import ImageSet, balanced, open_images
from llamagen_dist.files import write_text
from llamagen_dist.parallel.topology import Topology, full_fp32, start
from llamagen_dist.program import run as run_program
from llamagen_dist.sampling.grid import enlarged, labelled_grid, save
from llamagen_dist.tracking.provenance import versions

RESULT, PICTURE = "neighbours.json", "neighbours.png"
SHOWN = 12  # samples in the picture: those that lie nearest
QUANTILES = (0.0, 0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 1.0)


def main(argv: list[str]) -> None:
    if not argv:
        raise UserError("usage: python -m eval.neighbours CONFIG samples=PATH images=PATH out=DIR [key=value …]")
    config: NeighboursConfig = load(argv[0], argv[1:], kind="neighbours")
    topology = start(threads=config.threads)
    full_fp32()
    samples, images = (open_images(path, config.image_size) for path in (config.samples, config.images))
    if images.count <= config.k:
        raise UserError(f"images: {images.path} holds {images.count} images, too few for k={config.k} neighbours")
    describe, what = features(config, topology)
    topology.log0(f"features: {what}")
    chosen = balanced(samples.labels, samples.count, config.limit or samples.count, config.seed)
    real = balanced(images.labels, images.count, config.real, config.seed)
    if len(chosen) < samples.count:
        topology.log0(f"{len(chosen)} of the {samples.count:,} samples are looked at (limit)")
    distances, numbers = nearest(config, topology, describe, samples, images, chosen, real)
    among_real = distances[len(chosen) :, 0]
    threshold, shares = neighbours.nearness(distances[: len(chosen), 0], among_real)
    distances, numbers = distances[: len(chosen)], numbers[: len(chosen)]
    closest = np.argsort(distances[:, 0], kind="stable")
    suspected = [row for row in closest.tolist() if distances[row, 0] <= threshold]
    result = {
        "n": len(chosen),
        "images": images.count,
        "suspected_copies": [int(chosen[row]) for row in suspected],
        "threshold": threshold,
        "distances": {"samples": quantiles(distances[:, 0]), "real": quantiles(among_real)},
        "samples": [
            {
                "sample": int(chosen[row]),
                "images": numbers[row].tolist(),
                "distances": distances[row].tolist(),
                "real_no_larger": float(shares[row]),
            }
            for row in closest
        ],
        "record": {
            "features": what,
            "samples": str(samples.path),
            "images": str(images.path),
            "meaning": {
                "distances": f"Euclidean; real: from {len(real)} training images to the nearest other one",
                "real_no_larger": "share of the real distances that are no larger than the sample's",
                "threshold": f"{neighbours.CLOSER} x the {neighbours.LEVEL:.0%} quantile of the real distances",
            },
            "k": config.k,
            "seed": config.seed,
            "batch": config.batch,
            "ranks": topology.world,
            "device": str(topology.device.type),
            "versions": versions("torch", "numpy"),
        },
    }
    topology.broadcast_from_rank0(lambda: finish(config, result, samples, images))


def features(config: NeighboursConfig, topology: Topology) -> tuple[neighbours.Describe, str]:
    """What images are compared by, and what to call it. Raises UserError where Inception is asked for and not there."""
    pixels = f"pixels averaged down to {neighbours.PIXEL_SIDE} x {neighbours.PIXEL_SIDE}"
    if config.features == "pixels":
        return neighbours.pixel_features, pixels
    extractor = inception_weights.open_extractor(config.inception)
    if not isinstance(extractor, str):
        network = extractor.network.to(topology.device)
        described = f"Inception pool (weights {str(extractor.record['weights_sha256'])[:12]}…)"
        return neighbours.inception_features(network, config.batch, topology.device), described
    if config.features == "inception":
        raise UserError(f"features: {extractor}; or set features=pixels")
    return neighbours.pixel_features, f"{pixels}, because {extractor}"


def nearest(
    config: NeighboursConfig,
    topology: Topology,
    describe: neighbours.Describe,
    samples: ImageSet,
    images: ImageSet,
    chosen: NDArray[np.int64],
    real: NDArray[np.int64],
) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """(distances, numbers of images), [samples and then real images, k] each. Every rank describes all queries and its
    share of the training images (collective)."""
    parts = np.split(np.arange(images.count), range(config.batch, images.count, config.batch))
    mine = parts[topology.rank :: topology.world]
    total = len(chosen) + len(real) + sum(map(len, mine))
    with main_rank_progress("images", total, topology.rank, topology.world) as progress:

        def described(source: ImageSet, indices: NDArray[np.int64]) -> torch.Tensor:
            found = describe(source.read(indices))
            if progress is not None:
                progress.advance(len(indices), source.path.name)
            return found

        queries = [
            described(source, part)
            for source, indices in ((samples, chosen), (images, real))
            for part in np.split(indices, range(config.batch, len(indices), config.batch))
        ]
        own = torch.cat([torch.full((len(chosen),), -1), torch.from_numpy(real)])
        try:
            search = neighbours.Nearest(torch.cat(queries), own, config.k)
            for part in mine:
                search.add(described(images, part), torch.from_numpy(part))
        except ValueError as error:
            raise UserError(f"{error}; the weights of the extractor, or this device, are at fault") from None
        return search.over_ranks(topology)


def quantiles(values: NDArray[np.float64]) -> dict[str, float]:
    return {f"{q:g}": float(np.quantile(values, q)) for q in QUANTILES}


def finish(config: NeighboursConfig, result: dict[str, Any], samples: ImageSet, images: ImageSet) -> None:
    """Write the table and the picture, and say what was seen. Rank 0 only."""
    try:
        config.out.mkdir(parents=True, exist_ok=True)
        write_text(config.out / RESULT, json.dumps(result, indent=1, allow_nan=False) + "\n")
    except OSError as error:
        raise UserError(f"out: {config.out} cannot be written ({error.strerror})") from None
    suspected, shown = result["suspected_copies"], result["samples"][:SHOWN]
    cells, side = [], samples.height
    for entry in shown:
        drawn = samples.read(np.array([entry["sample"]]))
        beside = images.read(np.array(entry["images"]))
        cells.append([np.asarray(enlarged(picture, side)) for picture in (*drawn, *beside)])
    names = [
        f"sample {entry['sample']}: {entry['distances'][0]:.3g}" + (" (copy?)" if entry["sample"] in suspected else "")
        for entry in shown
    ]
    columns = ["sample", *(f"{number}. nearest" for number in range(1, config.k + 1))]
    title = f"The samples nearest to training images; real images: median {result['distances']['real']['0.5']:.3g}"
    save(config.out / PICTURE, lambda: labelled_grid(np.array(cells), names, columns, title))
    for entry in shown[:3]:
        LOG.info(
            f"sample {entry['sample']}: image {entry['images'][0]} at {entry['distances'][0]:.4g}; "
            f"{entry['real_no_larger']:.1%} of real images have another so near"
        )
    LOG.info(f"{len(suspected)} of {result['n']} samples are suspected copies (within {result['threshold']:.4g})")
    LOG.info(f"{config.out / RESULT}\n{config.out / PICTURE}")


if __name__ == "__main__":
    run_program(main)
