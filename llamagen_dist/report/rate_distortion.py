"""What a tokenizer with prefix tokens keeps of an image at how many bits."""

import math

import numpy as np

from llamagen_dist.report.blocks import Figure, Panel, Series
from llamagen_dist.report.collect import Run

PREFIX = "psnr_at_"  # of the keys in metrics.jsonl


def curve(run: Run) -> tuple[list[int], list[float], list[float]] | None:
    """(tokens, bits per image, held-out PSNR in dB) of the last validation, fewest tokens first.

    None for a tokenizer whose tokens are a grid, and before a validation that measured several lengths.
    """
    model = run.config.model if run.config is not None and run.kind == "tokenizer" else None
    if model is None or model.token_count is None:
        return None
    measured = next((line for line in reversed(run.validation) if any(key.startswith(PREFIX) for key in line)), None)
    if measured is None:
        return None
    psnr = {int(key.removeprefix(PREFIX)): value for key, value in measured.items() if key.startswith(PREFIX)}
    psnr[model.token_count] = measured["psnr"]
    tokens = sorted(count for count, value in psnr.items() if math.isfinite(value))
    bits = math.log2(model.codebook_size)
    return tokens, [count * bits for count in tokens], [psnr[count] for count in tokens]


def figure(run: Run) -> Figure | None:
    """The rate-distortion curve; None where there is none."""
    if (found := curve(run)) is None or len(found[0]) < 2:
        return None
    tokens, bits, psnr = found
    line = Series("held out", np.array(bits), np.array(psnr), "dotted line", "orange")
    counts = ", ".join(map(str, tokens))
    caption = f"Each dot decodes only the first tokens of every held-out image: {counts}."
    alt = f"Held-out PSNR against bits per image, from {tokens[0]} to {tokens[-1]} tokens"
    return Figure((Panel("held-out PSNR (dB)", (line,)),), alt, "bits per image", log_x=True, caption=caption)
