"""Bytes that this process really holds in tensors, counted once per storage."""

import gc
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from llamagen_dist.models.gpt import GPT


def storages() -> dict[int, int]:
    """Address -> bytes of every storage that a live Python tensor, or its gradient, refers to."""
    found: dict[int, int] = {}
    kinds: dict[type, bool] = {}  # asking torch about each of a million objects would take seconds
    for thing in gc.get_objects():
        kind = type(thing)
        try:
            if kind not in kinds:
                kinds[kind] = issubclass(kind, Tensor)
            if kinds[kind] and thing.device.type != "meta":
                for t in (thing, thing.grad if thing.is_leaf else None):
                    if t is not None:
                        found[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        except (ReferenceError, RuntimeError):  # a dead proxy, or a tensor without a storage
            continue
    found.pop(0, None)
    return found


def sample(model: GPT, batch: int) -> tuple[Any, ...]:
    """What ``model`` can be trained on: the arguments of its loss."""
    config = model.config
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(config.vocab_size, (batch, config.image_tokens), generator=generator)
    condition: Any = torch.randint(config.num_classes, (batch,), generator=generator)
    if config.condition == "text":
        features = torch.randn(batch, config.prefix, config.caption_dim, generator=generator)
        condition = (features, torch.ones(batch, config.prefix, dtype=torch.bool))
    numbers = torch.arange(batch)
    order = None if config.order == "raster" else torch.rand(tokens.shape, generator=generator).argsort(dim=1)
    beta = None if config.guidance == "dropout" else torch.rand(batch, generator=generator)
    return tokens, condition, numbers, None, order, beta


def kept_for_backward(model: GPT, batch: int) -> int:
    """Bytes that exist between the forward and the backward pass over ``batch`` images and did not before.

    Tensors saved by autograd, and tensors held by Python objects of its graph (recomputation keeps its inputs there,
    the loss its logits). Weights, buffers and the batch itself are not counted.
    """
    batched = sample(model, batch)
    model.loss(*batched).backward()  # whatever is cached once is there now
    model.zero_grad()
    gc.collect()
    before = set(storages()) | {t.untyped_storage().data_ptr() for t in [*model.parameters(), *model.buffers()]}
    saved: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        saved[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = model.loss(*batched)
    kept = {at: tensor.untyped_storage().nbytes() for at, tensor in saved.items()} | storages()
    loss.backward()
    return sum(size for at, size in kept.items() if at not in before)


def peak_of_a_pass(model: GPT, batch: int) -> int:
    """The most bytes allocated at a time in a forward and backward pass, over those before it, by torch's profiler."""
    batched = sample(model, batch)
    model.loss(*batched).backward()
    model.zero_grad()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        model.loss(*batched).backward()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    return max(accumulate(e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())))
