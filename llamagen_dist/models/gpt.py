"""LlamaGen's Llama: image tokens in raster order after a class or caption prefix (paper section 2.3).

Plain torch that knows nothing of ranks: tensor parallelism replaces layers from outside (parallel/tensor_parallel.py)
and head counts are read off the activations. Parameter names are those of the released weights. Three properties
that those weights depend on and that look like mistakes:

* prefix positions are rotated by cos = sin = 0, so their queries and keys are zero and every image token attends to
  the prefix with logit 0;
* the rotary pairs are interleaved (2p, 2p+1); the first half of a head turns with the row, the second with the column;
* the null caption (``uncond_embedding``) is a buffer that was never trained; the null class is row ``num_classes``.

Captions come left-padded. Here the padding is moved behind the image (``sequence_order``): plainly causal attention
then never sees it, and no mask exists.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from llamagen_dist import prng
from llamagen_dist.models.block import Block
from llamagen_dist.models.cache import Cache
from llamagen_dist.models.condition import Caption, CaptionEmbedder, ClassEmbedder, Condition
from llamagen_dist.models.dropout import Randomness
from llamagen_dist.models.initial import initial_weight, null_caption
from llamagen_dist.models.layers import Embedding, Linear, RMSNorm
from llamagen_dist.models.loss import TokenNLL, token_nll, weighted_nll
from llamagen_dist.models.rotary import rotary_table
from llamagen_dist.models.sizes import GPTConfig

__all__ = ["GPT", "Caption", "Condition", "GPTConfig", "Randomness", "initial_weight", "rotary_table"]


class GPT(nn.Module):
    """``model(tokens, condition) -> logits``; ``model.loss(tokens, condition) -> nats per token``.

    Weights are zero until ``initialize`` or ``load_state_dict``. token_nll and gather_vocabulary are seams for tensor
    parallelism, where the head yields this rank's slice of the vocabulary: the first computes the loss from slices,
    the second makes the logits whole. recompute_every: 0 keeps all activations for the backward pass; k recomputes
    blocks 0, k, 2k, … there from their inputs, with the same numbers.
    """

    rotary: Tensor

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.config = config
        self.dropout_seed = 0
        self.recompute_every = 0
        self.cls_embedding = ClassEmbedder(config) if config.condition == "class" else CaptionEmbedder(config)
        self.tok_embeddings = Embedding(config.vocab_size, config.dim)
        rates = [config.drop_path_rate * i / max(config.n_layer - 1, 1) for i in range(config.n_layer)]
        self.layers = nn.ModuleList(Block(config, rate) for rate in rates)
        self.norm = RMSNorm(config.dim, config.norm_eps)
        self.output = Linear(config.dim, config.vocab_size)
        self.register_buffer("rotary", rotary_table(config), persistent=False)
        self.token_nll: TokenNLL = token_nll
        self.gather_vocabulary: Callable[[Tensor], Tensor] = lambda logits: logits

    def _apply(self, fn: Any, recurse: bool = True) -> "GPT":
        """``to``, ``bfloat16`` and the like: the rotary table stays in fp32, as in all of LlamaGen's programs."""
        exact = self.rotary
        super()._apply(fn, recurse)
        if self.rotary.dtype != exact.dtype:
            self.rotary = exact.to(self.rotary.device)
        return self

    def initialize(self, seed: int) -> "GPT":
        """LlamaGen's initial weights and null caption, by (seed, name): see models/initial.py."""
        self.make_buffers(seed)
        with torch.no_grad():
            for name, p in self.named_parameters():
                p.copy_(initial_weight(self.config, seed, name, tuple(p.shape)))
        return self

    def make_buffers(self, seed: int) -> None:
        """The rotary table and, for captions, LlamaGen's null caption, anew on the CPU (after a construction on meta,
        or for another seed) or, if the model's weights are elsewhere, there."""
        where = self.norm.weight.device if not self.norm.weight.is_meta else torch.device("cpu")
        with torch.device("cpu"):
            self.rotary = rotary_table(self.config).to(where)
            if isinstance(self.cls_embedding, CaptionEmbedder):
                dtype = self.cls_embedding.uncond_embedding.dtype
                self.cls_embedding.uncond_embedding = null_caption(self.config, seed).to(where, dtype)

    def compile_blocks(self) -> None:
        """torch.compile every block in place; they share one piece of code, and names stay."""
        for layer in self.layers:
            layer.compile()

    @property
    def dropout_active(self) -> bool:
        c = self.config
        rates = (c.token_dropout_p, c.resid_dropout_p, c.ffn_dropout_p, c.attn_dropout_p, c.drop_path_rate)
        return self.training and max(rates) > 0

    def _hidden(self, tokens: Tensor, condition: Condition, sample_ids: Tensor | None) -> Tensor:
        """(B, N, dim): the state at the N positions that predict tokens[:, 0 … N-1]."""
        random = None
        if self.dropout_active:
            if sample_ids is None:
                raise ValueError("dropout needs sample_ids: its masks are a function of the global sample numbers")
            random = Randomness(prng.stream(self.dropout_seed, "dropout", sample_ids))
        n = tokens.shape[1]
        prefix, present = self._prefix(condition)
        x = torch.cat([prefix, self.tok_embeddings(tokens[:, :-1])], dim=1)
        table = self.rotary[: x.shape[1]]
        if present is not None:
            order = sequence_order(present, n - 1)
            x, table = rows_of(x, order), table[order]
        if random is not None:
            x = random.dropout(x, self.config.token_dropout_p, 0)
        blocks: Any = self.layers  # to mypy a ModuleList holds modules of no particular kind
        for number, layer in enumerate(blocks):
            own = random.layer(number) if random is not None else None
            again = bool(self.recompute_every) and number % self.recompute_every == 0 and torch.is_grad_enabled()
            layer.feed_forward.rederive = not again  # within a recomputed block it would keep what checkpoint drops
            if again:
                x = checkpoint(layer, x, table, None, own, use_reentrant=False, preserve_rng_state=False)
            else:
                x = layer(x, table, None, own)
        if present is None:
            return self.norm(x[:, prefix.shape[1] - 1 :])
        return self.norm(rows_of(x, present.sum(dim=1, keepdim=True) - 1 + torch.arange(n, device=x.device)))

    def _prefix(self, condition: Condition) -> tuple[Tensor, Tensor | None]:
        """The embedded condition (B, T, dim), and which of its positions hold something; None: all."""
        if not isinstance(condition, tuple):
            return self.cls_embedding(condition), None
        features, present = condition
        # the last position predicts the first token, so it is there even if the caption is empty
        return self.cls_embedding(features), F.pad(present[:, :-1], (0, 1), value=True)

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
        logits = self.output(self._hidden(tokens, condition, sample_ids)).flatten(0, 1)
        each = torch.ones_like(tokens, dtype=torch.float32)
        if weights is not None:
            each = each * weights[:, None]
        each = each / each.sum().clamp(min=1.0)
        return weighted_nll(logits, tokens.flatten(), each.flatten(), self.token_nll)

    def null_condition(self, condition: Condition) -> Condition:
        """The null class, or the null caption (with the caption's padding, as LlamaGen does), for each sample."""
        if isinstance(condition, tuple):
            features, present = condition
            null: Tensor = self.cls_embedding.uncond_embedding  # type: ignore[assignment]
            return null.to(features.dtype).expand_as(features), present
        return torch.full_like(condition, self.config.num_classes)

    def prefill(self, condition: Condition) -> tuple[Tensor, Cache]:
        """Logits (B, V) of the first image token, and the cache that ``decode`` goes on with. Never any dropout."""
        x, present = self._prefix(condition)
        table, last = self.rotary[: x.shape[1]], x.new_full((len(x), 1), x.shape[1] - 1, dtype=torch.int64)
        fold = self.config.prefix_rotation == "zero"
        if present is not None:
            order = sequence_order(present, 0)
            x, table, present = rows_of(x, order), table[order], present.gather(1, order)
            last = present.sum(dim=1, keepdim=True) - 1
        cache = Cache(len(self.layers), x.shape[1], self.config.image_tokens - 1, present, fold)
        return self._advance(x, table, last, None, cache), cache

    def decode(self, tokens: Tensor, cache: Cache) -> Tensor:
        """Logits (B, V) of the next image token; tokens (B,) int64 are the ones before it, which enter the cache."""
        x = self.tok_embeddings(tokens).unsqueeze(1)
        table = self.rotary[cache.position : cache.position + 1]
        return self._advance(x, table, torch.zeros_like(tokens)[:, None], cache.mask(), cache)

    def _advance(self, x: Tensor, table: Tensor, last: Tensor, mask: Tensor | None, cache: Cache) -> Tensor:
        for layer, past in zip(self.layers, cache.layers, strict=True):
            x = layer(x, table, mask, None, past)
        return self.gather_vocabulary(self.output(self.norm(rows_of(x, last))))[:, 0]


def sequence_order(present: Tensor, tokens: int) -> Tensor:
    """(B, T + tokens) int64: the caption's tokens, then the image's, then the caption's padding, each in its order."""
    return F.pad(2 - 2 * present.to(torch.int8), (0, tokens), value=1).argsort(dim=1, stable=True)


def rows_of(x: Tensor, places: Tensor) -> Tensor:
    """x (B, S, d), places (B, n) int64 -> (B, n, d), the rows at these positions of each sample."""
    first = torch.arange(len(x), device=x.device)[:, None] * x.shape[1]
    return x.flatten(0, 1).index_select(0, (first + places).flatten()).unflatten(0, places.shape)
