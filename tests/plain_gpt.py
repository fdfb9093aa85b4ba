"""The GPT once more, the way one writes it first: what the library's is compared with, in results and in speed.

Stacked rotary pairs, one (T + N)^2 mask per caption, the head at every position, cross-entropy over fp32 logits,
torch's own dropout. Same parameter names, so that weights can be copied over.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llamagen_dist.models.gpt import GPT, Condition, GPTConfig, rotary_table


class Norm(nn.Module):
    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.eps, self.weight = eps, nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        return (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)).type_as(x) * self.weight


def rotate(x: Tensor, table: Tensor) -> Tensor:
    pairs = x.float().reshape(*x.shape[:-1], -1, 2)
    table = table.view(1, x.shape[1], 1, -1, 2)
    turned = torch.stack(
        [
            pairs[..., 0] * table[..., 0] - pairs[..., 1] * table[..., 1],
            pairs[..., 1] * table[..., 0] + pairs[..., 0] * table[..., 1],
        ],
        dim=-1,
    )
    return turned.flatten(3).type_as(x)


class Attention(nn.Module):
    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.n_head, self.n_kv, self.head_dim = config.n_head, config.kv_heads, config.head_dim
        self.wqkv = nn.Linear(config.dim, config.dim + 2 * self.n_kv * self.head_dim, bias=False)
        self.wo = nn.Linear(config.dim, config.dim, bias=False)
        self.qk_norm = config.qk_norm
        if config.qk_norm:
            self.q_norm, self.k_norm = (Norm(self.head_dim, config.norm_eps) for _ in range(2))
        self.dropout = nn.Dropout(config.resid_dropout_p)

    def forward(self, x: Tensor, table: Tensor, mask: Tensor | None) -> Tensor:
        batch, length, dim = x.shape
        q, k, v = self.wqkv(x).split([dim, self.n_kv * self.head_dim, self.n_kv * self.head_dim], dim=-1)
        q = q.view(batch, length, self.n_head, self.head_dim)
        k = k.view(batch, length, self.n_kv, self.head_dim)
        if self.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = rotate(q, table), rotate(k, table)
        v = v.view(batch, length, self.n_kv, self.head_dim)
        q, k, v = (part.transpose(1, 2) for part in (q, k, v))
        k, v = (part.repeat_interleave(self.n_head // self.n_kv, dim=1) for part in (k, v))
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None)
        return self.dropout(self.wo(out.transpose(1, 2).contiguous().view(batch, length, dim)))


class FeedForward(nn.Module):
    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.w1 = nn.Linear(config.dim, config.ffn_dim, bias=False)
        self.w3 = nn.Linear(config.dim, config.ffn_dim, bias=False)
        self.w2 = nn.Linear(config.ffn_dim, config.dim, bias=False)
        self.dropout = nn.Dropout(config.ffn_dropout_p)

    def forward(self, x: Tensor) -> Tensor:
        return self.dropout(self.w2(F.silu(self.w1(x)) * self.w3(x)))


class Block(nn.Module):
    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.attention, self.feed_forward = Attention(config), FeedForward(config)
        self.attention_norm, self.ffn_norm = Norm(config.dim, config.norm_eps), Norm(config.dim, config.norm_eps)

    def forward(self, x: Tensor, table: Tensor, mask: Tensor | None) -> Tensor:
        x = x + self.attention(self.attention_norm(x), table, mask)
        return x + self.feed_forward(self.ffn_norm(x))


class ClassPrefix(nn.Module):
    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.embedding_table = nn.Embedding(config.num_classes + 1, config.dim)

    def forward(self, labels: Tensor) -> Tensor:
        return self.embedding_table(labels).unsqueeze(1)


class Projection(nn.Module):
    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.fc1 = nn.Linear(config.caption_dim, config.dim, bias=False)
        self.fc2 = nn.Linear(config.dim, config.dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class CaptionPrefix(nn.Module):
    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.cap_proj = Projection(config)
        self.register_buffer("uncond_embedding", torch.zeros(config.prefix, config.caption_dim))

    def forward(self, features: Tensor) -> Tensor:
        return self.cap_proj(features)


class PlainGPT(nn.Module):
    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.cls_embedding = ClassPrefix(config) if config.condition == "class" else CaptionPrefix(config)
        self.tok_embeddings = nn.Embedding(config.vocab_size, config.dim)
        self.dropout = nn.Dropout(config.token_dropout_p)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.norm = Norm(config.dim, config.norm_eps)
        self.output = nn.Linear(config.dim, config.vocab_size, bias=False)
        self.table, self.z_loss = rotary_table(config), config.z_loss

    def forward(self, tokens: Tensor, condition: Condition) -> Tensor:
        """Logits (B, N, V) in fp32."""
        features, present = condition if isinstance(condition, tuple) else (condition, None)
        prefix = self.cls_embedding(features)
        x = self.dropout(torch.cat([prefix, self.tok_embeddings(tokens[:, :-1])], dim=1))
        mask = None if present is None else padding_mask(present, tokens.shape[1] - 1)
        for layer in self.layers:
            x = layer(x, self.table[: x.shape[1]], mask)
        return self.output(self.norm(x)).float()[:, prefix.shape[1] - 1 :]

    def loss(self, tokens: Tensor, condition: Condition) -> Tensor:
        logits = self(tokens, condition)
        loss = F.cross_entropy(logits.reshape(-1, logits.shape[-1]), tokens.flatten())
        if self.z_loss:
            loss = loss + self.z_loss * logits.logsumexp(-1).square().mean()
        return loss


def padding_mask(present: Tensor, tokens: int) -> Tensor:
    """(B, 1, S, S) bool, S = T + tokens: causal, padded caption columns hidden, the diagonal always visible."""
    length = present.shape[1] + tokens
    columns = F.pad(present, (0, tokens), value=True)
    causal = torch.ones(length, length, dtype=torch.bool).tril()
    return ((causal & columns[:, None, :]) | torch.eye(length, dtype=torch.bool)).unsqueeze(1)


def whole_gpt(config: GPTConfig, seed: int) -> GPT:
    """The real model with all its weights, where the programs build it on the meta device and piece by piece."""
    model = GPT(config).initialize(seed)
    model.dropout_seed = seed
    return model
