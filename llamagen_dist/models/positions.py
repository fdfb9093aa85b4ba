"""Where the tokens of a sequence lie in the image: their rotary angles, and sequences in another order than theirs."""

import torch
import torch.nn.functional as F
from torch import Tensor

from llamagen_dist.models.sizes import GPTConfig


def rotary_table(config: GPTConfig) -> Tensor:
    """(prefix + image_tokens, head_dim / 2, 2) fp32: cos and sin.

    The prefix rows are 0, 0 (``prefix_rotation: zero``, what the released weights were trained with) or 1, 0.
    """
    height, width = config.grid
    half = config.head_dim // 2
    # each axis turns half / 2 of the pairs, at frequencies base^(-2i / half), as RoPE does for a head of size half
    theta = 1.0 / config.rope_base ** (torch.arange(0, half, 2)[: half // 2].float() / half)
    along = torch.outer(torch.arange(max(height, width)).float(), theta)
    rows = along[:height, None, :].expand(height, width, -1)
    columns = along[None, :width, :].expand(height, width, -1)
    angles = torch.cat([rows, columns], dim=-1).flatten(0, 1)
    image = torch.stack([angles.cos(), angles.sin()], dim=-1)
    prefix = torch.zeros(config.prefix, half, 2)
    if config.prefix_rotation == "identity":
        prefix[..., 0] = 1.0
    return torch.cat([prefix, image])


def own_angles(rotary: Tensor, prefix: int, positions: Tensor) -> Tensor:
    """The rows of ``rotary`` (of ``rotary_table``) for a prefix and tokens in an order of their own: (B, S, pairs, 2).

    positions: (B, N) int64, raster numbers. A token turns with its own, whenever it comes; the last one is no input.
    """
    first = torch.arange(prefix, device=positions.device).expand(len(positions), -1)
    return rotary[torch.cat([first, prefix + positions[:, :-1]], dim=1)]


def sequence_order(present: Tensor, tokens: int) -> Tensor:
    """(B, T + tokens) int64: the caption's tokens, then the image's, then the caption's padding, each in its order."""
    # sorted by 0 (caption), 1 (image), 2 (padding); a stable sort keeps the order within each
    return F.pad(2 - 2 * present.to(torch.int8), (0, tokens), value=1).argsort(dim=1, stable=True)


def angles_of(table: Tensor, order: Tensor) -> Tensor:
    """A rotary table (B, S, pairs, 2) of each sample, order (B, S) int64 -> its rows in that order."""
    return rows_of(table.flatten(2), order).unflatten(2, table.shape[2:])


def rows_of(x: Tensor, positions: Tensor) -> Tensor:
    """x (B, S, d), positions (B, n) int64 -> (B, n, d), the rows at these positions of each sample."""
    # one index_select over all rows: gather would want an index as large as its result
    first = torch.arange(len(x), device=x.device)[:, None] * x.shape[1]
    return x.flatten(0, 1).index_select(0, (first + positions).flatten()).unflatten(0, positions.shape)
