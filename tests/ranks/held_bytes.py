"""Bytes that a training rank really holds, at the moments that matter."""

import gc
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch

from llamagen_dist.build import gpt_config
from llamagen_dist.planning.memory import Layout as MemoryLayout
from tests import checkpoints as store
from tests.live_bytes import kept_for_backward, storages
from tests.ranks import layouts


def live_bytes(excluding: Collection[int]) -> int:
    return sum(size for at, size in storages().items() if at not in excluding)


def train_and_count(layout: layouts.Layout, *settings: str, micro: int = 3) -> dict[str, Any]:
    """Two steps of several micro-batches. Bytes that the task made: at rest behind them, at the fullest moment seen
    (inside the backward passes and right behind them), and what its engine says it holds, gradients aside.

    Activations are autograd's own and not seen, and neither are DDP's buckets before a gradient lies in them.
    """
    before = storages()
    gc.freeze()  # a forked rank ends here anyway: what the parent made need not be looked through again and again
    task = layouts.make_task(layout, *settings, micro_batch=micro)
    seen: list[int] = []

    def in_backward(module: torch.nn.Module, inputs: Any, output: torch.Tensor) -> None:
        if output.requires_grad:
            output.register_hook(lambda gradient: seen.append(live_bytes(before)))

    task.model.layers[0].register_forward_hook(in_backward)
    backward = task.engine.backward

    def counted(loss: torch.Tensor) -> None:
        backward(loss)
        seen.append(live_bytes(before))

    task.engine.backward = counted  # type: ignore[method-assign]
    layouts.steps(task, 0, 2)
    held = task.engine.held_bytes()
    return {
        "rest": live_bytes(before),
        "fullest": max(seen),
        "held": sum(size for name, size in held.items() if name != "gradients"),
    }


def memory_layout(task_config: Any, layout: layouts.Layout) -> MemoryLayout:
    """The same layout as planning/memory.py knows it."""
    return MemoryLayout(
        zero=layout.zero,
        tensor=layout.tensor,
        data=layout.ranks // layout.tensor,
        precision=task_config.compute.precision,
        sequence=layout.sequence,
        ema=task_config.ema.averages,
    )


def model_of(task_config: Any) -> Any:
    return gpt_config(
        task_config.model,
        vocab_size=layouts.VOCABULARY,
        image_tokens=layouts.TOKENS,
        num_classes=layouts.CLASSES,
    )


def kept_by(layout: layouts.Layout, *settings: str, batch: int = 4) -> int:
    """Bytes that this rank's part of the model keeps for the backward pass over ``batch`` images."""
    model = layouts.make_task(layout, *settings).model
    if "compute.precision=bf16" in settings:
        model.bfloat16()
    return kept_for_backward(model.train(), batch)


def saved_bytes(layout: layouts.Layout, folder: Path, *settings: str) -> int:
    """Bytes of all the files of a checkpoint."""
    task = layouts.make_task(layout, *settings)
    store.save(folder, 1, task.entries(), {}, task.topology, config_text="kind: gpt\n")
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
