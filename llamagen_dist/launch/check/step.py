"""Two real training steps of a tiny GPT, through the engine that a run on these devices would use."""

import math
import time
from pathlib import Path
from typing import Any

import torch

from llamagen_dist.build import build_gpt_on_meta, fresh_weights, gpt_config
from llamagen_dist.config import GPTConfigFile
from llamagen_dist.data.batch import TokenBatch
from llamagen_dist.parallel.topology import Topology
from llamagen_dist.training.gpt_task import GPTTask

VOCABULARY, TOKENS, CLASSES, PER_RANK = 256, 64, 10, 2


def train(topology: Topology, folder: Path, as_on_gpus: bool | None = None) -> dict[str, Any]:
    """Collective.

    as_on_gpus: bf16 and ZeRO-1 by DeepSpeed; None: where there are GPUs.

    Returns losses: before and after one update on the same batch (None: not finite).
    expected: of an untrained model, which the first loss has to be close to.
    seconds: of the second step; the first one makes buffers and connections.
    equal: whether the weights are the same on all ranks.
    """
    cuda = topology.device.type == "cuda" if as_on_gpus is None else as_on_gpus
    batch_size = PER_RANK * topology.dp
    data = {
        "kind": "gpt",
        "run_dir": str(folder),
        "data": {"train": "none", "validation": "none"},
        "model": {"n_layer": 2, "n_head": 4, "dim": 64, "multiple_of": 16},
        "train": {"images": 2 * batch_size, "global_batch": batch_size, "seed": 1},
        "optim": {"lr": 1e-2},
        "compute": {"precision": "bf16" if cuda else "fp32"},
        "parallel": {"zero": 1 if cuda else 0},  # on CPU ranks the import of DeepSpeed alone would take the minute
    }
    config = GPTConfigFile.model_validate(data)
    sizes = gpt_config(config.model, vocab_size=VOCABULARY, image_tokens=TOKENS, num_classes=CLASSES)
    model = build_gpt_on_meta(sizes, 1)
    task = GPTTask(model, config, topology, "check", lambda: iter(()), fresh_weights(sizes, 1))
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(VOCABULARY, (batch_size, TOKENS), generator=generator)
    whole = TokenBatch(tokens, tokens[:, 0] % CLASSES, torch.arange(batch_size))
    share = topology.per_rank_batch(batch_size)
    mine = whole.rows(slice(topology.dp_rank * share, (topology.dp_rank + 1) * share))
    losses: list[float | None] = []
    seconds = 0.0
    for number in range(2):
        began = time.perf_counter()
        metrics = task.step(mine, number * batch_size)
        loss = float(topology.mean(metrics["loss"].detach().double().to(topology.device)))
        losses.append(round(loss, 6) if math.isfinite(loss) else None)
        seconds = time.perf_counter() - began
    total = sum(float(p.detach().double().sum()) for p in task.model.parameters())
    return {
        "device": str(topology.device),
        "losses": losses,
        "expected": round(math.log(VOCABULARY), 6),
        "seconds": round(seconds, 4),
        "equal": len(set(topology.gather(total))) == 1,
    }
