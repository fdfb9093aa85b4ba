"""PROGRAM: forward + backward of every quantizer against a full distance matrix under autograd.

    OMP_NUM_THREADS=1 python -m tests.bench.quantizer [--images 8] [--codes 16384] [--repeats 5]

The full matrix is the usual way: the distances of N latents to K codes as one differentiable expression, argmin, the
two losses, straight through. LlamaGen's way also takes the entropy loss of it, whatever its weight. ibq's own full
matrix is the one-hot over all codes. Of each quantizer: the median CPU time of the process (on a busy machine the clock
says little), the ratios, and its matrix products' share of this machine's fp32 matmul rate, measured alike. A product
with 8 columns is bound by memory, not by multiplications: the matrix is written and read once. The ways take turns.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from llamagen_dist.models.quantizer import VectorQuantizer
from llamagen_dist.models.quantizers import make_quantizer
from llamagen_dist.models.sizes import VQConfig

SIDE = 16  # tokens along a side of a 256 px image in VQ-16


def full_matrix(latents: Tensor, weight: Tensor, entropy: bool) -> Tensor:
    """The loss, with all distances in the graph."""
    z = F.normalize(latents.permute(0, 2, 3, 1), dim=-1)
    flat, codes = z.reshape(-1, z.shape[-1]), F.normalize(weight, dim=-1)
    distance = flat.square().sum(1, keepdim=True) + codes.square().sum(1) - 2 * flat @ codes.t()
    quantised = codes[distance.argmin(1)].view_as(z)
    loss = F.mse_loss(quantised, z.detach()) + 0.25 * F.mse_loss(z, quantised.detach())
    if entropy:
        log_p = F.log_softmax(-distance / 0.01, dim=-1)
        p = log_p.exp()
        mean = p.mean(0)
        loss = loss + 0.0 * ((mean * (mean + 1e-5).log()).sum() - (p * log_p).sum(-1).mean())
    return loss + (z + (quantised - z).detach()).sum()


def full_one_hot(latents: Tensor, weight: Tensor) -> Tensor:
    """IBQ's loss with the straight-through one-hot over all codes in the graph."""
    flat = F.normalize(latents.permute(0, 2, 3, 1), dim=-1).reshape(-1, latents.shape[1])
    codes = F.normalize(weight, dim=-1)
    soft = (flat @ codes.t()).softmax(-1)
    hard = torch.zeros_like(soft).scatter_(1, soft.argmax(-1, keepdim=True), 1.0)
    quantised, chosen = (hard + soft - soft.detach()) @ codes, hard @ codes
    vq = F.mse_loss(quantised, flat) + 0.25 * F.mse_loss(chosen, flat.detach())
    return quantised.sum() + vq + F.mse_loss(chosen.detach(), flat)


def seconds(work: Callable[[], object]) -> float:
    begun = time.process_time()
    work()
    return time.process_time() - begun


def matmul_rate() -> float:
    """FLOP per CPU second of a large square fp32 product: the best of five."""
    a, b = torch.randn(2048, 2048), torch.randn(2048, 2048)
    return 2 * 2048**3 / min(seconds(lambda: a @ b) for _ in range(5))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=8)
    parser.add_argument("--codes", type=int, default=16384, help="a power of two")
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    torch.manual_seed(0)
    bits = args.codes.bit_length() - 1
    levels = (4,) * (bits // 2) + (2,) * (bits % 2)
    configs = {
        "vq": {},
        "ema": {"quantizer": "ema"},
        "ibq": {"quantizer": "ibq"},
        "fsq": {"quantizer": "fsq", "levels": levels},
        "ifsq": {"quantizer": "ifsq", "levels": levels},
        "lfq": {"quantizer": "lfq"},
    }
    quantizers = {
        name: make_quantizer(VQConfig(codebook_size=args.codes, **options))  # type: ignore[arg-type]
        for name, options in configs.items()
    }
    rows = args.images * SIDE * SIDE
    latents = {
        name: torch.randn(args.images, quantizer.codebook_dim, SIDE, SIDE, requires_grad=True)
        for name, quantizer in quantizers.items()
    }
    table = quantizers["vq"]
    assert isinstance(table, VectorQuantizer)
    weight = table.embedding.weight

    def step(name: str) -> None:
        quantised, losses, _ = quantizers[name](latents[name])
        loss = quantised.sum() + sum(value for value in losses if value is not None)
        loss.backward()

    ways: dict[str, Callable[[], object]] = {
        "full matrix": lambda: full_matrix(latents["vq"], weight, False).backward(),
        "full one-hot": lambda: full_one_hot(latents["ibq"], weight).backward(),
        "LlamaGen": lambda: full_matrix(latents["vq"], weight, True).backward(),
        **{name: (lambda name=name: step(name)) for name in quantizers},
    }
    times: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(args.repeats + 1):
        for name, work in ways.items():
            took = seconds(work)
            if turn:  # the first warms up
                times[name].append(took)
    median = {name: statistics.median(values) for name, values in times.items()}
    peak = matmul_rate()
    # of N x K x C products: vq and ema search, ibq's backward pass has four more
    products = {"vq": 1, "ema": 1, "ibq": 5, "full matrix": 3, "LlamaGen": 3}
    threads = torch.get_num_threads()
    print(f"{rows:,} latents, {args.codes:,} codes, fp32, {threads} threads; matmul {peak / 1e9:.0f} GFLOP/s")
    for name, took in median.items():
        flops = products.get(name, 0) * 2 * rows * args.codes * 8
        share = f", {flops / took / peak:.1%} of the matmul rate" if flops else ""
        ratios = f"{median['full matrix'] / took:7.2f} x, {median['LlamaGen'] / took:7.2f} x"
        print(f"{name:12} {took * 1e3:9.2f} CPU ms   full matrix / it, LlamaGen's way / it: {ratios}{share}")
    print(f"full one-hot / ibq: {median['full one-hot'] / median['ibq']:.2f} x")


if __name__ == "__main__":
    main()
