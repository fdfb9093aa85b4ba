"""Optimizer groups and learning-rate schedules, LlamaGen's choices as defaults (paper section 3.1)."""

import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from llamagen_dist.config import OptimSection
from llamagen_dist.parallel import muon
from llamagen_dist.parallel.topology import Topology

MOMENTS = ("exp_avg", "exp_avg_sq")
"""Of AdamW, as keys of its state. ``moments`` says what a parameter has."""
RATE = "rate"  # of a parameter group: its learning rate as a multiple of optim.lr's schedule

_EMBEDDING = re.compile(r"(?:^|\.)\w*embedding\w*\.weight")


def decay(name: str, p: Tensor, optim: OptimSection) -> float:
    """The weight decay of one parameter: matrices have two or more dimensions, vectors are norms and biases."""
    if p.dim() < 2:
        return optim.bias_decay if name.endswith("bias") else optim.norm_decay
    if optim.embedding_decay is not None and _EMBEDDING.search(name):
        return optim.embedding_decay
    return optim.weight_decay


def groups(module: nn.Module, optim: OptimSection) -> list[dict[str, Any]]:
    """Parameters that are treated alike, in their order: matrices first, then vectors, then what Muon takes."""
    found: dict[tuple[bool, bool, float], dict[str, Any]] = {}
    for name, p in module.named_parameters():
        if p.requires_grad:
            by_muon, rate = optim.kind == "muon" and muon.takes(name), decay(name, p, optim)
            group = found.setdefault((by_muon, p.dim() < 2, rate), {"params": [], "weight_decay": rate})
            group["params"].append(p)
            if by_muon:
                group |= {muon.ORTHOGONAL: True, RATE: (optim.muon_lr or optim.lr) / optim.lr}
    return [found[key] for key in sorted(found, key=lambda key: key[:2])]


def build(
    module: nn.Module, optim: OptimSection, topology: Topology | None = None, query_group: int = 1
) -> torch.optim.Optimizer:
    """AdamW; with weight_decay 0 it is plain Adam, which is what LlamaGen's tokenizer uses. Or Muon.

    topology: ranks that each have whole tensor-parallel parts, where there are several; only Muon needs to know them.
    query_group: query heads per key-value head, by which q, k and v lie in a fused weight.
    """
    kind = muon.Muon if optim.kind == "muon" else torch.optim.AdamW
    optimizer = kind(groups(module, optim), lr=optim.lr, betas=optim.betas, eps=optim.eps, fused=True)
    if isinstance(optimizer, muon.Muon):
        matrices = {name: p for name, p in module.named_parameters() if p.requires_grad and muon.takes(name)}
        optimizer.orthogonalize = muon.of_whole_parts(matrices, topology or Topology(), query_group)
    return optimizer


def moments(optim: OptimSection, name: str) -> tuple[str, ...]:
    """Keys of the optimizer's state that a checkpoint holds of the parameter ``name``."""
    return (muon.MOMENT,) if optim.kind == "muon" and muon.takes(name) else MOMENTS


def fresh_state(p: Tensor, moments: Iterable[str] = MOMENTS) -> dict[str, Any]:
    """A parameter's state before the first step: it would be made by that step, but a resume writes into it before."""
    return {"step": torch.zeros((), device=p.device), **{m: torch.zeros_like(p, dtype=torch.float32) for m in moments}}


def moment_bytes(states: Iterable[Mapping[str, Any]]) -> int:
    """Of all moments, whosever they are."""
    return sum(state[m].nbytes for state in states for m in (*MOMENTS, muon.MOMENT) if m in state)


def set_learning_rate(groups: Iterable[dict[str, Any]], optim: OptimSection, images_seen: int) -> None:
    """Of every parameter group, for the step whose global batch starts at sample ``images_seen``."""
    rate = learning_rate(optim, images_seen)
    for group in groups:
        group["lr"] = rate * group.get(RATE, 1.0)


def learning_rate(optim: OptimSection, images_seen: int) -> float:
    """The rate of the step whose global batch starts at sample ``images_seen``: a function of position, not state."""
    if images_seen < optim.warmup_images:
        return optim.lr * (images_seen + 1) / optim.warmup_images
    if optim.schedule == "cosine":
        done = min(1.0, (images_seen - optim.warmup_images) / (optim.cosine_images - optim.warmup_images))
        return optim.final_lr + (optim.lr - optim.final_lr) * 0.5 * (1 + math.cos(math.pi * done))
    if optim.schedule == "wsd" and images_seen > optim.cooldown_from:
        done = min(1.0, (images_seen - optim.cooldown_from) / optim.cooldown_images)
        return optim.final_lr + (optim.lr - optim.final_lr) * (1 - done)
    return optim.lr
