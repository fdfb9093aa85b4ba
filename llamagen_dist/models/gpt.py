"""LlamaGen's Llama: image tokens in raster order after a class or caption prefix (paper section 2.3).

Plain torch that knows nothing of ranks: tensor parallelism replaces layers from outside (parallel/tensor_parallel.py)
and head counts are read off the activations. Parameter names are those of the released weights. Three properties
that those weights depend on and that look like mistakes:

* prefix positions are rotated by cos = sin = 0, so their queries and keys are zero and every image token attends to
  the prefix with logit 0;
* the rotary pairs are interleaved (2p, 2p+1); the first half of a head turns with the row, the second with the column;
* the null caption (``uncond_embedding``) is a buffer that was never trained; the null class is row ``num_classes``.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llamagen_dist import prng
from llamagen_dist.models.cache import Cache, LayerCache
from llamagen_dist.models.gpt_config import GPTConfig

Caption = tuple[Tensor, Tensor]
Condition = Tensor | Caption


@dataclass
class Randomness:
    """The dropout of one forward pass: masks are hashed from (seed, global sample, site, element).

    No generator is involved, so the same samples get the same masks on any layout. keys: int32 (B,).
    """

    keys: Tensor
    site: int = 0

    def bits(self, x: Tensor, per_sample: bool = False) -> Tensor:
        """Non-negative int32 of x's shape (or (B, 1, 1)); each call is a new site."""
        self.site += 1
        keys = prng.mix(self.keys ^ (self.site * 0x632BE5AB & 0x7FFFFFFF)).view(-1, 1)
        count = 1 if per_sample else x[0].numel()
        raw = prng.mix(prng.mix(torch.arange(count, dtype=torch.int32, device=x.device)) ^ keys) & 0x7FFFFFFF
        return raw.view(-1, 1, 1) if per_sample else raw.view(x.shape)

    def dropout(self, x: Tensor, p: float) -> Tensor:
        if p == 0:
            return x
        return torch.where(self.bits(x) >= int(p * 2**31), x * (1 / (1 - p)), 0.0)

    def drop_path(self, x: Tensor, p: float) -> Tensor:
        if p == 0:
            return x
        return torch.where(self.bits(x, per_sample=True) >= int(p * 2**31), x * (1 / (1 - p)), 0.0)


class RMSNorm(nn.Module):
    """Normalises in fp32, casts back, then scales."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        return (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)).type_as(x) * self.weight


class ClassEmbedder(nn.Module):
    """labels (B,) int64, ``num_classes`` being the null class -> (B, 1, dim)."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.embedding_table = nn.Embedding(config.num_classes + 1, config.dim)

    def forward(self, labels: Tensor) -> Tensor:
        return self.embedding_table(labels).unsqueeze(1)


class CaptionProjection(nn.Module):
    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.fc1 = nn.Linear(config.caption_dim, config.dim, bias=False)
        self.fc2 = nn.Linear(config.dim, config.dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class CaptionEmbedder(nn.Module):
    """Text-encoder features (B, T, caption_dim) -> (B, T, dim)."""

    uncond_embedding: Tensor

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.cap_proj = CaptionProjection(config)
        null = torch.randn(config.prefix, config.caption_dim) / config.caption_dim**0.5
        self.register_buffer("uncond_embedding", null)

    def forward(self, features: Tensor) -> Tensor:
        return self.cap_proj(features)


def rotary_table(config: GPTConfig) -> Tensor:
    """(prefix + image_tokens, head_dim / 2, 2) fp32: cos and sin; the prefix rows are zero (see the module's text)."""
    side, half = math.isqrt(config.image_tokens), config.head_dim // 2
    theta = 1.0 / config.rope_base ** (torch.arange(0, half, 2)[: half // 2].float() / half)
    along = torch.outer(torch.arange(side).float(), theta)
    rows = along[:, None, :].expand(side, side, -1)
    columns = along[None, :, :].expand(side, side, -1)
    angles = torch.cat([rows, columns], dim=-1).flatten(0, 1)
    image = torch.stack([angles.cos(), angles.sin()], dim=-1)
    return torch.cat([torch.zeros(config.prefix, half, 2), image])


def rotate(x: Tensor, table: Tensor) -> Tensor:
    """x: (B, S, heads, head_dim); table: (S, head_dim / 2, 2). Interleaved pairs, in fp32, cast back."""
    pairs = x.float().unflatten(-1, (-1, 2))
    cos, sin = table[:, None, :, 0], table[:, None, :, 1]
    even, odd = pairs.unbind(-1)
    return torch.stack([even * cos - odd * sin, odd * cos + even * sin], dim=-1).flatten(-2).type_as(x)


class Attention(nn.Module):
    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        self.wqkv = nn.Linear(config.dim, 3 * config.dim, bias=False)
        self.wo = nn.Linear(config.dim, config.dim, bias=False)

    def forward(self, x: Tensor, table: Tensor, mask: Tensor | None, past: LayerCache | None = None) -> Tensor:
        q, k, v = (part.unflatten(-1, (-1, self.head_dim)) for part in self.wqkv(x).chunk(3, dim=-1))
        q, k = rotate(q, table), rotate(k, table)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        if past is not None:
            k, v = past.extend(k, v)
        causal = mask is None and q.shape[2] == k.shape[2]  # a single new position sees everything that is cached
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal)
        return self.wo(out.transpose(1, 2).flatten(2))


class FeedForward(nn.Module):
    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.w1 = nn.Linear(config.dim, config.ffn_dim, bias=False)
        self.w3 = nn.Linear(config.dim, config.ffn_dim, bias=False)
        self.w2 = nn.Linear(config.ffn_dim, config.dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


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
        attended = self.attention(self.attention_norm(x), table, mask, past)
        if random is not None:
            attended = random.drop_path(random.dropout(attended, self.resid_dropout_p), self.drop_path_p)
        x = x + attended
        fed = self.feed_forward(self.ffn_norm(x))
        if random is not None:
            fed = random.drop_path(random.dropout(fed, self.ffn_dropout_p), self.drop_path_p)
        return x + fed


def _token_nll(logits: Tensor, tokens: Tensor) -> Tensor:
    """(B, N, V), (B, N) -> (B, N) nats in fp32."""
    return F.cross_entropy(logits.float().flatten(0, 1), tokens.flatten(), reduction="none").view(tokens.shape)


class GPT(nn.Module):
    """``model(tokens, condition) -> logits``; ``model.loss(tokens, condition) -> nats per token``.

    token_nll and gather_vocabulary are seams for tensor parallelism, where the head yields this rank's slice of the
    vocabulary: the first computes the loss from slices, the second makes the logits whole.
    """

    rotary: Tensor

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.config = config
        self.dropout_seed = 0
        self.cls_embedding = ClassEmbedder(config) if config.condition == "class" else CaptionEmbedder(config)
        self.tok_embeddings = nn.Embedding(config.vocab_size, config.dim)
        rates = [config.drop_path_rate * i / max(config.n_layer - 1, 1) for i in range(config.n_layer)]
        self.layers = nn.ModuleList(Block(config, rate) for rate in rates)
        self.norm = RMSNorm(config.dim, config.norm_eps)
        self.output = nn.Linear(config.dim, config.vocab_size, bias=False)
        self.register_buffer("rotary", rotary_table(config), persistent=False)
        self.token_nll: Callable[[Tensor, Tensor], Tensor] = _token_nll
        self.gather_vocabulary: Callable[[Tensor], Tensor] = lambda logits: logits

    def initialize(self, seed: int) -> "GPT":
        """LlamaGen's initial weights: N(0, 0.02) for matrices, zero for the head, one for norms; by (seed, name)."""
        with torch.no_grad():
            for name, p in self.named_parameters():
                if name == "output.weight":
                    p.zero_()
                elif p.dim() < 2:
                    p.fill_(1.0)
                else:
                    generator = torch.Generator(device="cpu")
                    generator.manual_seed(int(prng.bits(seed, f"initial weights {name}", 0).item()))
                    p.copy_(torch.randn(p.shape, generator=generator) * self.config.initializer_range)
        return self

    @property
    def dropout_active(self) -> bool:
        c = self.config
        return self.training and max(c.token_dropout_p, c.resid_dropout_p, c.ffn_dropout_p, c.drop_path_rate) > 0

    def _hidden(self, tokens: Tensor, condition: Condition, sample_ids: Tensor | None) -> Tensor:
        """(B, N, dim): the state at the N positions that predict tokens[:, 0 … N-1]."""
        random = None
        if self.dropout_active:
            if sample_ids is None:
                raise ValueError("dropout needs sample_ids: its masks are a function of the global sample numbers")
            random = Randomness(prng.stream(self.dropout_seed, "dropout", sample_ids))
        prefix, mask = self._prefix(condition, tokens.shape[1])
        x = torch.cat([prefix, self.tok_embeddings(tokens[:, :-1])], dim=1)
        if random is not None:
            x = random.dropout(x, self.config.token_dropout_p)
        table = self.rotary[: x.shape[1]]
        for layer in self.layers:
            x = layer(x, table, mask, random)
        return self.norm(x[:, prefix.shape[1] - 1 :])

    def _prefix(self, condition: Condition, n: int) -> tuple[Tensor, Tensor | None]:
        """The embedded condition (B, T, dim), and the mask for it and n - 1 image tokens; None: plainly causal."""
        if isinstance(condition, tuple):
            features, present = condition
            return self.cls_embedding(features), self._caption_mask(present, n)
        return self.cls_embedding(condition), None

    def _caption_mask(self, present: Tensor, n: int) -> Tensor:
        """(B, 1, S, S) bool, S = T + n - 1: causal, padded caption columns hidden, the diagonal always visible."""
        length = present.shape[1] + n - 1
        columns = F.pad(present, (0, n - 1), value=True)
        causal = torch.ones(length, length, dtype=torch.bool, device=present.device).tril()
        diagonal = torch.eye(length, dtype=torch.bool, device=present.device)
        return ((causal & columns[:, None, :]) | diagonal).unsqueeze(1)

    def forward(self, tokens: Tensor, condition: Condition, sample_ids: Tensor | None = None) -> Tensor:
        """Logits (B, N, V); logits[:, t] predicts tokens[:, t] from the condition and tokens[:, :t].

        tokens: (B, N) int64. condition: labels (B,) int64 (``num_classes`` = null), or (features (B, T, C)
        left-padded, mask (B, T) bool). sample_ids: (B,) int64 global sample numbers, needed when dropout is active.
        """
        return self.gather_vocabulary(self.output(self._hidden(tokens, condition, sample_ids)))

    def loss(
        self,
        tokens: Tensor,
        condition: Condition,
        sample_ids: Tensor | None = None,
        weights: Tensor | None = None,
    ) -> Tensor:
        """Mean nats per token (0-d fp32); in eval mode the validation loss. weights: (B,), 0 leaves a sample out."""
        nll = self.token_nll(self.output(self._hidden(tokens, condition, sample_ids)), tokens)
        if weights is None:
            return nll.mean()
        per_token = weights.to(nll.dtype)[:, None].expand_as(nll)
        return (nll * per_token).sum() / per_token.sum().clamp(min=1.0)

    def null_condition(self, condition: Condition) -> Condition:
        """The null class, or the null caption (with the caption's padding, as LlamaGen does), for each sample."""
        if isinstance(condition, tuple):
            features, present = condition
            null: Tensor = self.cls_embedding.uncond_embedding  # type: ignore[assignment]
            return null.to(features.dtype).expand_as(features), present
        return torch.full_like(condition, self.config.num_classes)

    def prefill(self, condition: Condition) -> tuple[Tensor, Cache]:
        """Logits (B, V) of the first image token, and the cache that ``decode`` goes on with. Never any dropout."""
        present = condition[1] if isinstance(condition, tuple) else None
        prefix, mask = self._prefix(condition, 1)
        cache = Cache(len(self.layers), prefix.shape[1] + self.config.image_tokens - 1, present)
        return self._advance(prefix, mask, cache), cache

    def decode(self, tokens: Tensor, cache: Cache) -> Tensor:
        """Logits (B, V) of the next image token; tokens (B,) int64 are the ones before it, which enter the cache."""
        return self._advance(self.tok_embeddings(tokens).unsqueeze(1), cache.mask(), cache)

    def _advance(self, x: Tensor, mask: Tensor | None, cache: Cache) -> Tensor:
        table = self.rotary[cache.filled : cache.filled + x.shape[1]]
        for layer, past in zip(self.layers, cache.layers, strict=True):
            x = layer(x, table, mask, None, past)
        return self.gather_vocabulary(self.output(self.norm(x[:, -1:])))[:, 0]
