"""Optimizer groups and learning-rate schedules, LlamaGen's choices as defaults (paper section 3.1)."""

import math
from typing import Any

import torch
from torch import Tensor, nn

from llamagen_dist.config import OptimSection

MOMENTS = ("exp_avg", "exp_avg_sq")


def groups(module: nn.Module, weight_decay: float) -> list[dict[str, object]]:
    """Decay for matrices (two or more dimensions, embeddings too), none for norms and biases; empty groups left out."""
    matrices = [p for p in module.parameters() if p.requires_grad and p.dim() >= 2]
    vectors = [p for p in module.parameters() if p.requires_grad and p.dim() < 2]
    both = [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return [group for group in both if group["params"]]


def build(module: nn.Module, optim: OptimSection) -> torch.optim.Optimizer:
    """AdamW; with weight_decay 0 it is plain Adam, which is what LlamaGen's tokenizer uses."""
    return torch.optim.AdamW(
        groups(module, optim.weight_decay), lr=optim.lr, betas=optim.betas, eps=optim.eps, fused=True
    )


def fresh_state(p: Tensor) -> dict[str, Any]:
    """Adam's state before the first step: it would be made by that step, but a resume writes into it before."""
    return {"step": torch.zeros((), device=p.device), **{m: torch.zeros_like(p, dtype=torch.float32) for m in MOMENTS}}


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
