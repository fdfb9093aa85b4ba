"""Bytes that this process really holds in tensors, counted once per storage."""

import gc
from typing import Any

import torch


def live_storages() -> dict[int, int]:
    """Address -> bytes of every CPU storage that a live tensor or its gradient refers to."""
    gc.collect()
    found: dict[int, int] = {}
    for thing in gc.get_objects():
        try:
            if isinstance(thing, torch.Tensor) and thing.device.type != "meta":
                for t in (thing, thing.grad if thing.is_leaf else None):
                    if t is not None:
                        storage = t.untyped_storage()
                        found[storage.data_ptr()] = max(found.get(storage.data_ptr(), 0), storage.nbytes())
        except (ReferenceError, RuntimeError):  # a dead proxy, or a tensor without a storage
            continue
    found.pop(0, None)
    return found


def live_bytes(excluding: dict[int, int] | None = None, larger_than: int = 0) -> int:
    return sum(n for at, n in live_storages().items() if at not in (excluding or {}) and n > larger_than)


def largest(excluding: dict[int, int] | None = None, count: int = 12) -> list[Any]:
    return sorted((n for at, n in live_storages().items() if at not in (excluding or {})), reverse=True)[:count]
