"""PROGRAM: what a tracker costs a training step.

    OMP_NUM_THREADS=1 python -m tests.bench.sinks [--steps 400] [--repeats 5] [--every 10 1]

Steps of about 10 ms of matrix products, each logged as fit logs it, with W&B offline, with W&B online and a dead
network, and with no tracker; interleaved, the median step of each. The ratios to no tracker are what to look at.
"""

import argparse
import os
import statistics
import tempfile
import time
from pathlib import Path

import torch

from llamagen_dist.config.training import TrackingSection, WandbSection
from llamagen_dist.parallel.topology import Topology
from llamagen_dist.training.run import Run
from tests.unit.tracked_run import tracked_run

STEP_S, BLOCK = 0.01, 10  # steps are timed in tens, so that each time holds its share of lines
TRACKERS = {"none": None, "W&B offline": "offline", "W&B online, dead network": "online"}


def work() -> int:
    """How many products of 256 x 256 matrices take a step's time here."""
    a = torch.randn(256, 256)
    took = []
    for _ in range(200):
        began = time.perf_counter()
        a @ a
        took.append(time.perf_counter() - began)
    return max(1, round(STEP_S / statistics.median(took)))


def steps(folder: Path, mode: str | None, count: int, every: int, products: int) -> tuple[float, float]:
    """(median seconds of a step, seconds that the run's end took) of one run."""
    settings = [] if mode is None else ["tracking.wandb.project=bench", f"tracking.wandb.mode={mode}"]
    run = Run(tracked_run(folder, *settings), Topology(), "")
    tracking = TrackingSection() if mode is None else TrackingSection(wandb=WandbSection(project="b"), finish_s=10)
    run.track(tracking)
    time.sleep(6.0)  # the follower's imports come once a run, beside its start
    a, took = torch.randn(256, 256), []
    for first in range(1, count + 1, BLOCK):
        began = time.perf_counter()
        for step in range(first, first + BLOCK):
            for _ in range(products):
                a @ a
            if step % every == 0:
                line = {f"metric_{n}": n * 0.1 for n in range(15)}
                run.metrics(step=step, images_seen=64 * step, loss=5.0, samples="0123456789abcdef", **line)
        took.append((time.perf_counter() - began) / BLOCK)
    began = time.perf_counter()
    if run._followers is not None:
        run._followers.close(finished=True)
    return statistics.median(took), time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--every", type=int, nargs="+", default=[10, 1])
    args = parser.parse_args()
    torch.set_num_threads(1)
    os.environ |= {"WANDB_API_KEY": "0" * 40, "WANDB_BASE_URL": "http://127.0.0.1:9"}
    products = work()
    with tempfile.TemporaryDirectory() as scratch:
        for every in args.every:
            found: dict[str, list[tuple[float, float]]] = {name: [] for name in TRACKERS}
            for repeat in range(args.repeats):
                for name, mode in TRACKERS.items():
                    folder = Path(scratch) / f"{every}-{repeat}-{mode}"
                    found[name].append(steps(folder, mode, args.steps, every, products))
            none = statistics.median(step for step, _ in found["none"])
            for name, all_of_it in found.items():
                step, end = (statistics.median(values) for values in zip(*all_of_it, strict=True))
                spread = [100 * (one / none - 1) for one, _ in all_of_it]
                print(
                    f"a line every {every} steps, {name}: step {1000 * step:.3f} ms ({100 * (step / none - 1):+.2f} %, "
                    f"runs {min(spread):+.2f} to {max(spread):+.2f} %), the end took {end:.2f} s"
                )


if __name__ == "__main__":
    main()
