"""What a GPT costs before it exists: parameters by group and FLOPs per image. A multiply-add counts as 2 FLOPs.

Bytes are in memory.py. No torch here.
"""

from llamagen_dist.models.sizes import GPTConfig

REPLICATED = ("condition embedding", "beta embedding", "target positions", "norms")
"""Groups that every tensor-parallel rank holds whole; the others are cut (parallel/tensor_parallel.py's table)."""

WAVES = 256
"""Sines and cosines of beta that ``guidance: free`` embeds (models/guidance_free.py)."""

LOSS_CHUNK = 1 << 22
"""Logits that the loss works on at a time (models/loss.py): 16 MB in fp32."""


def parameters(config: GPTConfig, tensor: int = 1) -> dict[str, int]:
    """Trainable parameters by group, of the model or of one of ``tensor`` ranks that share it.

    At tensor 1 the values sum to the model's count (paper table 1). ``tensor`` must divide heads, feed-forward width
    and vocabulary.
    """
    d, f = config.dim, config.ffn_dim
    if config.condition == "class":
        prefix = (config.num_classes + 1) * d
    else:
        prefix = config.caption_dim * d + d * d
    keys_and_values = 2 * config.kv_heads * config.head_dim
    whole = {
        "condition embedding": prefix,
        "token embedding": config.vocab_size * d,
        "attention": config.n_layer * (2 * d * d + keys_and_values * d),
        "feed-forward": config.n_layer * 3 * d * f,
        **({"beta embedding": WAVES * d + d * d} if config.guidance == "free" else {}),
        **({"target positions": config.image_tokens * d} if config.order == "rar" else {}),
        "norms": (2 * config.n_layer + 1) * d + (2 * config.n_layer * config.head_dim if config.qk_norm else 0),
        "head": config.vocab_size * d,
    }
    return {name: count if name in REPLICATED else count // tensor for name, count in whole.items()}


def total_parameters(config: GPTConfig, tensor: int = 1) -> int:
    return sum(parameters(config, tensor).values())


def forward_flops(config: GPTConfig, dense: bool = False) -> dict[str, int]:
    """Matrix products of one image's forward pass, by part: ``blocks`` (projections and feed-forward over
    T = prefix + N - 1 positions), ``attention`` (scores and weighted sums), ``head`` (at the N positions used).

    Causal attention counts the T (T + 1) / 2 pairs it needs; dense: the T^2 that a kernel computes which masks
    afterwards. Not counted: norms, softmax, embeddings, and the caption's projection (0.2 % for GPT-XL).
    """
    groups = parameters(config)
    length = config.prefix + config.image_tokens - 1  # the last token is predicted and never read
    pairs = length * length if dense else length * (length + 1) // 2
    return {
        "blocks": 2 * (groups["attention"] + groups["feed-forward"]) * length,
        "attention": config.n_layer * 2 * 2 * config.dim * pairs,
        "head": 2 * groups["head"] * config.image_tokens,
    }


def training_flops_per_image(config: GPTConfig, dense: bool = False) -> int:
    """Forward plus backward, the backward pass costing twice the forward one; recomputation is not counted.

    Guidance-free training has one more forward pass, of the null condition."""
    return (4 if config.guidance == "free" else 3) * sum(forward_flops(config, dense).values())
