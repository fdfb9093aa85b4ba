"""The two runs that the faults hit, and the checkout they are launched from."""

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from llamagen_dist.data import digest
from llamagen_dist.data.order import Order
from tests.expected_digest import expected
from tests.image_shards import write_images
from tests.runs.token_shards import write_tokens
from tests.slurm.local_cluster import ROOT

STEPS, SAVE_EVERY = 120, 15
TOKEN_SAMPLES, IMAGE_SAMPLES = 200, 96
_BEAT = '        """``step`` steps are done."""\n'
_PACE = '''"""Added for tests: steps are written down, and take LLAMAGEN_TEST_PACE_S longer until a restart."""

import os
import time


def step(rank: int, number: int) -> None:
    restart = os.environ.get("SLURM_RESTART_COUNT", "0")
    if rank == 0:
        owner = f"{os.environ['SLURM_JOB_ID']}.{restart}"
        with open(os.environ["LLAMAGEN_TEST_STEPS"], "a") as file:
            file.write(f"{time.time():.3f} {owner} {number}\\n")
    if restart == "0":
        time.sleep(float(os.environ["LLAMAGEN_TEST_PACE_S"]))
'''


@dataclass(frozen=True)
class Program:
    name: str
    module: str
    samples: int
    """In the training set."""
    batch: int
    settings: dict[str, Any]
    """Its config, without run_dir and data."""
    data: dict[str, Any]

    def write_config(self, folder: Path) -> Path:
        """The shards and the config in ``folder``; made once."""
        shards = {name: str(folder / self.name / name) for name in ("train", "validation")}
        for seed, (name, where) in enumerate(shards.items()):
            count = self.samples if name == "train" else 16
            if self.name == "gpt":
                write_tokens(Path(where), count, seed)
            else:
                write_images(Path(where), count, 16, seed=seed)
        file = folder / f"{self.name}.yaml"
        file.write_text(
            yaml.safe_dump({
                **self.settings,
                "kind": self.name,
                "run_dir": str(folder / "unused"),
                "data": {**shards, **self.data},
                "train": {"images": STEPS * self.batch, "global_batch": self.batch},
                "validation": {"at_images": [STEPS // 2 * self.batch], "batch": 4},
                "checkpoint": {"every_images": SAVE_EVERY * self.batch},
                "log": {"every_steps": 1},
                "guard": {"hang_minutes": 0.3, "start_minutes": 5},
            })
        )  # fmt: skip
        return file

    def digest(self, images_seen: int) -> str:
        """What metrics.jsonl must say about the samples shown so far."""
        return digest.text(expected(Order(self.samples, 0), images_seen))


GPT = Program(
    "gpt",
    "llamagen_dist.train_gpt",
    TOKEN_SAMPLES,
    16,
    {
        "model": {"n_layer": 2, "n_head": 4, "dim": 64, "multiple_of": 16},
        "optim": {"lr": 1e-3},
        "ema": {"decay": 0.99},
        "parallel": {"zero": 1, "tensor": 2},
    },
    {},
)
TOKENIZER = Program(
    "tokenizer",
    "tokenizer_training.train",
    IMAGE_SAMPLES,
    8,
    {
        "model": {
            "channels": 8,
            "channel_multipliers": [1, 2],
            "res_blocks": 1,
            "z_channels": 8,
            "codebook_size": 32,
            "codebook_dim": 4,
            "codebook_init": "first_batch",
        },
        "loss": {
            "perceptual": "none",
            "discriminator": {"start_images": 320, "channels": 8, "layers": 2, "norm": "group", "weight": 0.1},
        },
        # eps: a bias before a normalisation has no gradient but rounding, which Adam would blow up to whole steps;
        # these two keep runs of 4 and of 2 ranks within 3e-7 of each other, while a step moves weights by 2e-4
        "optim": {"lr": 2e-4, "eps": 1e-4, "weight_decay": 0.0},
    },
    {"image_size": 16},
)
PROGRAMS = {program.name: program for program in (GPT, TOKENIZER)}


def paced_checkout(folder: Path) -> Path:
    """The programs as they are, but rank 0 writes down every step, and until a restart steps take a moment longer: a
    fault must find the run in the middle on a fast machine too."""
    for name in ("llamagen_dist", "tokenizer_training", "eval", "slurm"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    watchdog = folder / "llamagen_dist/training/watchdog.py"
    text = watchdog.read_text()
    assert text.count(_BEAT) == 1
    watchdog.write_text(text.replace(_BEAT, f"{_BEAT}        pace.step(self._topology.rank, step)\n").replace(
        "from llamagen_dist.parallel.clock import Clock\n",
        "from llamagen_dist.parallel.clock import Clock\nfrom llamagen_dist.training import pace\n",
    ))  # fmt: skip
    (folder / "llamagen_dist/training/pace.py").write_text(_PACE)
    return folder
