"""A thousand steps of a tokenizer with all that keeps state beside its weights: memory does not grow with them."""

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
from tests.runs.memory_growth import growth_alone
from tokenizer_training.task import TokenizerTask

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


@pytest.mark.long
def test_memory_does_not_grow_with_the_steps(tmp_path):
    """The twin keeps each step's reconstructions: 12 kB, and whatever of their graph backward has not freed."""
    assert growth_alone(__name__, tmp_path / "run", False) < 4
    assert growth_alone(__name__, tmp_path / "twin", True) > 6
