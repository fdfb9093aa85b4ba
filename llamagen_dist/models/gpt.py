"""LlamaGen's Llama: image tokens in raster order after a class or caption prefix (paper section 2.3).

It reads from the parts to the whole: attention, feed-forward network, block, GPT.
Plain torch that knows nothing of ranks: tensor parallelism replaces layers from outside (parallel/tensor_parallel.py),
by the names of the attributes here, and head counts are read off the activations, since a tensor-parallel rank has its
own share of the heads. Parameter names are those of the released weights. Three properties that those weights depend
on and that look like mistakes:

* prefix positions are rotated by cos = sin = 0, so their queries and keys are zero and every image token attends to
  the prefix with logit 0;
* the rotary pairs are interleaved (2p, 2p+1); the first half of a head turns with the row, the second with the column;
* the null caption (``uncond_embedding``) is a buffer that was never trained; the null class is row ``num_classes``.

Captions come left-padded. Here the padding is moved behind the image (``sequence_order``): plainly causal attention
then never sees it, and no mask exists.

What a block keeps for the backward pass, for B samples of S positions (eager; tests/unit/test_gpt_training.py counts):

* in the computing type: x, its norm, q, k, v, attention's output, x after attention, its norm, w1's and w3's outputs
  (their gated product is computed again): B S (6 dim + 2 kv_dim + 2 ffn_dim) numbers. A tensor-parallel rank has
  1 / tp of q, k, v, attention's output and the two of the feed-forward network (with sequence parallelism of the two x
  as well);
* in fp32: B S (2 + n_head) numbers (of norms and of attention's softmax);
* the dropout masks: 1 byte for every element of the two outputs, B S dim each, where its probability is above 0.

A recomputed block keeps x only: B S dim. With attn_dropout_p > 0 attention keeps B n_head S^2 probabilities more. With
QK-norm a block keeps the rotated q and k beside what they were: B S (dim + kv_dim) numbers more, and B S (n_head +
kv_heads) in fp32.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from llamagen_dist import prng
from llamagen_dist.models import ops
from llamagen_dist.models.cache import Cache, LayerCache, attend_in_fp32
from llamagen_dist.models.condition import CaptionEmbedder, ClassEmbedder, Condition
from llamagen_dist.models.dropout import Randomness, threshold
from llamagen_dist.models.guidance_free import BetaEmbedding, mixed
from llamagen_dist.models.initial import initial_weight, null_caption
from llamagen_dist.models.layers import Embedding, Linear, RMSNorm
from llamagen_dist.models.loss import LogPartition, TokenNLL, ZLoss, token_nll, weighted_nll, weighted_nll_and_z
from llamagen_dist.models.positions import angles_of, own_angles, rotary_table, rows_of, sequence_order
from llamagen_dist.models.sizes import GPTConfig
from llamagen_dist.models.target_positions import TargetPositions

# The dropout sites of one layer: outputs of attention and feed-forward network, the attention probabilities, and the
# two paths. Numbers, because the masks of every run made so far are functions of them.
ATTENTION_SITE, FFN_SITE, PROBABILITIES_SITE, ATTENTION_PATH_SITE, FFN_PATH_SITE = 0, 1, 2, 3, 4


# --- attention ---


class Attention(nn.Module):
    """Attention over a fused [q | k | v] projection, with fewer key and value heads where the config says so.

    first_head: the number, in the whole model, of the first head that this rank computes; dropout masks depend on it.
    """

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        self.group = config.n_head // config.kv_heads
        self.dropout_p = config.attn_dropout_p
        self.first_head = 0
        self.wqkv = Linear(config.dim, config.dim + 2 * config.kv_dim)
        self.wo = Linear(config.dim, config.dim)
        # None, not an empty module: a model without them has the names and the order of the released weights
        self.q_norm = RMSNorm(config.head_dim, config.norm_eps) if config.qk_norm else None
        self.k_norm = RMSNorm(config.head_dim, config.norm_eps) if config.qk_norm else None

    def forward(
        self,
        x: Tensor,
        table: Tensor,
        mask: Tensor | None,
        random: Randomness | None = None,
        past: LayerCache | None = None,
    ) -> Tensor:
        """x (B, S, dim) -> the same shape.

        table: rotary, (S, head_dim / 2, 2) or (B, S, …).
        mask: what SDPA takes; None: every position sees itself and what is before it, and a single one all that is
            cached.
        random: this layer's dropout, in training.
        past: keys and values of the positions before, which grow by these.
        """
        norms = None  # their weights are used in the operation that also rotates; the modules themselves never run
        if self.q_norm is not None and self.k_norm is not None:
            norms = ops.HeadNorms(self.q_norm.weight, self.k_norm.weight, self.q_norm.eps)
        q, k, v = ops.split_and_rotate(self.wqkv(x), table, self.group, self.head_dim, norms)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        causal = mask is None
        if past is not None:
            k, v = past.extend(k, v)
            # SDPA's is_causal aligns the first query with the first key; a single new query may see all that is cached
            causal = causal and q.shape[2] == k.shape[2]
        if random is not None and threshold(self.dropout_p) > 0:
            out = self._with_dropout(q, k, v, random)
        elif past is not None and q.shape[2] == 1 and q.dtype == torch.bfloat16 and q.device.type == "cpu":
            out = attend_in_fp32(q, k, v, mask)
        else:
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, enable_gqa=self.group > 1)
        return self.wo(out.transpose(1, 2).flatten(2))

    def _with_dropout(self, q: Tensor, k: Tensor, v: Tensor, random: Randomness) -> Tensor:
        """Causal attention (training only) with some of the (B, heads, S, S) fp32 probabilities dropped: the fused
        kernels draw their masks from a generator, so that they would change with the layout."""
        k, v = _repeated(k, self.group), _repeated(v, self.group)
        scores = (q @ k.transpose(-1, -2)).float() * self.head_dim**-0.5
        hidden = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu(1)
        probabilities = scores.masked_fill(hidden, -torch.inf).softmax(-1)
        kept = random.attention_dropout(probabilities, self.dropout_p, PROBABILITIES_SITE, self.first_head)
        return kept.type_as(v) @ v


def _repeated(x: Tensor, times: int) -> Tensor:
    """(B, heads, S, d) -> (B, heads x times, S, d): query heads h x times … share key head h."""
    return x.unsqueeze(2).expand(-1, -1, times, -1, -1).flatten(1, 2)


# --- blocks ---


class FeedForward(nn.Module):
    """SwiGLU: w2(silu(w1 x) * w3 x)."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.w1 = Linear(config.dim, config.ffn_dim)
        self.w3 = Linear(config.dim, config.ffn_dim)
        self.w2 = Linear(config.ffn_dim, config.dim)

    def forward(self, x: Tensor, recompute_product: bool = True) -> Tensor:
        """recompute_product: compute the gated product again in the backward pass instead of keeping it."""
        a, b = self.w1(x), self.w3(x)
        product = ops.gated(a, b)
        if torch.compiler.is_compiling() or not (recompute_product and product.requires_grad):
            return self.w2(product)
        with ops.recomputed(product, a, b):
            return self.w2(product)


class Block(nn.Module):
    """One layer: attention and a gated feed-forward network, each normalised before and added after."""

    def __init__(self, config: GPTConfig, drop_path_p: float) -> None:
        super().__init__()
        self.attention = Attention(config)
        self.feed_forward = FeedForward(config)
        self.attention_norm = RMSNorm(config.dim, config.norm_eps)
        self.ffn_norm = RMSNorm(config.dim, config.norm_eps)
        # as LlamaGen's code: it switches the element-wise dropouts off where drop-path is on
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
        recompute_product: bool = True,
    ) -> Tensor:
        """x (B, S, dim) -> the same shape; see Attention and FeedForward for the rest."""
        attended = self.attention(self.attention_norm(x), table, mask, random, past)
        if random is None:
            x = x + attended
            return x + self.feed_forward(self.ffn_norm(x), recompute_product)
        attended = random.drop_path(attended, self.drop_path_p, ATTENTION_PATH_SITE)
        x = random.add_dropped(x, attended, self.resid_dropout_p, ATTENTION_SITE)
        fed = self.feed_forward(self.ffn_norm(x), recompute_product)
        fed = random.drop_path(fed, self.drop_path_p, FFN_PATH_SITE)
        return random.add_dropped(x, fed, self.ffn_dropout_p, FFN_SITE)


# --- the model ---


class GPT(nn.Module):
    """``model(tokens, condition) -> logits``; ``model.loss(tokens, condition) -> nats per token``.

    Weights are zero until ``initialize`` or ``load_state_dict``.

    dropout_seed: of the dropout masks.
    recompute_every: 0 keeps all activations for the backward pass; k recomputes blocks 0, k, 2k, … there from their
        inputs, with the same numbers.
    token_nll, log_partition, gather_vocabulary: seams for tensor parallelism, where the head yields this rank's slice
        of the vocabulary; the first two compute the loss from slices, the third makes the logits whole.
    """

    rotary: Tensor

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.config = config
        self.dropout_seed = 0
        self.recompute_every = 0
        self.cls_embedding = ClassEmbedder(config) if config.condition == "class" else CaptionEmbedder(config)
        self.tok_embeddings = Embedding(config.vocab_size, config.dim)
        self.beta_embedding = BetaEmbedding(config) if config.guidance == "free" else None
        self.target_positions = TargetPositions(config) if config.order == "rar" else None
        # stochastic depth grows linearly: early layers are needed by all that follow
        rates = [config.drop_path_rate * i / max(config.n_layer - 1, 1) for i in range(config.n_layer)]
        self.layers = nn.ModuleList(Block(config, rate) for rate in rates)
        self.norm = RMSNorm(config.dim, config.norm_eps)
        self.output = Linear(config.dim, config.vocab_size)
        self.register_buffer("rotary", rotary_table(config), persistent=False)
        self.token_nll: TokenNLL = token_nll
        self.log_partition: LogPartition = partial(torch.logsumexp, dim=-1)
        self.gather_vocabulary: Callable[[Tensor], Tensor] = lambda logits: logits

    def _apply(self, fn: Any, recurse: bool = True) -> "GPT":
        """``to``, ``bfloat16`` and the like: the rotary table stays in fp32, as in all of LlamaGen's programs."""
        exact = self.rotary  # in bf16 neighbouring positions would share their angles
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
        """Make the rotary table and the null caption (of captions) where the weights are, for meta ones on the CPU."""
        where = self.norm.weight.device if not self.norm.weight.is_meta else torch.device("cpu")
        with torch.device("cpu"):
            self.rotary = rotary_table(self.config).to(where)
            if isinstance(self.cls_embedding, CaptionEmbedder):
                dtype = self.cls_embedding.uncond_embedding.dtype
                self.cls_embedding.uncond_embedding = null_caption(self.config, seed).to(where, dtype)

    def compile_blocks(self) -> None:
        """torch.compile every block in place; they share one compiled program, and names stay."""
        for layer in self.layers:
            layer.compile()

    @property
    def dropout_active(self) -> bool:
        c = self.config
        rates = (c.token_dropout_p, c.resid_dropout_p, c.ffn_dropout_p, c.attn_dropout_p, c.drop_path_rate)
        return self.training and max(rates) > 0

    def _hidden(
        self,
        tokens: Tensor,
        condition: Condition,
        sample_ids: Tensor | None,
        positions: Tensor | None,
        beta: Tensor | None = None,
        dropout: bool = True,
    ) -> Tensor:
        """(B, N, dim): the state at the N positions that predict tokens[:, 0 … N-1]. dropout: where it is active."""
        random = None
        if self.dropout_active and dropout:
            if sample_ids is None:
                raise ValueError("dropout needs sample_ids: its masks are a function of the global sample numbers")
            random = Randomness(prng.stream(self.dropout_seed, "dropout", sample_ids))
        n = tokens.shape[1]
        prefix, present = self._prefix(condition, beta)
        x = torch.cat([prefix, self.tok_embeddings(tokens[:, :-1])], dim=1)
        x = self._aimed(x, prefix.shape[1], positions)
        table = self.rotary[: x.shape[1]]
        if positions is not None:
            table = own_angles(self.rotary, prefix.shape[1], positions)
        if present is not None:
            # the rotary table moves along: a token keeps the angle of its position, wherever it is computed
            order = sequence_order(present, n - 1)
            x, table = rows_of(x, order), table[order] if positions is None else angles_of(table, order)
        if random is not None:
            x = random.dropout(x, self.config.token_dropout_p, 0)
        blocks: Any = self.layers  # to mypy a ModuleList holds modules of no particular kind
        for number, layer in enumerate(blocks):
            masks = random.layer(number) if random is not None else None
            recompute = bool(self.recompute_every) and number % self.recompute_every == 0 and torch.is_grad_enabled()
            # a recomputed block keeps nothing anyway; its product recomputed as well would hold on to w1's and w3's
            # outputs, which checkpoint drops
            arguments = (x, table, None, masks, None, not recompute)
            if recompute:
                x = checkpoint(layer, *arguments, use_reentrant=False, preserve_rng_state=False)
            else:
                x = layer(*arguments)
        # norm and head only where a token is predicted: of 120 caption positions that is the last one
        if present is None:
            return self.norm(x[:, prefix.shape[1] - 1 :])
        # a caption of m tokens stands at 0 … m - 1 and the image behind it: m - 1 + t predicts token t
        return self.norm(rows_of(x, present.sum(dim=1, keepdim=True) - 1 + torch.arange(n, device=x.device)))

    def _prefix(self, condition: Condition, beta: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """The embedded condition (B, T, dim), and which of its positions hold something; None: all.

        beta: (B,) fp32, of ``guidance: free``; None: 1."""
        features, present = condition if isinstance(condition, tuple) else (condition, None)
        prefix = self.cls_embedding(features)
        if self.beta_embedding is not None:
            beta = torch.ones(len(prefix), device=prefix.device) if beta is None else beta
            prefix = prefix + self.beta_embedding(beta)
        # the last position predicts the first token, so it is there even if the caption is empty
        return prefix, None if present is None else F.pad(present[:, :-1], (0, 1), value=True)

    def _aimed(self, x: Tensor, prefix: int, targets: Tensor | None = None) -> Tensor:
        """x (B, S, dim) that knows, with ``order: rar``, what it predicts; see TargetPositions."""
        return x if self.target_positions is None else self.target_positions(x, prefix, targets)

    def forward(
        self,
        tokens: Tensor,
        condition: Condition,
        sample_ids: Tensor | None = None,
        positions: Tensor | None = None,
        beta: Tensor | None = None,
    ) -> Tensor:
        """Logits (B, N, V); logits[:, t] predicts tokens[:, t] from the condition and tokens[:, :t].

        tokens: (B, N) int64.
        condition: labels (B,) int64 (``num_classes`` = null), or (features (B, T, C) left-padded, mask (B, T) bool).
        sample_ids: (B,) int64 global sample numbers, needed when dropout is active.
        positions: (B, N) int64, where in the grid (raster numbers) the tokens lie, in the order in which they are
            given and predicted; None: raster order. Of ``order: rar``.
        beta: (B,) fp32, how the model is guided, in (0, 1]; None: 1, not at all. Of ``guidance: free``.

        Raises ValueError for dropout without sample_ids.
        """
        return self.gather_vocabulary(self.output(self._hidden(tokens, condition, sample_ids, positions, beta)))

    def loss(
        self,
        tokens: Tensor,
        condition: Condition,
        sample_ids: Tensor | None = None,
        weights: Tensor | None = None,
        positions: Tensor | None = None,
        beta: Tensor | None = None,
    ) -> Tensor:
        """Mean nats per token (0-d fp32); in eval mode the validation loss, while training z-loss included.

        tokens, condition, sample_ids, positions: as in ``forward``.
        weights: (B,), of each sample in the mean; 0 leaves it out, and all 0 give 0.
        beta: (B,) fp32, of ``guidance: free``: the loss is that of beta x conditional + (1 - beta) x null logits, with
            no gradient through the null ones, which are computed as in sampling (beta 1, no dropout). None: beta is 1.
        """
        return self.loss_and_z(tokens, condition, sample_ids, weights, positions, beta)[0]

    def loss_and_z(
        self,
        tokens: Tensor,
        condition: Condition,
        sample_ids: Tensor | None = None,
        weights: Tensor | None = None,
        positions: Tensor | None = None,
        beta: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """(``loss``, the mean squared log-partition in it, unweighted and without a gradient; None where it is not)."""
        null = None
        if beta is not None:
            with torch.no_grad():
                hidden = self._hidden(tokens, self.null_condition(condition), None, positions, dropout=False)
                null = self.output(hidden)
        logits = self.output(self._hidden(tokens, condition, sample_ids, positions, beta))
        if null is not None and beta is not None:
            logits = mixed(logits, null, beta)
        logits = logits.flatten(0, 1)
        # the mean is taken by weights of each token, so that a chunked, vocabulary-parallel loss is one weighted sum
        each = torch.ones_like(tokens, dtype=torch.float32)
        if weights is not None:
            each = each * weights[:, None]
        each = each / each.sum().clamp(min=1.0)
        rows = logits, tokens.flatten(), each.flatten(), self.token_nll
        if self.config.z_loss and self.training:
            return weighted_nll_and_z(*rows, ZLoss(self.config.z_loss, self.log_partition))
        return weighted_nll(*rows), None

    def null_condition(self, condition: Condition) -> Condition:
        """The null class, or the null caption (with the caption's padding, as LlamaGen does), for each sample."""
        if isinstance(condition, tuple):
            features, present = condition
            null: Tensor = self.cls_embedding.uncond_embedding  # type: ignore[assignment]
            return null.to(features.dtype).expand_as(features), present
        return torch.full_like(condition, self.config.num_classes)

    def prefill(
        self, condition: Condition, spare: int = 0, earlier: Cache | None = None, beta: Tensor | None = None
    ) -> tuple[Tensor, Cache]:
        """Logits (B, V) of the first image token, and the cache that ``decode`` continues with. Never any dropout.

        spare: positions that the cache holds behind the image's.
        beta: (B,) fp32, of ``guidance: free``; None: 1.
        earlier: the cache of a batch that has ended, whose memory this one takes where it has the same shape.
        """
        x, present = self._prefix(condition, beta)
        x = self._aimed(x, x.shape[1])
        table, last = self.rotary[: x.shape[1]], x.new_full((len(x), 1), x.shape[1] - 1, dtype=torch.int64)
        fold = self.config.prefix_rotation == "zero"
        if present is not None:  # no image yet: tokens first, padding last, so that causal attention hides it
            order = sequence_order(present, 0)
            x, table, present = rows_of(x, order), table[order], present.gather(1, order)
            last = present.sum(dim=1, keepdim=True) - 1
        cache = Cache(len(self.layers), x.shape[1], self.config.image_tokens - 1 + spare, present, fold, earlier)
        return self._advance(x, table, last, None, cache)[:, 0], cache

    def decode(self, tokens: Tensor, cache: Cache) -> Tensor:
        """Logits (B, V) of the next image token.

        tokens: (B,) int64, the token before it of each sample; its keys and values enter the cache.
        cache: of ``prefill``. Raises ValueError once it is full.
        """
        table = self.rotary[cache.position : cache.position + 1]
        x = self.tok_embeddings(tokens).unsqueeze(1)
        if self.target_positions is not None:
            target = torch.tensor([cache.position - self.config.prefix + 1], device=tokens.device)
            x = self.target_positions(x, 1, target)
        return self._advance(x, table, torch.zeros_like(tokens)[:, None], cache.mask(), cache)[:, 0]

    def decode_window(
        self, tokens: Tensor, first: Tensor, end: int, cache: Cache, advance: Callable[..., Tensor] | None = None
    ) -> Tensor:
        """Logits (B, W, V) of the tokens behind each of W, the last of which may be guesses.

        tokens: (B, W) int64; their keys and values enter the cache, over those of an earlier window.
        first: (B,) int64, the number of tokens[:, 0] in its image.
        end: the largest ``first`` + W.
        cache: of ``prefill`` with ``spare`` = W or more; no ``decode`` may follow.
        advance: the layers, compiled; None: as they are.
        """
        prefix = self.config.prefix
        positions, mask = cache.window(prefix + first, tokens.shape[1], prefix + end)
        table = self.rotary[positions.clamp(max=len(self.rotary) - 1)]  # behind the image nothing is read
        every = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
        targets = (positions - prefix + 1).clamp(max=self.config.image_tokens - 1)
        x = self._aimed(self.tok_embeddings(tokens), 1, targets)
        return (advance or self._advance)(x, table, every, mask, cache)

    def _advance(self, x: Tensor, table: Tensor, last: Tensor, mask: Tensor | None, cache: Cache) -> Tensor:
        for layer, past in zip(self.layers, cache.layers, strict=True):
            x = layer(x, table, mask, None, past)
        return self.gather_vocabulary(self.output(self.norm(rows_of(x, last))))
