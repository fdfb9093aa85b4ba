"""The condition as the first positions of the sequence: a class, or a caption's text-encoder features."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llamagen_dist.models.layers import Embedding, Linear
from llamagen_dist.models.sizes import GPTConfig

Caption = tuple[Tensor, Tensor]  # features (B, T, caption_dim) left-padded, present (B, T) bool
Condition = Tensor | Caption  # or labels (B,) int64


class ClassEmbedder(nn.Module):
    """labels (B,) int64, ``num_classes`` being the null class -> (B, 1, dim)."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.embedding_table = Embedding(config.num_classes + 1, config.dim)

    def forward(self, labels: Tensor) -> Tensor:
        return self.embedding_table(labels).unsqueeze(1)


class CaptionProjection(nn.Module):
    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.fc1 = Linear(config.caption_dim, config.dim)
        self.fc2 = Linear(config.dim, config.dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class CaptionEmbedder(nn.Module):
    """Text-encoder features (B, T, caption_dim) of any floating type -> (B, T, dim)."""

    uncond_embedding: Tensor

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.cap_proj = CaptionProjection(config)
        self.register_buffer("uncond_embedding", torch.zeros(config.prefix, config.caption_dim))

    def forward(self, features: Tensor) -> Tensor:
        return self.cap_proj(features.to(self.cap_proj.fc1.weight.dtype))
