"""BENCH: what int8 weights cost in quality and win in memory and time, beside bf16 as the yardstick.

    python -m tests.bench.int8 [CHECKPOINT TOKENIZER] [--images 8] [--cfg 2] [--top-k 0] [--tokens 64] [--threads 1]

Without a checkpoint: GPT-B with random weights, the channels of which differ in size (log-normal, --spread), and with
--outliers of a million weights 20 times as large, as trained transformers have them; of its images the first --tokens
tokens. The images are drawn in fp32; then every way computes the logits of these same tokens.

KL: of fp32's distribution from this way's, guided, in nats per token: mean and 99.9 % quantile.
changed: of the draws with the same noise behind the same tokens, how many give another code.
weights: MB. ms: CPU time of one decoding step in the middle of an image, of 2 x images rows and of 2 (one image).
"""

import argparse
import copy
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llamagen_dist.models.gpt import GPT
from llamagen_dist.sampling.draw import draw, noise_streams
from llamagen_dist.sampling.int8 import Int8Linear, quantize
from llamagen_dist.sampling.load import load_gpt, load_tokenizer, open_checkpoint
from llamagen_dist.sampling.sampler import generate
from tests.bench.sample import gpt_b

WAYS: dict[str, Callable[[GPT], GPT]] = {
    "fp32": lambda model: model,
    "bf16": lambda model: model.bfloat16(),
    "int8": quantize,
    "int8, bf16": lambda model: quantize(model).bfloat16(),
}


def weight_bytes(model: nn.Module) -> int:
    """Of all parameters and buffers."""
    return sum(x.numel() * x.element_size() for x in (*model.parameters(), *model.buffers()))


def uneven(model: GPT, spread: float, outliers: float) -> GPT:
    """Weights as training leaves them rather than as they begin: channels of different size, and outliers."""
    generator = torch.Generator().manual_seed(1)
    for module in model.modules():
        if isinstance(module, nn.Linear):
            weight = module.weight.data
            weight *= torch.exp(spread * torch.randn(len(weight), 1, generator=generator))
            weight[torch.rand(weight.shape, generator=generator) < outliers * 1e-6] *= 20
    return model


def guided(model: GPT, tokens: Tensor, labels: Tensor, cfg: float) -> Tensor:
    """(B, N, V) fp32."""
    conditional = model(tokens, labels).float()
    null = model(tokens, torch.full_like(labels, model.config.num_classes)).float()
    return null + cfg * (conditional - null)


def draws(logits: Tensor, seeds: Tensor, top_k: int) -> Tensor:
    streams = noise_streams(seeds)
    return torch.stack([draw(logits[:, n], streams, n, 1.0, top_k, 1.0) for n in range(logits.shape[1])], dim=1)


def step_ms(model: GPT, rows: int, repeats: int = 5) -> float:
    """CPU milliseconds, the least of some."""
    _, cache = model.prefill(torch.arange(rows) % model.config.num_classes)
    tokens, spent = torch.zeros(rows, dtype=torch.int64), []
    for _ in range(repeats):
        model.decode(tokens, cache)
        for layer in cache.layers:
            layer.filled = model.config.image_tokens // 2
        start = time.process_time()
        model.decode(tokens, cache)
        spent.append(time.process_time() - start)
        for layer in cache.layers:
            layer.filled = model.config.image_tokens // 2
    return 1000 * min(spent)


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("paths", nargs="*", type=Path, metavar="CHECKPOINT TOKENIZER")
    parser.add_argument("--images", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=64, help="of GPT-B; a square")
    parser.add_argument("--cfg", type=float, default=2.0)
    parser.add_argument("--top-k", type=int, default=0)
    parser.add_argument("--spread", type=float, default=0.5)
    parser.add_argument("--outliers", type=float, default=100.0, help="in a million")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.paths:
        checkpoint, tokenizer = options.paths
        model = load_gpt(open_checkpoint(checkpoint, "checkpoint"), load_tokenizer(tokenizer)).model
    else:
        model = uneven(gpt_b(torch.float32), options.spread, options.outliers)
        model.config = replace(model.config, image_tokens=options.tokens)  # the rotary table stays that of 16 x 16
    seeds = torch.arange(options.images)
    labels = seeds % model.config.num_classes
    tokens = generate(model, labels, seeds=seeds, cfg_scale=options.cfg, top_k=options.top_k)
    exact = guided(model, tokens, labels, options.cfg)
    expected, log = draws(exact, seeds, options.top_k), exact.log_softmax(-1)
    print(f"{tokens.numel()} tokens, entropy {float(-(log.exp() * log).sum(-1).mean()):.2f} nats per token")
    print("way        weights      KL   99.9 %  changed     ms  ms of one")
    for name, way in WAYS.items():
        other = way(copy.deepcopy(model))
        logits = guided(other, tokens, labels, options.cfg)
        kl = F.kl_div(logits.log_softmax(-1), log, log_target=True, reduction="none").sum(-1).flatten()
        changed = float((draws(logits, seeds, options.top_k) != expected).double().mean())
        ms, single = step_ms(other, 2 * options.images), step_ms(other, 2)
        size = weight_bytes(other) / 1e6
        apart = f"{float(kl.mean()):.1e} {float(kl.quantile(0.999)):.1e} {changed:8.3%}"
        print(f"{name:10} {size:7.1f} {apart} {ms:6.1f} {single:10.1f}")
    layer = next(module for module in other.modules() if isinstance(module, Int8Linear))
    print(f"one scale for each of {len(layer.scale)} output channels; embeddings, norms and the cache are not rounded")


if __name__ == "__main__":
    main()
