"""One layer of the Llama: attention and a gated feed-forward network, each normalised before and added after.

What a block keeps for the backward pass, for B samples of S positions (eager; tests/unit/test_gpt_training.py counts):

* in the computing type: x, its norm, q, k, v, what attention found, x after attention, its norm, w1's and w3's
  outputs (their gated product is computed again): B S (6 dim + 2 kv_dim + 2 ffn_dim) numbers. A tensor-parallel rank
  has 1 / tp of q, k, v, attention's output and the two of the feed-forward network (with sequence parallelism of the
  two x as well);
* in fp32: B S (2 + n_head) numbers (of norms and of attention's softmax);
* the dropout masks: 1 byte for every element of the two outputs, B S dim each, where its probability is above 0.

A recomputed block keeps x only: B S dim. With attn_dropout_p > 0 attention keeps B n_head S^2 probabilities more.
"""

import torch
from torch import Tensor, nn

from llamagen_dist.models.attention import Attention
from llamagen_dist.models.cache import LayerCache
from llamagen_dist.models.dropout import Randomness
from llamagen_dist.models.fused import derived, gated
from llamagen_dist.models.layers import Linear, RMSNorm
from llamagen_dist.models.sizes import GPTConfig

ATTENDED, FED, ATTENDED_PATH, FED_PATH = 0, 1, 3, 4  # places of a layer's dropouts (2: attention probabilities)


class FeedForward(nn.Module):
    """rederive: compute the gated product again in the backward pass instead of keeping it."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.w1 = Linear(config.dim, config.ffn_dim)
        self.w3 = Linear(config.dim, config.ffn_dim)
        self.w2 = Linear(config.ffn_dim, config.dim)
        self.rederive = True

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.w1(x), self.w3(x)
        product = gated(a, b)
        if torch.compiler.is_compiling() or not (self.rederive and product.requires_grad):
            return self.w2(product)
        with derived(product, a, b):
            return self.w2(product)


class Block(nn.Module):
    def __init__(self, config: GPTConfig, drop_path_p: float) -> None:
        super().__init__()
        self.attention = Attention(config)
        self.feed_forward = FeedForward(config)
        self.attention_norm = RMSNorm(config.dim, config.norm_eps)
        self.ffn_norm = RMSNorm(config.dim, config.norm_eps)
        # LlamaGen switches the element-wise dropouts off where drop-path is on
        self.resid_dropout_p = 0.0 if config.drop_path_rate > 0 else config.resid_dropout_p
        self.ffn_dropout_p = 0.0 if config.drop_path_rate > 0 else config.ffn_dropout_p
        self.drop_path_p = drop_path_p

    def forward(
        self,
        x: Tensor,
        table: Tensor,
        mask: Tensor | None,
        random: Randomness | None,
        past: LayerCache | None = None,
    ) -> Tensor:
        """x (B, S, dim) -> the same; random: this layer's, or None without dropout. See Attention for the others."""
        attended = self.attention(self.attention_norm(x), table, mask, random, past)
        if random is None:
            x = x + attended
            return x + self.feed_forward(self.ffn_norm(x))
        attended = random.drop_path(attended, self.drop_path_p, ATTENDED_PATH)
        x = random.add_dropped(x, attended, self.resid_dropout_p, ATTENDED)
        fed = random.drop_path(self.feed_forward(self.ffn_norm(x)), self.drop_path_p, FED_PATH)
        return random.add_dropped(x, fed, self.ffn_dropout_p, FED)
