"""PROGRAM: extraction in batches against one image at a time, and two ranks against one.

    OMP_NUM_THREADS=1 python -m tests.bench.extract [--images 1000] [--repeats 5] [--vq16 4]

One image at a time is LlamaGen's way (a DataLoader with batch 1, an encoder pass for the crops of each image, int64
codes and label in an .npy file each), with the same weights, crops, fp32 and one thread, in a process of its own; the
ways take turns, and the share of equal codes is printed. First with the quickstart's tokenizer on 32 x 32 pixels, for
one crop and for ten; then, with --vq16 N, N images of 256 x 256 pixels through VQ-16. CPU seconds of the processes are
what is compared: on a busy machine the clock says little. Weights are random, which is as fast; trained ones have fewer
near ties.
"""

import argparse
import contextlib
import io
import os
import resource
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import yaml
from numpy.typing import NDArray
from safetensors.torch import save_file
from torch.utils.data import DataLoader, Dataset

import tokenizer_training.extract as program
from llamagen_dist.build import build_vq
from llamagen_dist.config import TokenizerModelSection
from llamagen_dist.data import images
from llamagen_dist.data.manifest import Manifest, write_manifest
from llamagen_dist.data.shards import Shards, open_shards
from llamagen_dist.data.tokens import CODES_MEMBER
from llamagen_dist.data.writer import shard_name, write_shard
from llamagen_dist.models.vq import VQModel
from tests.ranks.forked import run_ranks

QUICKSTART = Path(__file__).parent.parent.parent / "configs/tokenizer/quickstart.yaml"


class OneByOne(Dataset[tuple[NDArray[np.uint8], int]]):
    """uint8 [crops, S, S, 3] and the label of one image."""

    def __init__(self, shards: Shards, size: int, crops: str) -> None:
        self.shards, self.size, self.crops = shards, size, crops

    def __len__(self) -> int:
        return len(self.shards)

    def __getitem__(self, sample: int) -> tuple[NDArray[np.uint8], int]:
        image = images.read_image(self.shards, sample)
        views = [images.center_crop(image, self.size)]
        if self.crops == "ten_crop":
            views = images.ten_crops(image, self.size, 1.1)
        return np.stack([np.asarray(view) for view in views]), int(self.shards.labels([sample])[0])


def one_by_one(model: VQModel, shards: Shards, size: int, crops: str, out: Path) -> None:
    for folder in ("codes", "labels"):
        (out / folder).mkdir(parents=True)
    for number, (views, label) in enumerate(DataLoader(OneByOne(shards, size, crops), batch_size=1)):
        codes = model.encode(images.to_floats(views[0])).flatten(1).cpu().numpy()
        np.save(out / "codes" / f"{number}.npy", codes[None])
        np.save(out / "labels" / f"{number}.npy", label.numpy())


def seconds(work: Callable[[], object]) -> tuple[float, float]:
    """(CPU seconds of this process and its children, seconds by the clock) of one call."""

    def used() -> float:
        return sum(
            value.ru_utime + value.ru_stime
            for value in (resource.getrusage(resource.RUSAGE_SELF), resource.getrusage(resource.RUSAGE_CHILDREN))
        )

    cpu, wall = used(), time.monotonic()
    with contextlib.redirect_stdout(io.StringIO()):
        work()
    return used() - cpu, time.monotonic() - wall


def settings(folder: Path, section: dict[str, object], size: int, crops: str, batch: int, per_shard: int) -> Path:
    config = {
        "kind": "extract",
        "tokenizer": str(folder / "weights.safetensors"),
        "model": section,
        "images": str(folder / "images"),
        "out": str(folder / "ours"),
        "image_size": size,
        "crops": crops,
        "crop_ranges": [1.1],
        "batch": batch,
        "samples_per_shard": per_shard,
        "threads": 1,
    }
    (folder / "extract.yaml").write_text(yaml.safe_dump(config))
    return folder / "extract.yaml"


def codes_of(out: Path) -> NDArray[np.uint16]:
    shards = open_shards(out, "tokens")
    return np.stack([np.load(io.BytesIO(shards.read(n, CODES_MEMBER))) for n in range(len(shards))])


def compare(title: str, folder: Path, config: Path, size: int, crops: str, repeats: int) -> None:
    """Print both ways' CPU seconds per image and their ratio, in turns."""
    trained = program.tokenizer(program.load(config, kind="extract")).model
    shards = open_shards(folder / "images")
    taken: dict[str, list[float]] = {"ours": [], "one by one": []}
    for _ in range(repeats):
        for out in ("ours", "theirs"):
            shutil.rmtree(folder / out, ignore_errors=True)
        theirs = trained, shards, size, crops, folder / "theirs"
        taken["ours"].append(seconds(lambda: run_ranks(program.main, 1, [str(config)], timeout_s=600))[0])
        taken["one by one"].append(seconds(lambda theirs=theirs: run_ranks(one_by_one, 1, *theirs, timeout_s=600))[0])
    ours = codes_of(folder / "ours")
    others = np.stack([np.load(folder / "theirs" / "codes" / f"{n}.npy")[0] for n in range(len(shards))])
    ratios = [b / a for a, b in zip(taken["ours"], taken["one by one"], strict=True)]
    each = {name: statistics.median(values) / len(shards) * 1e3 for name, values in taken.items()}
    print(
        f"{title}: {each['ours']:.2f} ms of CPU per image, one by one {each['one by one']:.2f} ms: "
        f"x {statistics.median(ratios):.2f} (from {min(ratios):.2f} to {max(ratios):.2f}, {repeats} turns); "
        f"{(ours == others).mean():.3%} equal codes",
        flush=True,
    )


def ranks(folder: Path, config: Path, count: int, repeats: int) -> None:
    """Print what a second rank is worth."""
    taken: dict[int, list[tuple[float, float]]] = {1: [], 2: []}
    for _ in range(repeats):
        for world in taken:
            shutil.rmtree(folder / "ours", ignore_errors=True)
            taken[world].append(seconds(lambda world=world: run_ranks(program.main, world, [str(config)])))
    clock = [one[1] / two[1] for one, two in zip(taken[1], taken[2], strict=True)]
    work = [two[0] / one[0] for one, two in zip(taken[1], taken[2], strict=True)]
    print(
        f"2 ranks against 1, {count} images, by the clock: x {statistics.median(clock):.2f} (from {min(clock):.2f} to "
        f"{max(clock):.2f}; needs 2 idle cores, load now {os.getloadavg()[0]:.1f}); they use "
        f"x {statistics.median(work):.2f} the CPU seconds, so two cores are worth x {2 / statistics.median(work):.2f}",
        flush=True,
    )


def tokenizer(folder: Path, section: dict[str, object]) -> None:
    torch.manual_seed(0)
    weights = build_vq(TokenizerModelSection(**section)).state_dict()
    save_file({name: value.contiguous() for name, value in weights.items()}, folder / "weights.safetensors")


def photographs(folder: Path, count: int, size: int) -> None:
    """Shards of ``count`` smooth pictures."""
    rng = np.random.default_rng(0)
    folder.mkdir()

    def samples():
        for number in range(count):
            small = images.Image.fromarray(rng.integers(256, size=(8, 8, 3)).astype(np.uint8))
            buffer = io.BytesIO()
            small.resize((size, size), images.Image.Resampling.BICUBIC).save(buffer, "PNG")
            yield f"{number:06d}", {".png": buffer.getvalue(), ".cls": b"0"}

    record = write_shard(folder, shard_name(0), samples(), (".cls", ".png"))
    write_manifest(folder, Manifest("images", count, (".cls", ".png"), (record,), ["a"], size))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--images", type=int, default=1000, help="of 32 x 32 pixels")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--vq16", type=int, default=0, metavar="N", help="also N images through VQ-16, ten crops each")
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "quickstart"
        folder.mkdir()
        section = {k: v for k, v in yaml.safe_load(QUICKSTART.read_text())["model"].items() if k != "codebook_init"}
        tokenizer(folder, section)
        photographs(folder / "images", args.images, 32)
        config = settings(folder, section, 32, "center", 128, 100)
        compare("32 px, one crop", folder, config, 32, "center", args.repeats)
        ranks(folder, config, args.images, args.repeats)
        shutil.rmtree(folder / "images")
        photographs(folder / "images", args.images // 10, 40)
        config = settings(folder, section, 32, "ten_crop", 80, 100)
        compare("32 px, ten crops", folder, config, 32, "ten_crop", args.repeats)
        if args.vq16:
            folder = Path(scratch) / "vq16"
            folder.mkdir()
            tokenizer(folder, {"size": "VQ-16"})
            photographs(folder / "images", args.vq16, 320)
            config = settings(folder, {"size": "VQ-16"}, 256, "ten_crop", 10, 100)
            compare("256 px, VQ-16, ten crops", folder, config, 256, "ten_crop", max(1, args.repeats // 3))


if __name__ == "__main__":
    main()
