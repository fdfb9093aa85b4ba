"""Attention over a fused [q | k | v] projection, with fewer key and value heads where the config says so.

Head counts are read off the activations, because a tensor-parallel rank has its own share of the heads.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llamagen_dist.models.cache import LayerCache
from llamagen_dist.models.dropout import Randomness, threshold
from llamagen_dist.models.fused import split_and_rotate
from llamagen_dist.models.layers import Linear
from llamagen_dist.models.sizes import GPTConfig

PLACE = 2  # of the attention probabilities among a layer's dropouts


class Attention(nn.Module):
    """first_head: the number, in the whole model, of the first head that this rank computes."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        self.group = config.n_head // config.kv_heads
        self.dropout_p = config.attn_dropout_p
        self.first_head = 0
        self.wqkv = Linear(config.dim, config.dim + 2 * config.kv_dim)
        self.wo = Linear(config.dim, config.dim)

    def forward(
        self,
        x: Tensor,
        table: Tensor,
        mask: Tensor | None,
        random: Randomness | None = None,
        past: LayerCache | None = None,
    ) -> Tensor:
        """x (B, S, dim); table: rotary, (S, head_dim / 2, 2) or (B, S, …). mask None: every position sees itself and
        what is before it (or, if it is a single one, all that is cached); else what SDPA takes."""
        q, k, v = split_and_rotate(self.wqkv(x), table, self.group, self.head_dim)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        causal = mask is None
        if past is not None:
            k, v = past.extend(k, v)
            causal = causal and q.shape[2] == k.shape[2]
        if random is not None and threshold(self.dropout_p) > 0:
            out = self._with_dropout(q, k, v, random)
        else:
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, enable_gqa=self.group > 1)
        return self.wo(out.transpose(1, 2).flatten(2))

    def _with_dropout(self, q: Tensor, k: Tensor, v: Tensor, random: Randomness) -> Tensor:
        """Causal attention (training only) that holds the (B, heads, S, S) probabilities, in fp32, to drop some."""
        k, v = _repeated(k, self.group), _repeated(v, self.group)
        scores = (q @ k.transpose(-1, -2)).float() * self.head_dim**-0.5
        hidden = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu(1)
        probabilities = scores.masked_fill(hidden, -torch.inf).softmax(-1)
        return random.attention_dropout(probabilities, self.dropout_p, PLACE, self.first_head).type_as(v) @ v


def _repeated(x: Tensor, times: int) -> Tensor:
    """(B, heads, S, d) -> (B, heads x times, S, d): query heads h x times … share key head h."""
    return x.unsqueeze(2).expand(-1, -1, times, -1, -1).flatten(1, 2)
