"""A thousand steps of a tokenizer with all that keeps state beside its weights: memory does not grow with them."""

import os
import subprocess
import sys
from pathlib import Path
from statistics import median

import pytest
import torch

from llamagen_dist.build import build_vq
from llamagen_dist.config import TokenizerConfigFile
from llamagen_dist.config.section import build
from llamagen_dist.data.batch import ImageBatch
from llamagen_dist.data.shards import open_shards
from llamagen_dist.parallel.topology import Topology
from tests.bench.sample import resident
from tests.image_shards import write_images
from tokenizer_training.task import TokenizerTask

ROOT = Path(__file__).parent.parent.parent
STEPS, BATCH = 1000, 4


def growth(folder: Path, keep: bool) -> float:
    """MB, from the second fifth of the steps to the last, by their medians.

    keep: every step's reconstructions stay.
    """
    torch.set_num_threads(1)
    torch.manual_seed(0)
    config = build(TokenizerConfigFile,
        {"kind": "tokenizer", "run_dir": folder / "run",
         "model": {"channels": 8, "channel_multipliers": [1, 2], "res_blocks": 1, "z_channels": 8, "codebook_size": 64,
                   "codebook_dim": 4, "quantizer": "ema"},
         "data": {"train": folder / "images", "validation": folder / "images", "image_size": 16},
         "loss": {"perceptual": "none", "entropy_weight": 0.01,
                  "discriminator": {"start_images": 0, "warmup_images": 40, "channels": 8, "layers": 2,
                                    "adaptive_weight": True, "r1_weight": 1.0, "lecam_weight": 0.01}},
         "codebook": {"statistics": True, "revive_after_steps": 10, "perturb_share": 0.5, "perturb_neighbours": 8},
         "train": {"images": STEPS * BATCH, "global_batch": BATCH}, "optim": {"lr": 1e-3, "weight_decay": 0.0},
         "log": {"every_steps": 5}}, "test")  # fmt: skip
    task = TokenizerTask(
        build_vq(config.model), config, Topology(), open_shards(write_images(folder / "images", 4, 16))
    )
    kept, seen = [], []
    if keep:
        real = task._generator_pass

        def leaking(*arguments):
            losses, reconstruction = real(*arguments)
            kept.append(reconstruction)
            return losses, reconstruction

        task._generator_pass = leaking
    for step in range(STEPS):
        pixels = torch.rand(BATCH, 3, 16, 16, generator=torch.Generator().manual_seed(step)) * 2 - 1
        task.step(ImageBatch(pixels, torch.arange(BATCH)), step * BATCH)
        if step % 100 == 0:
            task.validate()
        seen.append(resident("VmRSS"))
    fifth = STEPS // 5
    return median(seen[-fifth:]) - median(seen[fifth : 2 * fifth])


def growth_alone(folder: Path, keep: bool) -> float:
    """In a process of its own, see test_sampling_memory.py."""
    code = f"from tests.runs.test_tokenizer_memory import *; print(growth(Path({str(folder)!r}), {keep}))"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    ran = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True, check=True
    )
    return float(ran.stdout.split()[-1])


@pytest.mark.long
def test_memory_does_not_grow_with_the_steps(tmp_path):
    """The twin keeps each step's reconstructions: 12 kB, and whatever of their graph backward has not freed."""
    assert growth_alone(tmp_path / "run", keep=False) < 4
    assert growth_alone(tmp_path / "twin", keep=True) > 6
