"""BENCH: sampling with GPT-B (16 images x 256 tokens, guidance 4, top-k 2000) against its floor and LlamaGen's way.

    OMP_WAIT_POLICY=passive python -m tests.bench.sample [--every 8] [--threads 2] [--precisions fp32 bf16]

floor:     what a step cannot do without: the linear layers at 2 x 16 rows, one read of the keys and values that are
           filled, and the top-k.
ours:      a step of llamagen_dist.sampling.
compiled:  (--compiled) ours through compile: true; that attends to all slots under a mask.
llamagen:  a step as LlamaGen's released sampler takes it, written here from its description: attention over all 264
           slots under a mask that is gathered anew, keys and values copied for every use, unfused attention, and the
           probabilities of every step kept.

The three take a step in turns, so that a busy machine slows all of them; ratios are of the sums over all steps, of
CPU-seconds and of wall time. Before any ratio of LlamaGen's way its profile has to be what was measured of LlamaGen
itself (--reference: the share of its linear layers in a step of 16 rows in the middle of an image, one thread, fp32),
within 25 %; ``--reference 0`` leaves that out.
--memory: instead, the highest resident memory while whole batches are drawn, above what the process has without a
model, against weights and cache; batch after batch.
--every K: only each K-th step, over keys and values that are filled with noise up to there; 1 is the whole run.
"""

import argparse
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from llamagen_dist.models import ops
from llamagen_dist.models.gpt import GPT, Attention, Block, GPTConfig
from llamagen_dist.models.sizes import GPT_SIZES
from llamagen_dist.sampling.compiled import CompiledSteps
from llamagen_dist.sampling.draw import draw, noise_streams
from llamagen_dist.sampling.sampler import generate

SCALE, TOP_K = 4.0, 2000
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
TOLERANCE = 0.25


def gpt_b(dtype: torch.dtype) -> GPT:
    model = GPT(GPTConfig(**GPT_SIZES["GPT-B"])).initialize(0).eval()
    nn.init.normal_(model.output.weight, std=0.05, generator=torch.Generator().manual_seed(0))
    return model.to(dtype)


class Side(Protocol):
    def step(self, position: int) -> None: ...


class Floor:
    """The products of all linear layers, one read of the filled keys and values, and the top-k of one step."""

    def __init__(self, model: GPT, images: int) -> None:
        config, dtype = model.config, model.output.weight.dtype
        self.weights = [module.weight for module in model.modules() if isinstance(module, nn.Linear)]
        self.inputs = {w.shape[1]: torch.randn(2 * images, w.shape[1], dtype=dtype) for w in self.weights}
        slots = (2 * images, config.n_head, config.image_tokens, config.head_dim)
        # read as integers, which costs no conversion: the fastest that this memory can be read
        whole = torch.zeros(config.n_layer, 2, *slots, dtype=dtype)
        self.cache = whole.view(torch.int64).flatten(0, 3)
        self.logits = torch.randn(images, config.vocab_size)

    def linear(self) -> None:
        for weight in self.weights:
            F.linear(self.inputs[weight.shape[1]], weight)

    def step(self, position: int) -> None:
        self.linear()
        for slots in self.cache[:, :position].chunk(12):
            slots.sum()
        self.logits.topk(TOP_K)


class Ours:
    """The project's own step: decode, guidance, draw."""

    def __init__(self, model: GPT, images: int) -> None:
        self.model, self.streams = model, noise_streams(torch.arange(images))
        self.tokens = torch.zeros(images, dtype=torch.int64)
        labels = torch.cat([torch.arange(images), torch.full((images,), model.config.num_classes)])
        _, self.cache = model.prefill(labels)

    def logits(self, position: int) -> Tensor:
        for layer in self.cache.layers:
            layer.filled = position
        return self.model.decode(torch.cat([self.tokens, self.tokens]), self.cache)

    def step(self, position: int) -> None:
        conditional, null = self.logits(position).float().chunk(2)
        self.tokens = draw(null + SCALE * (conditional - null), self.streams, position, 1.0, TOP_K, 1.0)


class Compiled(Ours):
    """The same step through ``compile: true``."""

    def __init__(self, model: GPT, images: int) -> None:
        super().__init__(model, images)
        self.steps = CompiledSteps(model)
        labels = torch.cat([torch.arange(images), torch.full((images,), model.config.num_classes)])
        _, self.cache = self.steps.prefill(labels)

    def logits(self, position: int) -> Tensor:
        first = torch.full((len(self.tokens) * 2,), position - 1)
        return self.steps.decode_window(torch.cat([self.tokens, self.tokens])[:, None], first, 0, self.cache)[:, 0]


class LlamaGensWay:
    """One step as the released sampler takes it, on our weights."""

    def __init__(self, model: GPT, images: int) -> None:
        config, dtype = model.config, model.output.weight.dtype
        self.model, rows = model, 2 * images
        self.slots = -(-(1 + config.image_tokens) // 8) * 8
        shape = (rows, config.n_head, self.slots, config.head_dim)
        self.keys, self.values = ([torch.randn(shape).to(dtype) for _ in range(config.n_layer)] for _ in range(2))
        self.mask = torch.ones(self.slots, self.slots, dtype=torch.bool).tril().repeat(rows, 1, 1)
        self.tokens = torch.zeros(images, dtype=torch.int64)
        self.probabilities: list[Tensor] = []

    def attention(self, x: Tensor, layer: int, attention: Attention, at: Tensor, mask: Tensor) -> Tensor:
        fused = attention.wqkv(x)
        table = self.model.rotary[at]
        q, k, v = ops.split_and_rotate_formula(fused, table, attention.group, attention.head_dim)
        q, k, v = (part.transpose(1, 2) for part in (q, k, v))
        self.keys[layer][:, :, at] = k
        self.values[layer][:, :, at] = v
        k, v = (cache.repeat_interleave(attention.group, dim=1) for cache in (self.keys[layer], self.values[layer]))
        with sdpa_kernel(SDPBackend.MATH):
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return attention.wo(out.transpose(1, 2).flatten(2))

    def block(self, x: Tensor, layer: int, block: Block, at: Tensor, mask: Tensor) -> Tensor:
        def norm(x: Tensor, module: nn.Module) -> Tensor:
            return ops.rms_norm_formula(x, module.get_parameter("weight"), self.model.config.norm_eps)

        x = x + self.attention(norm(x, block.attention_norm), layer, block.attention, at, mask)
        feed = block.feed_forward
        inner = norm(x, block.ffn_norm)
        return x + feed.w2(F.silu(feed.w1(inner)) * feed.w3(inner))

    def step(self, position: int) -> None:
        at = torch.tensor([position])
        x = self.model.tok_embeddings(torch.cat([self.tokens, self.tokens])).unsqueeze(1)
        mask = self.mask[:, None, at]
        for layer, block in enumerate(self.model.layers):
            assert isinstance(block, Block)
            x = self.block(x, layer, block, at, mask)
        x = ops.rms_norm_formula(x, self.model.norm.weight, self.model.config.norm_eps)
        conditional, null = self.model.output(x).float()[:, -1].chunk(2)
        logits = null + SCALE * (conditional - null)
        least = logits.topk(TOP_K).values[:, -1:]
        probabilities = logits.masked_fill(logits < least, -torch.inf).softmax(-1)
        self.tokens = probabilities.multinomial(1)[:, 0]
        self.probabilities.append(probabilities.clone())


def timed(run: Callable[[], object]) -> Tensor:
    """(wall, CPU) seconds."""
    wall, cpu = time.perf_counter(), time.process_time()
    run()
    return torch.tensor([time.perf_counter() - wall, time.process_time() - cpu])


def linear_share(model: GPT) -> float:
    """Of LlamaGen's way: CPU time of its linear layers in a step of 16 rows in the middle of an image, one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    way, floor = LlamaGensWay(model, 8), Floor(model, 8)
    shares = []
    for _ in range(8):
        whole, linear = timed(partial(way.step, 128))[1], timed(floor.linear)[1]
        shares.append(linear / whole)
    torch.set_num_threads(threads)
    return float(torch.stack(shares[1:]).median())


def compare(precision: str, images: int, every: int, reference: float, compiled: bool) -> None:
    model = gpt_b(DTYPES[precision])
    reproduced = True
    if reference:
        share = linear_share(gpt_b(torch.float32))
        reproduced = abs(share / reference - 1) <= TOLERANCE
        print(f"LlamaGen's way, 16 rows, one thread: linear layers {share:.0%} of a step (LlamaGen {reference:.0%})")
    sides: dict[str, Side] = {
        "floor": Floor(model, images),
        "ours": Ours(model, images),
        "llamagen": LlamaGensWay(model, images),
    }
    if compiled:
        sides["compiled"] = Compiled(model, images)
    spent = {name: torch.zeros(2) for name in sides}
    positions = range(every, model.config.image_tokens, every)
    for side in sides.values():
        side.step(positions[0])
    order = list(sides)
    for number, position in enumerate(positions):
        turn = number % len(order)
        for name in order[turn:] + order[:turn]:
            spent[name] += timed(partial(sides[name].step, position))
    tokens = images * len(positions)
    print(f"{precision}: GPT-B, {images} images, {len(positions)} of {model.config.image_tokens - 1} steps")
    for name, (wall, cpu) in spent.items():
        print(f"  {name:9} {wall:8.2f} s wall {cpu:8.2f} CPU-s {tokens / wall:8.1f} tokens/s")
    rows = [("floor / ours", "floor"), *([("compiled / ours", "compiled")] if compiled else [])]
    if reproduced:
        rows.append(("llamagen / ours", "llamagen"))
    else:
        print("  NO RATIO to LlamaGen's way: its profile is not LlamaGen's within 25 % (another machine?)")
    for what, of in rows:
        wall, cpu = spent[of] / spent["ours"]
        print(f"  {what:16} {wall:6.2f} (wall) {cpu:6.2f} (CPU)")


def resident(key: str) -> float:
    """MB, of this process: VmRSS now, or VmHWM at its highest since the last reset."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))
    return int(line.split()[1]) / 1024


def memory(precision: str, images: int, batches: int) -> None:
    before = resident("VmRSS")
    model = gpt_b(DTYPES[precision])
    config = model.config
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    slots = 2 * images * config.n_layer * config.image_tokens * config.dim * 2
    least = (weights + slots * model.output.weight.element_size()) / 2**20
    print(f"{precision}: weights and cache of {images} images {least:.0f} MB")
    for number in range(batches):
        Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts again from what is resident now
        seeds = torch.arange(images) + number * images
        generate(model, seeds % config.num_classes, cfg_scale=SCALE, top_k=TOP_K, seeds=seeds)
        highest = resident("VmHWM") - before
        print(f"  batch {number}: highest {highest:.0f} MB, {highest / least - 1:+.1%}", flush=True)


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=16)
    parser.add_argument("--every", type=int, default=1, metavar="K", help="only each K-th step (default: 1)")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--precisions", nargs="+", default=["fp32", "bf16"], choices=list(DTYPES))
    parser.add_argument("--reference", type=float, default=0.41, metavar="SHARE")
    parser.add_argument("--compiled", action="store_true", help="beside them, the step of compile: true")
    parser.add_argument("--memory", type=int, default=0, metavar="BATCHES")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    for precision in options.precisions:
        if options.memory:
            memory(precision, options.images, options.memory)
            continue
        compare(precision, options.images, options.every, options.reference, options.compiled)


if __name__ == "__main__":
    main()
