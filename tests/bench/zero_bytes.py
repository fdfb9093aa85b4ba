"""Bytes per rank of ZeRO 0-3 on 1 to 4 ranks: really allocated (gloo), and by planning/memory.py's formula.

    python -m tests.bench.zero_bytes [--precision bf16] [--dim 256]

"stays": weights, fp32 masters, moments and average between two steps. "fullest": with gradients and communication
buffers in a backward pass, activations not counted, on the rank where it was least: buffers that only pass (the
upper figure of the formula) are seen on some ranks and not on others, as their timing goes.
"""

import argparse
from functools import partial

from llamagen_dist.models.cost import total_parameters
from llamagen_dist.planning import memory
from tests.ranks.forked import run_ranks
from tests.ranks.held_bytes import memory_layout, model_of, train_and_count
from tests.ranks.layouts import Layout, config

SHAPE = ("model.n_layer=3", "model.multiple_of=32")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--dim", type=int, default=256, help="width of the three-layer model (default: %(default)s)")
    args = parser.parse_args()
    settings = (f"model.dim={args.dim}", *SHAPE, f"compute.precision={args.precision}")
    count = total_parameters(model_of(config(Layout(zero=1), *settings)))
    print(f"{count:,} parameters, {args.precision}, bytes per parameter and rank")
    heads = (("ZeRO", 4), ("ranks", 6), ("stays", 8), ("formula", 8), ("ratio", 7), ("fullest", 8), ("formula", 15))
    print(*(f"{word:>{width}}" for word, width in (*heads, ("of 1 rank", 10))))
    for zero in range(4):
        if zero == 0 and args.precision == "bf16":
            continue
        alone = 0.0
        for ranks in (1, 2, 3, 4):
            layout = Layout(ranks, 1, zero)
            found = run_ranks(partial(train_and_count, micro=1), ranks, layout, *settings, timeout_s=600)
            split = memory_layout(config(layout, *settings), layout)
            model = model_of(config(layout, *settings))
            parts, buckets = memory.state(model, split), memory.buckets(model, split)
            stays = sum(size for name, size in parts.items() if name != "gradients")
            low = sum(parts.values()) + buckets["lasting"]
            held, full = max(r["held"] for r in found) / count, min(r["fullest"] for r in found) / count
            alone = full if ranks == 1 else alone
            bounds = f"{low / count:.2f} to {(low + buckets['passing']) / count:.2f}"
            print(
                f"{zero:>4} {ranks:>6} {held:>8.2f} {stays / count:>8.2f} {held * count / stays:>7.3f} {full:>8.2f} "
                f"{bounds:>15} {full / alone:>10.0%}",
                flush=True,
            )


if __name__ == "__main__":
    main()
