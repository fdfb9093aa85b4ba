"""BENCH: what random orders (``order: rar``) and guidance-free training cost in a step of GPT-B.

    python -m tests.bench.recipe_steps [--rounds 5] [--threads 1] [--layers 3] [--micro 4]

Forward and backward of one micro-batch (fp32, dropout 0.1) are timed with one layer and with ``--layers``, in turns; a
block costs the difference over the layers between, GPT-B twelve of them and the rest. CPU-seconds; medians over the
rounds of each round's ratio. The optimizer's update is the same for all, and brings the ratios of steps nearer to 1.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from llamagen_dist.models.gpt import GPT
from llamagen_dist.models.sizes import GPT_SIZES
from tests.bench.gpt import config_of
from tests.live_bytes import sample

DEPTH = GPT_SIZES["GPT-B"]["n_layer"]
MODELS: dict[str, dict[str, Any]] = {
    "plain": {},
    "order: rar": {"order": "rar"},
    "guidance: free": {"guidance": "free"},
    "both": {"order": "rar", "guidance": "free"},
}


def pass_of(options: dict[str, Any], layers: int, micro: int) -> Callable[[], float]:
    """Forward and backward over ``micro`` images; returns the CPU-seconds it took."""
    model = GPT(replace(config_of(layers), **options)).initialize(0).train()
    nn.init.normal_(model.output.weight, std=0.02, generator=torch.Generator().manual_seed(0))
    batch = sample(model, micro)

    def run() -> float:
        for p in model.parameters():
            p.grad = None
        start = time.process_time()
        model.loss(*batch).backward()
        return time.process_time() - start

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--micro", type=int, default=4)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    depths = (1, options.layers)
    sides = {(name, layers): pass_of(own, layers, options.micro) for layers in depths for name, own in MODELS.items()}
    for run in sides.values():
        run()
    rounds: list[dict[str, float]] = []
    order = list(sides)
    for number in range(options.rounds):
        turn = order[number % len(order) :] + order[: number % len(order)]  # none is always the first
        took = {key: sides[key]() for key in turn}
        block = {name: (took[name, options.layers] - took[name, 1]) / (options.layers - 1) for name in MODELS}
        rounds.append({name: took[name, 1] + (DEPTH - 1) * block[name] for name in MODELS})
    print(f"GPT-B from 1 and {options.layers} layers, {options.micro} x 256 tokens, {options.threads} threads")
    print(f"forward and backward, CPU-seconds, medians of {options.rounds} rounds:")
    for name in MODELS:
        seconds = statistics.median(one[name] for one in rounds)
        ratio = statistics.median(one[name] / one["plain"] for one in rounds)
        print(f"  {name:15} {seconds:8.3f} s   / plain {ratio:.3f}")


if __name__ == "__main__":
    main()
