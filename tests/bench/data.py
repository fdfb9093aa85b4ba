"""PROGRAM: how fast tokens are read, how large the shards are, and that neither grows with the data set.

    OMP_NUM_THREADS=1 python -m tests.bench.data [--samples 5120] [--repeats 5] [--images 64058] [--scratch DIR]

All in one run, on one machine, interleaved where times are compared (medians; page cache warm):
readers   batches of 256 random crops (256 tokens, 20 crops per sample), by our stream, from one .npy file per sample
          and label through a shuffling DataLoader (LlamaGen's way), and from our own shards through plain webdataset
          with its shuffle buffer. With worker processes too, as these are usually run.
a billion shards that claim 10^9 samples (files with holes; only what is read exists): from nothing to the first batch
          at sample 10^8, and the memory of a reader of them beside one of a thousandth of them.
ImageNet  a twentieth of its training set really written with ten crops: bytes on disk, and opening it.
Exits with 1 where a wanted figure is missed.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import webdataset
from torch.utils.data import DataLoader

from llamagen_dist.data.order import Order
from llamagen_dist.data.shards import open_shards
from llamagen_dist.data.tokens import TokenStream
from llamagen_dist.parallel.topology import Topology
from tests.bench import token_sets

BATCH, SIDE, CLASSES, VOCABULARY = 256, 16, 1000, 16384
IMAGENET = 1_281_167
Missed = list[str]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=5120, help="of the set that the readers read")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--images", type=int, default=IMAGENET // 20, help="of the written part of ImageNet")
    parser.add_argument("--scratch", type=Path, help="a folder on a file system that knows holes (default: temporary)")
    parser.add_argument("--reader", nargs=2, metavar=("SHARDS", "START"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.reader:
        print(json.dumps(fresh_reader(Path(args.reader[0]), int(args.reader[1]))))
        return
    missed: Missed = []
    with tempfile.TemporaryDirectory(dir=args.scratch) as scratch:
        readers(Path(scratch), args.samples, args.repeats, missed)
        a_billion(Path(scratch), missed)
        imagenet(Path(scratch), args.images, missed)
    print("\nmissed: " + "; ".join(missed) if missed else "\nall wanted figures reached")
    sys.exit(bool(missed))


def wanted(text: str, reached: bool, missed: Missed) -> None:
    print(f"  {text}: {'reached' if reached else 'MISSED'}", flush=True)
    if not reached:
        missed.append(text)


def readers(scratch: Path, count: int, repeats: int, missed: Missed) -> None:
    ours = token_sets.write_ours(scratch / "ours", count, 20, SIDE, CLASSES, VOCABULARY, per_shard=count // 8)
    files = token_sets.write_files(scratch / "files", count, 20, SIDE, CLASSES, VOCABULARY)
    stream, position = TokenStream(open_shards(ours), Topology(), BATCH, 0, 0.1), [0]

    def read_ours() -> Any:
        position[0] += BATCH
        return stream.batch(position[0] - BATCH)

    found: dict[str, Callable[[], Any]] = {"ours": read_ours}
    for workers in (0, 2):
        loader = DataLoader(token_sets.Files(files, count), BATCH, True, num_workers=workers, drop_last=True)
        found[f"files, {workers} workers"] = endless(loader).__next__
        pipe = webdataset.WebDataset(sorted(map(str, ours.glob("*.tar"))), shardshuffle=8).shuffle(1000).decode()
        tars = DataLoader(pipe.map(random_crop).batched(BATCH, partial=False), None, num_workers=workers)
        found[f"webdataset, {workers} workers"] = endless(tars).__next__
    batches = max(count // BATCH, 4)
    rates: dict[str, list[float]] = {name: [] for name in found}
    for turn in range(repeats + 1):
        for name, read in found.items():
            began = time.perf_counter()
            for _ in range(batches):
                read()
            if turn:  # the first fills the page cache and the shuffle buffers, and starts workers
                rates[name].append(batches * BATCH / (time.perf_counter() - began))
    medians = {name: statistics.median(values) for name, values in rates.items()}
    print(f"readers: {count:,} samples of 20 crops of 256 tokens, batches of {BATCH} (medians of {repeats})")
    for name, rate in medians.items():
        low, high = min(rates[name]), max(rates[name])
        print(f"  {name:>22} {rate:>10,.0f} samples/s ({low:,.0f} to {high:,.0f}), ours {medians['ours'] / rate:.1f} x")
    for name, factor in (("files", 10), ("webdataset", 5)):
        best = max(rate for other, rate in medians.items() if other.startswith(name))
        wanted(f"at least {factor} x the faster of {name}", medians["ours"] >= factor * best, missed)


def endless(loader: "DataLoader[Any]") -> Iterator[Any]:
    while True:
        yield from loader


def random_crop(sample: dict[str, Any]) -> tuple[torch.Tensor, int]:
    codes = sample["codes.npy"]
    return torch.from_numpy(codes[int(torch.randint(len(codes), ()))].astype(np.int64)), sample["cls"]


def fresh_reader(folder: Path, start: int) -> dict[str, float]:
    """In a process of its own: seconds from nothing to the first batch at ``start``; MiB that reading then takes."""
    torch.zeros(1).argsort()  # what torch sets up at its first operation is not the reader's
    before = resident()
    began = time.perf_counter()
    shards = open_shards(folder)
    opened = time.perf_counter()
    stream = TokenStream(shards, Topology(), BATCH, 0, 0.1)
    stream.batch(start)
    first = time.perf_counter()
    for step in range(1, STEPS):
        stream.batch(start + step * BATCH)
    return {"open": opened - began, "first": first - began, "memory": resident() - before}


STEPS = 12


def resident() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096 / 2**20


def measured(folder: Path, start: int, repeats: int = 5) -> dict[str, float]:
    """Medians over fresh processes."""
    command = [sys.executable, "-m", "tests.bench.data", "--reader", str(folder), str(start)]
    runs = [json.loads(subprocess.run(command, check=True, capture_output=True).stdout) for _ in range(repeats)]
    return {name: statistics.median(run[name] for run in runs) for name in runs[0]}


def a_billion(scratch: Path, missed: Missed) -> None:
    found = {}
    print("a billion: shards of 10^6 samples (20 crops of 256 tokens), a batch at 10^8 in a fresh process")
    for shards in (1, 30, 1000):
        count, start = shards * 10**6, 10**8
        folder = token_sets.write_sparse(scratch / f"sparse{shards}", shards, 10**6, 20, SIDE, CLASSES, VOCABULARY)
        token_sets.fill(open_shards(folder), Order(count, 0).samples(start, STEPS * BATCH).numpy())
        found[shards] = one = measured(folder, start)
        print(
            f"  {count:>13,} samples: opened in {1e3 * one['open']:.1f} ms, first batch after {1e3 * one['first']:.1f} "
            f"ms, {one['memory']:.1f} MiB more than before"
        )
    wanted("sample 10^8 of 10^9 in less than 50 ms", found[1000]["first"] < 0.05, missed)
    apart = found[1000]["memory"] - found[1]["memory"]
    wanted("memory of a reader of 10^9 samples within 8 MiB of one of 10^6", apart < 8, missed)


def imagenet(scratch: Path, images: int, missed: Missed) -> None:
    began = time.perf_counter()
    folder = token_sets.write_ours(scratch / "imagenet", images, 10, SIDE, CLASSES, VOCABULARY)
    took = time.perf_counter() - began
    payload = 2 * 10 * SIDE**2
    record = token_sets.record_bytes(10, SIDE**2, CLASSES)
    on_disk = sum(path.stat().st_size for path in folder.iterdir())
    formula = images * record
    print(
        f"ImageNet: {images:,} images with 10 crops of 256 tokens, written in {took:.1f} s\n"
        f"  {on_disk:,} bytes on disk: {images * payload:,} of codes in uint16, and {record - payload:,} per sample of "
        "tar (headers of 512 for the label and the codes, the label's block of 512, the .npy header of 128, filling)\n"
        f"  by this formula the whole of ImageNet takes {IMAGENET * record / 1e9:.2f} GB in "
        f"{-(-IMAGENET // 10_000) + 1} files; LlamaGen's files: 26.6 GB in {2 * IMAGENET:,}"
    )
    wanted("bytes on disk within 5 % of codes + tar", abs(on_disk / formula - 1) < 0.05, missed)
    small = token_sets.write_ours(scratch / "small", 100, 10, SIDE, CLASSES, VOCABULARY)
    large, tiny = measured(folder, 0), measured(small, 0)
    print(f"  opened in {1e3 * large['open']:.1f} ms; one of 100 images in {1e3 * tiny['open']:.1f} ms")
    wanted("opened in less than 50 ms, at any size", large["open"] < 0.05 > tiny["open"], missed)


if __name__ == "__main__":
    main()
