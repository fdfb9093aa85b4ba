"""LlamaGen's rotary embedding of a grid: the first half of a head turns with the row, the second with the column."""

import math

import torch
from torch import Tensor

from llamagen_dist.models.sizes import GPTConfig


def rotary_table(config: GPTConfig) -> Tensor:
    """(prefix + image_tokens, head_dim / 2, 2) fp32: cos and sin.

    The prefix rows are 0, 0 (``prefix_rotation: zero``, what the released weights were trained with) or 1, 0.
    """
    side, half = math.isqrt(config.image_tokens), config.head_dim // 2
    theta = 1.0 / config.rope_base ** (torch.arange(0, half, 2)[: half // 2].float() / half)
    along = torch.outer(torch.arange(side).float(), theta)
    rows = along[:, None, :].expand(side, side, -1)
    columns = along[None, :, :].expand(side, side, -1)
    angles = torch.cat([rows, columns], dim=-1).flatten(0, 1)
    image = torch.stack([angles.cos(), angles.sin()], dim=-1)
    prefix = torch.zeros(config.prefix, half, 2)
    if config.prefix_rotation == "identity":
        prefix[..., 0] = 1.0
    return torch.cat([prefix, image])
