"""PROGRAM: how much of a training step is spent on waiting for data.

    OMP_NUM_THREADS=1 python -m tests.bench.data_wait [--side 16] [--steps 40] [--repeats 7] [--workers 2]

First it trains two sizes of the quickstart's ladder through the training program on made-up shards,
and reads the wait out of metrics.jsonl: data_s / step time. Then the same global batches (16 images) are read by our
stream and in the way that is usual elsewhere, one .npy file per image through a shuffling DataLoader (LlamaGen's own
layout), interleaved; with workers, what the training process itself has to wait and compute is counted, not theirs.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader

from llamagen_dist.data.shards import open_shards
from llamagen_dist.data.tokens import TokenStream
from llamagen_dist.parallel.topology import Topology
from llamagen_dist.train_gpt import main as train_gpt
from tests.bench import token_sets

BATCH, CLASSES, VOCABULARY = 16, 10, 1024
CONFIG = Path(__file__).parent.parent.parent / "configs/gpt/quickstart.yaml"
SIZES = {"g60k": (2, 4, 32), "g1m": (5, 16, 128)}  # layers, heads, width


def train(folder: Path, shards: Path, size: tuple[int, int, int], steps: int) -> None:
    """What one size waits for data, of its whole step."""
    layers, heads, width = size
    settings = {
        "run_dir": folder,
        "data.train": shards,
        "data.validation": shards,
        "model.n_layer": layers,
        "model.n_head": heads,
        "model.dim": width,
        "train.images": BATCH * steps,
        "validation.at_images": "[]",
        "validation.images": 16,
        "parallel.zero": 0,
        "optim.warmup_images": BATCH,
    }
    train_gpt([str(CONFIG), *(f"{key}={value}" for key, value in settings.items())])


def report(folder: Path, name: str) -> None:
    lines = [json.loads(text) for text in (folder / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "data_s" in line and line["step"] > 3]
    shares = [line["data_s"] * line["images_per_s"] / BATCH for line in steps]
    wait, step = (
        statistics.median(x) for x in ([s["data_s"] for s in steps], [BATCH / s["images_per_s"] for s in steps])
    )
    print(f"{name:>6} {1e3 * wait:>12.3f} {1e3 * step:>10.2f} {statistics.median(shares):>9.2%}", flush=True)


def spent(read: Callable[[], Any], batches: int) -> tuple[float, float]:
    """(wall, CPU of this process) seconds per batch."""
    wall, cpu = time.perf_counter(), time.process_time()
    for _ in range(batches):
        read()
    return (time.perf_counter() - wall) / batches, (time.process_time() - cpu) / batches


def endless(loader: DataLoader[Any]) -> Iterator[Any]:
    while True:
        yield from loader


def readers(ours: Path, files: Path, count: int, workers: int) -> dict[str, Callable[[], Any]]:
    stream, position = TokenStream(open_shards(ours), Topology(), BATCH, 0, 0.1), [0]

    def read_ours() -> Any:
        position[0] += BATCH
        return stream.batch(position[0] - BATCH)

    found: dict[str, Callable[[], Any]] = {"ours": read_ours}
    for number in {0, workers}:
        loader = DataLoader(token_sets.Files(files, count), BATCH, shuffle=True, num_workers=number, drop_last=True)
        batches = endless(loader)
        found[f"files, {number} workers"] = lambda batches=batches: next(batches)  # type: ignore[misc]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--side", type=int, default=16, help="tokens along one side of an image; the quickstart's: 7")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--samples", type=int, default=20_000)
    parser.add_argument("--workers", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        sizes = (args.samples, 1, args.side, CLASSES, VOCABULARY)
        ours = token_sets.write_ours(folder / "shards", *sizes)
        files = token_sets.write_files(folder / "files", *sizes)
        for name, size in SIZES.items():
            train(folder / name, ours, size, args.steps)
        print(
            f"\n{'model':>6} {'data ms':>12} {'step ms':>10} {'share':>9}   (1 rank, {BATCH} x {args.side**2} tokens)"
        )
        for name in SIZES:
            report(folder / name, name)
        found = readers(ours, files, args.samples, args.workers)
        batches = min(200, args.samples // BATCH)
        for read in found.values():  # page cache, workers
            spent(read, batches)
        times = {name: [] for name in found}
        for _ in range(args.repeats):
            for name, read in found.items():
                times[name].append(spent(read, batches))
        print(
            f"\n{'reader':>18} {'wall ms':>9} {'CPU ms':>9} {'CPU / ours':>11}   (per batch, medians of {args.repeats})"
        )
        base = statistics.median(cpu for _, cpu in times["ours"])
        for name, values in times.items():
            wall, cpu = (statistics.median(v[i] for v in values) for i in (0, 1))
            print(f"{name:>18} {1e3 * wall:>9.3f} {1e3 * cpu:>9.3f} {cpu / base:>11.2f}")


if __name__ == "__main__":
    main()
