"""A made-up quickstart folder with known numbers, as a real one would leave it, tensors and images apart."""

import json
import math
from pathlib import Path

from llamagen_dist.config import dump, load

SIZES = {"g30k": 30_128, "g130k": 131_072, "g560k": 560_640}
TOKENS, BATCH, STEPS = 49, 64, 120
BUDGETS = (40, 80, 120)  # steps with a validation line


def lines_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def write_lines(path: Path, lines: list[dict]) -> None:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def train_loss(name: str, step: int, shift: float = 0.0) -> float:
    """A learning curve with wiggles that are the same in every layout."""
    level = 1.9 - 0.16 * math.log(SIZES[name] / 30_000)
    return level + 3.2 * (step + 2) ** -0.45 + 0.04 * math.sin(12.9898 * step) + shift


def write_run(folder: Path, name: str, tensor: int = 1, apart: float = 0.0) -> None:
    """apart: how far from the ladder's loss at step 7, the largest difference within the first 50 steps."""
    folder.mkdir(parents=True)
    lines = []
    for step in range(1, STEPS + 1):
        seen = step * BATCH
        noise = apart * (1 if step == 7 else 0.25 * abs(math.sin(step)) if step <= 50 else 1.08 ** (step - 50))
        lines.append(
            {
                "step": step,
                "images_seen": seen,
                "loss": train_loss(name, step, noise),
                "grad_norm": 1.0,
                "lr": 1e-3,
                "images_per_s": 900.0,
            }
        )
        if step in BUDGETS:
            held_out = round(train_loss(name, step) + 0.03 + 8 * apart, 6)
            lines.append({"step": step, "images_seen": seen, "val_loss": held_out, "val_loss_null": held_out + 0.25})
    write_lines(folder / "metrics.jsonl", lines)
    layout = {"ranks": 2, "tensor": tensor, "data": 2 // tensor, "zero": 1}
    (folder / "summary.json").write_text(
        json.dumps(
            {
                "images_seen": STEPS * BATCH,
                "step": STEPS,
                "seconds": 20.5,
                "peak_rss_gb": 0.71,
                "layout": layout,
                "name": name,
                "params": SIZES[name],
                "tokens_per_image": TOKENS,
            }
        )
    )
    (folder / "record.json").write_text(
        json.dumps(
            {
                "llamagen_dist": "0.1.0",
                "torch": "2.14.1",
                "python": "3.11.9",
                "host": "secret-host",
                "cpus": 2,
                "git": {"commit": "0123abc"},
                "started": "2026-05-04T10:00:00+0000",
            }
        )
    )
    config = load(
        Path(__file__).parents[2] / "configs/gpt/ladder.yaml",
        {"run_dir": str(folder), "parallel": {"tensor": tensor}},
    )
    (folder / "config.yaml").write_text(dump(config))


def write_tokenizer(folder: Path) -> None:
    folder.mkdir(parents=True)
    lines: list[dict] = []
    for step in range(1, 201):
        error = 0.02 + 0.9 * step**-0.7 * (1 + 0.2 * math.sin(9 * step))
        lines.append(
            {
                "step": step,
                "images_seen": step * 32,
                "loss": error - 0.5 * (step > 150),
                "reconstruction": error,
                "grad_norm": 0.5,
                "lr": 1e-3,
                "images_per_s": 120.0,
            }
        )
        if step % 50 == 0:
            lines.append(
                {
                    "step": step,
                    "images_seen": step * 32,
                    "val_loss": 0.03 + 0.9 * step**-0.7,
                    "psnr": 16.0 + 2 * math.log(step),
                    "ssim": 0.4 + 0.08 * math.log(step),
                    "codebook_usage": 0.875,
                }
            )
    lines[-1] |= {"psnr": 25.5, "ssim": 0.8125}
    write_lines(folder / "metrics.jsonl", lines)
    (folder / "summary.json").write_text(
        json.dumps(
            {
                "images_seen": 6400,
                "step": 200,
                "seconds": 61.0,
                "peak_rss_gb": 0.93,
                "params": 182_340,
                "layout": {"ranks": 2, "tensor": 1, "data": 2, "zero": 0},
            }
        )
    )
    (folder / "config.yaml").write_text(f"""
kind: tokenizer
run_dir: {folder}
model:
  {{channels: 8, channel_multipliers: [1, 1], res_blocks: 1, z_channels: 16, codebook_size: 64,
   codebook_dim: 4}}
data: {{train: images/train, validation: images/validation, image_size: 28, random_crop: false}}
loss: {{perceptual: none, discriminator: {{start_images: 4800}}}}
train: {{images: 6400, global_batch: 32}}
""")


STAGES = [
    ("pack", "images into shards", 1, 3.25, 0.3),
    ("tokenizer", "learn to turn images into tokens", 2, 130.5, 0.93),
    ("extract", "every image into tokens, once", 2, 14.0, 0.5),
    ("ladder", "three GPTs of growing size", 2, 262.0, 0.71),
    ("tp2", "one rung again, split over two ranks", 2, 96.75, 1.375),
]


def make(out: Path) -> None:
    """Write everything a finished quickstart holds that is text."""
    for number, (name, why, ranks, seconds, peak) in enumerate(STAGES):
        folder = out / "stages" / name / "launch"
        folder.mkdir(parents=True)
        (folder / "DONE.json").write_text(
            json.dumps(
                {
                    "name": name,
                    "why": why,
                    "seconds": seconds,
                    "started": f"2026-05-04T10:0{number}:00+0000",
                    "peak_rss_gb": peak,
                    "ranks": ranks,
                    "module": "llamagen_dist.cli",
                    "config_sha256": "0" * 64,
                }
            )
        )
    write_tokenizer(out / "tokenizer")
    for name in SIZES:
        write_run(out / "ladder" / name, name)
    write_run(out / "tp2" / "g130k", "g130k", tensor=2, apart=3e-6)
    (out / "tokens" / "train").mkdir(parents=True)
    (out / "tokens" / "train" / "manifest.json").write_text(json.dumps({"kind": "tokens", "vocab_size": 512}))
