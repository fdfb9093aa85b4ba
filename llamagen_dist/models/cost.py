"""What a GPT costs before it exists: parameters by group and FLOPs per image. A multiply-add counts as 2 FLOPs."""

from llamagen_dist.models.gpt_config import GPTConfig


def parameters(config: GPTConfig) -> dict[str, int]:
    """Trainable parameters by group; the values sum to the model's count (paper table 1)."""
    d, f = config.dim, config.ffn_dim
    if config.condition == "class":
        prefix = (config.num_classes + 1) * d
    else:
        prefix = config.caption_dim * d + d * d
    return {
        "condition embedding": prefix,
        "token embedding": config.vocab_size * d,
        "attention": config.n_layer * 4 * d * d,
        "feed-forward": config.n_layer * 3 * d * f,
        "norms": (2 * config.n_layer + 1) * d,
        "head": config.vocab_size * d,
    }


def total_parameters(config: GPTConfig) -> int:
    return sum(parameters(config).values())


def forward_flops_per_image(config: GPTConfig) -> int:
    """Matrix products only: blocks over prefix + N - 1 positions, causal attention as half, head at N positions."""
    groups = parameters(config)
    length = config.prefix + config.image_tokens - 1
    blocks = 2 * (groups["attention"] + groups["feed-forward"]) * length
    attention = config.n_layer * 2 * 2 * config.dim * length * length // 2
    head = 2 * groups["head"] * config.image_tokens
    return blocks + attention + head


def training_flops_per_image(config: GPTConfig) -> int:
    """Forward plus backward, the backward pass costing twice the forward one."""
    return 3 * forward_flops_per_image(config)
