"""BENCH: what a step of GPT-B costs with each switch (QK-norm, z-loss, order, guidance, Muon), against one without.

    python -m tests.bench.switches [--pairs 5] [--threads 1] [--layers 3] [--micro 4] [--batches 32 64 256]

Forward and backward of one micro-batch (fp32, dropout 0.1) and the optimizers' updates (clipping included) are timed
with one layer and with ``--layers``, in turns; a block costs the difference over the layers between, GPT-B twelve of
them and the rest. A step of a batch is as many micro-batches as it has and one update: Muon's update takes the same
time whatever the batch, so its ratio depends on how many images a rank has in a step (LlamaGen's batch: 256).
CPU-seconds; medians over the rounds of each round's ratio. One process: ranks share Muon's matrices out among them.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import nn

from llamagen_dist.config import OptimSection
from llamagen_dist.models.gpt import GPT
from llamagen_dist.models.sizes import GPT_SIZES
from llamagen_dist.parallel import optim
from tests.bench.gpt import config_of
from tests.live_bytes import sample

DEPTH = GPT_SIZES["GPT-B"]["n_layer"]
MODELS: dict[str, dict[str, object]] = {
    "plain": {},
    "QK-norm": {"qk_norm": True},
    "z-loss": {"z_loss": 1e-4},
    "rar": {"order": "rar"},
    "free": {"guidance": "free"},
}


def pass_of(options: dict[str, object], layers: int, micro: int) -> Callable[[], None]:
    """Forward and backward over ``micro`` images."""
    model = GPT(replace(config_of(layers), **options)).initialize(0).train()  # type: ignore[arg-type]
    nn.init.normal_(model.output.weight, std=0.02, generator=torch.Generator().manual_seed(0))
    batch = sample(model, micro)

    def run() -> None:
        for p in model.parameters():
            p.grad = None
        model.loss(*batch).backward()

    return run


def update_of(kind: str, layers: int) -> Callable[[], None]:
    """Clipping and one update, of gradients whose numbers make no difference to the time."""
    model = GPT(config_of(layers)).initialize(0)
    optimizer = optim.build(model, OptimSection(kind=kind))  # type: ignore[arg-type]
    for p in model.parameters():
        p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(0))

    def run() -> None:
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

    return run


def seconds(run: Callable[[], None]) -> float:
    start = time.process_time()
    run()
    return time.process_time() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--micro", type=int, default=4)
    parser.add_argument("--batches", type=int, nargs="+", default=[32, 64, 256])
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    sides: dict[tuple[str, int], Callable[[], None]] = {}
    for layers in (1, options.layers):
        for name, own in MODELS.items():
            sides[name, layers] = pass_of(own, layers, options.micro)
        for kind in ("adamw", "muon"):
            sides[kind, layers] = update_of(kind, layers)
    for run in sides.values():
        run()
    rounds: list[dict[str, float]] = []
    order = list(sides)
    for number in range(options.pairs):
        turn = order[number % len(order) :] + order[: number % len(order)]
        took = {key: seconds(sides[key]) for key in turn}
        whole = {}
        for name, layers in order:
            if layers == 1:
                block = (took[name, options.layers] - took[name, 1]) / (options.layers - 1)
                whole[name] = took[name, 1] + (DEPTH - 1) * block
        rounds.append(whole)
    print(f"GPT-B from 1 and {options.layers} layers, {options.micro} x 256 tokens, {options.threads} threads")
    print(f"CPU-seconds, medians of {options.pairs} rounds:")
    for name in rounds[0]:
        print(f"  {name:8} {statistics.median(r[name] for r in rounds):8.3f} s")
    for name in list(MODELS)[1:]:
        print(f"{name} / plain, forward and backward: {statistics.median(r[name] / r['plain'] for r in rounds):.3f}")
    for batch in options.batches:
        passes = batch / options.micro
        ratio = [(passes * r["plain"] + r["muon"]) / (passes * r["plain"] + r["adamw"]) for r in rounds]
        print(f"Muon / AdamW, a step of {batch} images: {statistics.median(ratio):.3f}")


if __name__ == "__main__":
    main()
