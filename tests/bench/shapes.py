"""BENCH: the same images drawn in batches of other shapes and in windows: what each costs, and how many stay the same.

    python -m tests.bench.shapes [CHECKPOINT TOKENIZER] [--images 32] [--batches 32 8 1] [--windows 1 4 8] [--cfg 2]

Without a checkpoint: GPT-B with random weights and a random head, of which the first --tokens tokens are drawn.
passes: forward passes per token drawn one after the other. CPU-s: of all images. faster: CPU-s of the plain loop
(window 1) at this batch over these. alike: images with the tokens of the first batch shape's plain loop. flips: of a
million draws behind equal tokens, how many gave another code: rounding, as the shape of a matrix product changes.
"""

import argparse
import time
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from llamagen_dist.models.gpt import GPT
from llamagen_dist.sampling import sampler
from llamagen_dist.sampling.load import load_gpt, load_tokenizer, open_checkpoint
from tests.bench.sample import gpt_b


class Counted:
    """A GPT's forward passes, counted where the sampler asks for them."""

    def __init__(self, model: GPT) -> None:
        self.model, self.passes = model, 0
        for name in ("prefill", "decode", "decode_window"):
            setattr(model, name, self._counting(getattr(model, name)))

    def _counting(self, method):  # type: ignore[no-untyped-def]
        def counted(*given, **options):  # type: ignore[no-untyped-def]
            self.passes += 1
            return method(*given, **options)

        return counted

    def draw(self, images: int, batch: int, window: int, cfg: float, top_k: int) -> tuple[Tensor, float, float]:
        """Tokens, CPU-seconds, passes per batch."""
        self.passes, start = 0, time.process_time()
        drawn = [
            sampler.generate(
                self.model,
                numbers % self.model.config.num_classes,
                seeds=numbers,
                cfg_scale=cfg,
                top_k=top_k,
                window=window,
            )
            for numbers in torch.arange(images).split(batch)
        ]
        return torch.cat(drawn), time.process_time() - start, self.passes / len(drawn)


def flips(tokens: Tensor, expected: Tensor) -> tuple[float, float]:
    """Share of equal images, and flips per million draws that followed equal tokens."""
    same = (tokens == expected).long().cumprod(dim=1)
    wrong = int((same[:, -1] == 0).sum())
    return 1 - wrong / len(tokens), 1e6 * wrong / (int(same.sum()) + wrong)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("paths", nargs="*", type=Path, metavar="CHECKPOINT TOKENIZER")
    parser.add_argument("--images", type=int, default=32)
    parser.add_argument("--batches", type=int, nargs="+", default=[32, 8, 1])
    parser.add_argument("--windows", type=int, nargs="+", default=[1, 4, 8])
    parser.add_argument("--tokens", type=int, default=64, help="of GPT-B; a square")
    parser.add_argument("--cfg", type=float, default=2.0)
    parser.add_argument("--top-k", type=int, default=0)
    parser.add_argument("--precision", default="fp32", choices=["fp32", "bf16"])
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    dtype = torch.bfloat16 if options.precision == "bf16" else torch.float32
    if options.paths:
        checkpoint, tokenizer = options.paths
        model = load_gpt(open_checkpoint(checkpoint, "checkpoint"), load_tokenizer(tokenizer)).model.to(dtype)
    else:
        model = gpt_b(dtype)
        model.config = replace(model.config, image_tokens=options.tokens)  # the rotary table stays that of 16 x 16
    counted = Counted(model)
    counted.draw(2, 2, 1, options.cfg, options.top_k)
    expected = None
    print("batch window passes   CPU-s faster  alike  flips")
    for batch in options.batches:
        plain = 0.0
        for window in options.windows:
            tokens, seconds, passes = counted.draw(options.images, batch, window, options.cfg, options.top_k)
            plain = seconds if window == 1 else plain
            expected = tokens if expected is None else expected
            alike, rate = flips(tokens, expected)
            print(
                f"{batch:5} {window:6} {passes / tokens.shape[1]:6.2f} {seconds:7.2f} {plain / seconds:6.2f} "
                f"{alike:6.1%} {rate:6.0f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
