"""LlamaGen's GPT in plain torch and one file: image tokens in raster order after a class or caption prefix.

Written for reading and for drawing pictures, not for training. Three things that the weights depend on and that look
like mistakes: with ``prefix_rotation: zero`` prefix positions are rotated by cos = sin = 0, so that every image token
attends to the prefix with logit 0; the rotary pairs are interleaved, and the first half of a head turns with the row,
the second with the column; the null class is row ``num_classes`` of the table, and the null caption was never trained.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class RMSNorm(nn.Module):
    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.eps, self.weight = eps, nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        return (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)).type_as(x) * self.weight


def rotary_table(config: Any) -> Tensor:
    """(prefix + image tokens, 1, head dimension / 2, 2) fp32: cos and sin."""
    side, half = math.isqrt(config.image_tokens), config.dim // config.n_head // 2
    theta = 1.0 / config.rope_base ** (torch.arange(0, half, 2)[: half // 2].float() / half)
    along = torch.outer(torch.arange(side).float(), theta)
    rows, columns = along[:, None, :].expand(side, side, -1), along[None, :, :].expand(side, side, -1)
    angles = torch.cat([rows, columns], dim=-1).flatten(0, 1)
    prefix = torch.zeros(config.prefix_tokens, half, 2)
    if config.prefix_rotation == "identity":
        prefix[..., 0] = 1.0
    return torch.cat([prefix, torch.stack([angles.cos(), angles.sin()], dim=-1)]).unsqueeze(1)


def rotate(x: Tensor, table: Tensor) -> Tensor:
    """x (B, S, heads, head dimension), its neighbouring pairs turned by their position's angles."""
    even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = table.unbind(-1)
    return torch.stack([even * cos - odd * sin, odd * cos + even * sin], dim=-1).flatten(-2).type_as(x)


class Attention(nn.Module):
    def __init__(self, config: Any) -> None:
        super().__init__()
        self.n_head, self.n_kv, self.head_dim = config.n_head, config.n_kv_head, config.dim // config.n_head
        self.wqkv = nn.Linear(config.dim, (self.n_head + 2 * self.n_kv) * self.head_dim, bias=False)
        self.wo = nn.Linear(config.dim, config.dim, bias=False)
        if config.qk_norm:
            self.q_norm, self.k_norm = (RMSNorm(self.head_dim, config.norm_eps) for _ in range(2))
        self.qk_norm = config.qk_norm

    def forward(self, x: Tensor, table: Tensor, mask: Tensor | None) -> Tensor:
        heads = self.wqkv(x).unflatten(-1, (-1, self.head_dim))
        q, k, v = heads.split([self.n_head, self.n_kv, self.n_kv], dim=2)
        if self.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k, v = (part.transpose(1, 2) for part in (rotate(q, table), rotate(k, table), v))
        k, v = (part.repeat_interleave(self.n_head // self.n_kv, dim=1) for part in (k, v))
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None)
        return self.wo(out.transpose(1, 2).flatten(2))


class FeedForward(nn.Module):
    def __init__(self, config: Any) -> None:
        super().__init__()
        self.w1 = nn.Linear(config.dim, config.ffn_dim, bias=False)
        self.w3 = nn.Linear(config.dim, config.ffn_dim, bias=False)
        self.w2 = nn.Linear(config.ffn_dim, config.dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class Block(nn.Module):
    def __init__(self, config: Any) -> None:
        super().__init__()
        self.attention, self.feed_forward = Attention(config), FeedForward(config)
        self.attention_norm, self.ffn_norm = (RMSNorm(config.dim, config.norm_eps) for _ in range(2))

    def forward(self, x: Tensor, table: Tensor, mask: Tensor | None) -> Tensor:
        x = x + self.attention(self.attention_norm(x), table, mask)
        return x + self.feed_forward(self.ffn_norm(x))


class ClassEmbedder(nn.Module):
    def __init__(self, config: Any) -> None:
        super().__init__()
        self.embedding_table = nn.Embedding(config.num_classes + 1, config.dim)

    def forward(self, labels: Tensor) -> Tensor:
        return self.embedding_table(labels).unsqueeze(1)


class CaptionProjection(nn.Module):
    def __init__(self, config: Any) -> None:
        super().__init__()
        self.fc1 = nn.Linear(config.caption_dim, config.dim, bias=False)
        self.fc2 = nn.Linear(config.dim, config.dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class CaptionEmbedder(nn.Module):
    uncond_embedding: Tensor

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.cap_proj = CaptionProjection(config)
        self.register_buffer("uncond_embedding", torch.zeros(config.prefix_tokens, config.caption_dim))

    def forward(self, features: Tensor) -> Tensor:
        return self.cap_proj(features.to(self.cap_proj.fc1.weight.dtype))


class GPT(nn.Module):
    """config: the object ``model`` of config.json, by attributes."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config = config
        self.cls_embedding = ClassEmbedder(config) if config.condition == "class" else CaptionEmbedder(config)
        self.tok_embeddings = nn.Embedding(config.vocab_size, config.dim)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.norm = RMSNorm(config.dim, config.norm_eps)
        self.output = nn.Linear(config.dim, config.vocab_size, bias=False)

    def forward(self, tokens: Tensor, condition: Any) -> Tensor:
        """Logits (B, N, V); logits[:, t] predicts tokens[:, t] from the condition and tokens[:, :t].

        tokens: (B, N) int64, N at most ``image_tokens``.
        condition: labels (B,) int64, or (features (B, T, C), left-padded, mask (B, T) bool: True for a caption token).
        """
        features, present = condition if isinstance(condition, tuple) else (condition, None)
        prefix = self.cls_embedding(features)
        x = torch.cat([prefix, self.tok_embeddings(tokens[:, :-1])], dim=1)
        length, mask = x.shape[1], None
        table = rotary_table(self.config).to(x.device)[:length]
        if present is not None:  # nothing sees the padding; every position sees itself, so that no row is empty
            # the last prefix position predicts the first token, so it is there even if the caption is empty
            columns = F.pad(present[:, :-1], (0, 1 + length - present.shape[1]), value=True)
            causal = torch.ones(length, length, dtype=torch.bool, device=x.device).tril()
            mask = ((causal & columns[:, None, :]) | torch.eye(length, dtype=torch.bool, device=x.device)).unsqueeze(1)
        for layer in self.layers:
            x = layer(x, table, mask)
        return self.output(self.norm(x[:, prefix.shape[1] - 1 :]))

    def null(self, condition: Any) -> Any:
        """The condition of the unguided half: the null class, or the null caption."""
        if isinstance(condition, tuple):
            null: Any = self.cls_embedding.uncond_embedding
            return null.to(condition[0].dtype).expand_as(condition[0]), condition[1]
        return torch.full_like(condition, self.config.num_classes)

    @torch.no_grad()
    def generate(
        self, condition: Any, cfg_scale: float = 1.0, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0
    ) -> Tensor:
        """Draw (B, image_tokens) int64 from torch's global generator, without a cache.

        cfg_scale: guided = null + cfg_scale x (conditional - null), above 1.
        temperature: 0 takes the likeliest code.
        top_k, top_p: 0 and 1 keep all codes.
        """
        features = condition[0] if isinstance(condition, tuple) else condition
        tokens = torch.zeros(len(features), 1, dtype=torch.int64, device=features.device)  # a last column to predict
        for _ in range(self.config.image_tokens):
            logits = self(tokens, condition)[:, -1].float()
            if cfg_scale > 1:
                null = self(tokens, self.null(condition))[:, -1].float()
                logits = null + cfg_scale * (logits - null)
            if temperature == 0:
                drawn = logits.argmax(-1, keepdim=True)
            else:
                drawn = torch.multinomial(kept(logits / temperature, top_k, top_p).softmax(-1), 1)
            tokens = torch.cat([tokens[:, :-1], drawn, torch.zeros_like(drawn)], dim=1)
        return tokens[:, :-1]


def kept(logits: Tensor, top_k: int, top_p: float) -> Tensor:
    """(B, V) with -inf where a code is ruled out; the code at which the probability exceeds top_p stays."""
    if top_k > 0:
        least = logits.topk(min(top_k, logits.shape[-1]), dim=-1).values[..., -1:]
        logits = logits.masked_fill(logits < least, -torch.inf)
    if top_p < 1.0:
        ordered, codes = logits.sort(dim=-1, descending=True)
        before = ordered.softmax(-1).cumsum(-1) - ordered.softmax(-1)
        logits = logits.masked_fill((before > top_p).scatter(-1, codes, before > top_p), -torch.inf)
    return logits
