"""PROGRAM: what a tracker costs a training step.

    OMP_NUM_THREADS=1 python -m tests.bench.sinks [--steps 400] [--repeats 5] [--every 10 1]

Steps of about 10 ms of matrix products, logged as fit logs them, with W&B offline, with W&B online and a dead network,
and with no tracker; interleaved, the median of each: a step, and the writing of its line, which is all that a tracker
can lengthen but for its use of other cores. On a machine that others use, only the line's figure means something.
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
        began = time.process_time()
        a @ a
        took.append(time.process_time() - began)
    return max(1, round(STEP_S / statistics.median(took)))


def steps(folder: Path, mode: str | None, count: int, every: int, products: int) -> tuple[float, float, float]:
    """Of one run: seconds of a step and of a line (medians), and of the run's end."""
    settings = [] if mode is None else ["tracking.wandb.project=bench", f"tracking.wandb.mode={mode}"]
    run = Run(tracked_run(folder, *settings), Topology(), "")
    tracking = TrackingSection() if mode is None else TrackingSection(wandb=WandbSection(project="b"), finish_s=3)
    run.track(tracking)
    time.sleep(6.0)  # the follower's imports come once a run, beside its start
    a = torch.randn(256, 256)
    took, lines = [], []
    for first in range(1, count + 1, BLOCK):
        began = time.perf_counter()
        for step in range(first, first + BLOCK):
            for _ in range(products):
                a @ a
            if step % every == 0:
                line = {f"metric_{n}": n * 0.1 for n in range(15)}
                began_line = time.perf_counter()
                run.metrics(step=step, images_seen=64 * step, loss=5.0, samples="0123456789abcdef", **line)
                lines.append(time.perf_counter() - began_line)
        took.append((time.perf_counter() - began) / BLOCK)
    began = time.perf_counter()
    if run._followers is not None:
        run._followers.close(finished=True)
    return statistics.median(took), statistics.median(lines), time.perf_counter() - began


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
            found: dict[str, list[tuple[float, float, float]]] = {name: [] for name in TRACKERS}
            for repeat in range(args.repeats):
                for name, mode in TRACKERS.items():
                    folder = Path(scratch) / f"{every}-{repeat}-{mode}"
                    found[name].append(steps(folder, mode, args.steps, every, products))
            none, none_line, _ = (statistics.median(values) for values in zip(*found["none"], strict=True))
            for name, runs in found.items():
                step, line, end = (statistics.median(values) for values in zip(*runs, strict=True))
                print(
                    f"every {every} steps, {name}: {1000 * step:.3f} ms a step ({100 * (step / none - 1):+.2f} %), "
                    f"{1e6 * line:.1f} us a line ({100 * (line - none_line) / every / STEP_S:+.3f} % of 10 ms); "
                    f"the end took {end:.2f} s",
                    flush=True,
                )


if __name__ == "__main__":
    main()
