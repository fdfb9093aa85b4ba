"""Training steps of real engines, timed, with the memory they took: one process start, several cases.

[torchrun --nproc-per-node=N] -m tests.gpu.speed OUT.json CASES.json
"""

import gc
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from llamagen_dist.build import gpt_config
from llamagen_dist.config import GPTConfigFile
from llamagen_dist.data.batch import TokenBatch
from llamagen_dist.models.cost import training_flops_per_image
from llamagen_dist.parallel.topology import Topology, start
from llamagen_dist.planning import memory
from llamagen_dist.tracking.devices import peak_flops
from llamagen_dist.training.gpt_task import GPTTask
from tests.plain_gpt import whole_gpt

Case = dict[str, Any]
"""model: keys of the config's model section; tokens, vocabulary, precision, micro, accumulation, zero, compile and
steps."""


def config_of(case: Case, topology: Topology) -> GPTConfigFile:
    batch = case["micro"] * case.get("accumulation", 1) * topology.dp
    return GPTConfigFile.model_validate(
        {
            "kind": "gpt",
            "run_dir": "unused",
            "data": {"train": "unused", "validation": "unused"},
            "model": case["model"],
            "train": {"images": batch, "global_batch": batch, "micro_batch": case["micro"], "seed": 1},
            "parallel": {"zero": case["zero"]},
            "compute": {"precision": case["precision"], "compile": case.get("compile", False)},
        }
    )


def batch_at(step: int, case: Case, topology: Topology) -> TokenBatch:
    """This rank's share of a global batch that depends on the step only."""
    share = case["micro"] * case.get("accumulation", 1)
    count = share * topology.dp
    generator = torch.Generator().manual_seed(step)
    tokens = torch.randint(case["vocabulary"], (count, case["tokens"]), generator=generator)
    everything = TokenBatch(tokens, tokens[:, 0] % 10, torch.arange(step * count, (step + 1) * count))
    return everything.rows(slice(topology.dp_rank * share, (topology.dp_rank + 1) * share))


def measure(case: Case, topology: Topology) -> dict[str, Any]:
    """loss: of every step (mean over the ranks). seconds: median of the steps behind the first two. images_per_s, mfu:
    of all ranks. peak_bytes: largest of the ranks, planned_bytes: planning/memory.py's; None where there is none."""
    gc.collect()
    on_gpu = topology.device.type == "cuda"
    before = 0
    if on_gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    config = config_of(case, topology)
    shape = gpt_config(config.model, vocab_size=case["vocabulary"], image_tokens=case["tokens"], num_classes=10)
    try:
        task = GPTTask(whole_gpt(shape, seed=1), config, topology, "check", lambda: [])
        losses, seconds = [], []
        for step in range(case["steps"] + 2):
            batch = batch_at(step, case, topology)
            if on_gpu:
                torch.cuda.synchronize()
            began = time.perf_counter()
            metrics = task.step(batch, step * config.train.global_batch)
            losses.append(float(topology.mean(metrics["loss"])))  # waits for the device
            seconds.append(time.perf_counter() - began)
    except torch.OutOfMemoryError:
        return {"out_of_memory": True}
    took = statistics.median(seconds[2:])
    peak = None
    if on_gpu:
        most = torch.tensor([torch.cuda.max_memory_allocated() - before], dtype=torch.float64, device=topology.device)
        if topology.world > 1:
            dist.all_reduce(most, op=dist.ReduceOp.MAX)
        peak = int(most.item())
    rate = config.train.global_batch / took
    best = peak_flops(torch.cuda.get_device_name(), case["precision"]) if on_gpu else None
    layout = memory.Layout(
        zero=case["zero"], data=topology.dp, precision=case["precision"], micro=case["micro"], tensor=topology.tensor
    )
    return {
        "out_of_memory": False,
        "loss": losses,
        "seconds": took,
        "images_per_s": rate,
        "mfu": None if best is None else training_flops_per_image(shape) * rate / (best * topology.world),
        "peak_bytes": peak,
        "planned_bytes": sum(memory.per_rank(shape, layout).values()),
        "ranks": topology.world,
    }


def main(words: list[str]) -> None:
    out, cases = Path(words[0]), json.loads(Path(words[1]).read_text())
    topology = start()
    found = [measure(case, topology) for case in cases]
    if topology.rank == 0:
        out.write_text(json.dumps(found))
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1:])
