"""PROGRAM: VQ-16's encoder as extraction runs it against its plain module, and a training step with each compute key.

    OMP_NUM_THREADS=1 python -m tests.bench.tokenizer [--images 2] [--turns 3] [--step-size 128] [--compile]

The plain module is VQ-16 in fp32 with contiguous tensors, one image of 256 x 256 pixels at a time. The same weights
are then run channels_last, as extraction runs them (channels_last, and memory that stays with the process), and as it
does with ``precision: bf16``. Printed are CPU-seconds per image, the ratio to the plain module, and the share of codes
that are not the plain module's. A training step is one image of --step-size pixels through VQ-16 with its PatchGAN (no
LPIPS), by default (contiguous, fp32) and with the keys of ``compute``; printed are its CPU-seconds, the ratio, and the
peak memory of the process beyond what it had before. Every way runs in a process of its own, after one image that warms
it up, and the ways take turns; medians. Weights are random, which is as fast; trained ones have fewer near ties. With
--compile, also compiled; its C++ is kept between turns, so that only the first one waits for it.
"""

import argparse
import resource
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from llamagen_dist.build import build_vq
from llamagen_dist.config import ExtractConfig, TokenizerConfigFile, TokenizerModelSection
from llamagen_dist.config.section import build
from llamagen_dist.data.batch import ImageBatch
from llamagen_dist.data.images import to_floats
from llamagen_dist.data.shards import open_shards
from llamagen_dist.models.vq import VQModel
from llamagen_dist.parallel.topology import Topology
from tests.image_shards import write_images
from tests.ranks.forked import run_ranks
from tokenizer_training.crops import CropCoder
from tokenizer_training.task import TokenizerTask

SIDE = 256
PLAIN = "contiguous, fp32"
ENCODING = (PLAIN, "channels_last", "extraction", "extraction, bf16")
STEPS: dict[str, dict[str, Any]] = {
    PLAIN: {},
    "channels_last": {"channels_last": True},
    "bf16": {"precision": "bf16"},
    "bf16, channels_last": {"precision": "bf16", "channels_last": True},
    "recompute_every: 1": {"recompute_every": 1},
}
COMPILED = {"compile": {"compile": True}, "compile, channels_last": {"compile": True, "channels_last": True}}


def pictures(count: int, size: int) -> NDArray[np.uint8]:
    """Smooth ones, uint8 [count, size, size, 3]."""
    rng = np.random.default_rng(0)
    small = (Image.fromarray(rng.integers(256, size=(8, 8, 3)).astype(np.uint8)) for _ in range(count))
    return np.stack([np.asarray(one.resize((size, size), Image.Resampling.BICUBIC)) for one in small])


def encode(way: str, model: VQModel, views: NDArray[np.uint8]) -> tuple[float, Tensor]:
    """(CPU-seconds per image, codes) in this process."""
    one_by_one: Callable[[NDArray[np.uint8]], Tensor]
    if "extraction" in way:
        section = {"kind": "extract", "tokenizer": "-", "images": "-", "out": "-", "batch": 1}
        coder = CropCoder(build(ExtractConfig, section, "bench"), model)
        precision = "bf16" if "bf16" in way else "fp32"
        one_by_one = lambda view: coder._encode([view], precision)  # noqa: E731
    else:
        if way != PLAIN:
            model.to(memory_format=torch.channels_last)
        if "compile" in way:
            model.compile_halves()
        one_by_one = lambda view: model.encode(to_floats(view[None])).flatten(1)  # noqa: E731
    with torch.no_grad():
        one_by_one(views[0])
        begun = time.process_time()
        codes = [one_by_one(view) for view in views]
    return (time.process_time() - begun) / len(views), torch.cat(codes)


def step(folder: Path, compute: dict[str, Any], size: int) -> tuple[float, float]:
    """(CPU-seconds of a step, GiB) in this process."""
    config = build(TokenizerConfigFile,
        {"kind": "tokenizer", "run_dir": folder / "run", "model": {"size": "VQ-16"}, "compute": compute,
         "data": {"train": folder, "validation": folder, "image_size": size},
         "loss": {"perceptual": "none", "discriminator": {"start_images": 0}},
         "train": {"images": 100, "global_batch": 1}}, "bench")  # fmt: skip
    torch.manual_seed(0)
    task = TokenizerTask(build_vq(config.model), config, Topology(), open_shards(folder))
    images = to_floats(pictures(1, size))
    before = peak()
    task.step(ImageBatch(images, torch.zeros(1, dtype=torch.int64)), 0)
    begun = time.process_time()
    task.step(ImageBatch(images, torch.zeros(1, dtype=torch.int64)), 1)
    return time.process_time() - begun, peak() - before


def peak() -> float:
    """GiB resident at most so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1 << 20)


def in_turns(turns: int, ways: dict[str, Callable[[], Any]]) -> dict[str, list[Any]]:
    """By way, what ``turns`` processes of it returned."""
    found: dict[str, list[Any]] = {way: [] for way in ways}
    for _ in range(turns):
        for way, work in ways.items():
            found[way].append(run_ranks(work, 1, timeout_s=3600)[0])
    return found


def against(plain: list[Any], other: list[Any]) -> str:
    """The ratio of the first numbers of what both returned, turn by turn."""
    ratios = [a[0] / b[0] for a, b in zip(plain, other, strict=True)]
    return f"x {statistics.median(ratios):.2f} (from {min(ratios):.2f} to {max(ratios):.2f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=2, help="of 256 x 256 pixels, 0: no encoding")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--step-size", type=int, default=128, help="pixels along a side of a step's image, 0: no step")
    parser.add_argument("--compile", action="store_true", help="also compiled, which takes minutes the first time")
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.images:
        torch.manual_seed(0)
        model, views = build_vq(TokenizerModelSection(size="VQ-16")).eval(), pictures(args.images, SIDE)
        names = (*ENCODING, *(("compile, channels_last",) if args.compile else ()))
        ways: dict[str, Callable[[], Any]] = {way: (lambda way=way: encode(way, model, views)) for way in names}
        print(f"VQ-16 encodes {args.images} images of {SIDE} x {SIDE} pixels, 1 thread, {args.turns} turns")
        found = in_turns(args.turns, ways)
        for way, results in found.items():
            took = statistics.median(result[0] for result in results)
            changed = float((results[0][1] != found[PLAIN][0][1]).double().mean())
            print(f"{way:24} {took:7.2f} CPU-s an image, {against(found[PLAIN], results)}, {changed:.2%} other codes")
    if args.step_size:
        with tempfile.TemporaryDirectory() as scratch:
            folder = write_images(Path(scratch) / "images", 1, args.step_size)
            keys = STEPS | (COMPILED if args.compile else {})
            ways = {way: (lambda keys=key: step(folder, keys, args.step_size)) for way, key in keys.items()}
            print(f"a step of VQ-16 with PatchGAN on one image of {args.step_size} pixels, {args.turns} turns")
            found = in_turns(args.turns, ways)
        for way, results in found.items():
            took, held = (statistics.median(result[part] for result in results) for part in (0, 1))
            print(f"{way:24} {took:7.2f} CPU-s, {against(found[PLAIN], results)}, {held:.2f} GiB more at its peak")


if __name__ == "__main__":
    main()
