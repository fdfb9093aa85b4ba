"""Bytes that one rank of a training run holds, by part, before it exists. No torch here.

State (weights to EMA) is what the engines allocate and activations are what autograd keeps of models/gpt.py in eager
mode; both are checked against real allocations on CPU (tests/ranks/test_memory.py, tests/unit/test_memory.py). What an
accelerator's allocator and kernels add (fragmentation, cuBLAS and NCCL workspaces, a compiled block keeping other
tensors) is not in here and was not verified.
"""

from dataclasses import dataclass
from typing import Literal

from llamagen_dist.models.cost import LOSS_CHUNK, parameters, total_parameters
from llamagen_dist.models.sizes import GPTConfig, VQConfig
from llamagen_dist.parallel.buckets import LARGEST_BUCKET, LARGEST_SUM

FP32 = 4


@dataclass(frozen=True)
class Layout:
    """One way to run a model: how it is split over tensor x data ranks, and what a rank computes at a time.

    micro: images per rank and forward pass. recompute_every and sequence as in the
    config.
    """

    zero: int = 0
    tensor: int = 1
    data: int = 1
    precision: Literal["fp32", "bf16"] = "fp32"
    micro: int = 1
    recompute_every: int = 0
    sequence: bool = False
    ema: int = 0
    muon: bool = False

    @property
    def bytes(self) -> int:
        """Of one weight or activation in the precision that the model computes in."""
        return 2 if self.precision == "bf16" else FP32


def kept_whole(config: GPTConfig) -> int:
    """Parameters that ZeRO-3 leaves on every rank: vectors, which cost more to gather than they save."""
    return parameters(config)["norms"]


def by_muon(config: GPTConfig, tensor: int = 1) -> int:
    """Parameters that have one moment in place of two where ``optim.kind`` is muon: the matrices of the blocks."""
    groups = parameters(config, tensor)
    return groups["attention"] + groups["feed-forward"]


def orthogonalizing(config: GPTConfig, layout: Layout) -> int:
    """Bytes of Muon's update: this rank's pieces on their way out, those that came in for its share of the matrices,
    and the four tensors of the largest one (itself, two of the products, the next)."""
    largest = 4 * config.dim * max(config.ffn_dim, config.dim + 2 * config.kv_dim)
    return (2 * -(-by_muon(config, layout.tensor) // layout.data) + largest) * FP32 if layout.muon else 0


def state(config: GPTConfig, layout: Layout) -> dict[str, int]:
    """Bytes of weights, gradients (at the fullest moment of a backward pass), fp32 masters, Adam's moments and EMA.

    ZeRO 0 is torch's DDP: everything whole, gradients living in DDP's buckets. ZeRO 1 shares out masters, moments and
    EMA over the data-parallel ranks, 2 the gradients too, 3 the weights too. DeepSpeed keeps masters also where the
    weights are fp32 already. Its ZeRO-1 holds whole gradients between micro-batches, in bf16 and their fp32 sum if the
    weights are bf16.
    """
    count = total_parameters(config, layout.tensor)
    share = -(-count // layout.data)  # rounded up: the flat state is padded to a multiple of the ranks
    optimizer = count if layout.zero == 0 else share
    single = by_muon(config, layout.tensor) if layout.muon else 0
    weights = count
    if layout.zero == 3:
        whole = kept_whole(config)
        weights = -(-(count - whole) // layout.data) + whole
    gradients = (count if layout.zero < 2 else share) * FP32
    if layout.zero == 1 and layout.precision == "bf16":
        # bf16 sums would lose small contributions, so DeepSpeed adds micro-batches up in fp32 beside them
        gradients += count * layout.bytes
    return {
        "weights": weights * layout.bytes,
        "gradients": gradients,
        "masters": 0 if layout.zero == 0 else share * FP32,
        "moments": (2 * optimizer - (single if layout.zero == 0 else -(-single // layout.data))) * FP32,
        "ema": optimizer * FP32 * layout.ema,
    }


def buckets(config: GPTConfig, layout: Layout) -> dict[str, int]:
    """Bytes of communication buffers, by how long they live.

    lasting: DeepSpeed's flat buffer for gradients on their way, for the whole run (bf16 ZeRO-1 reduces its sums where
    they are).
    passing: for a moment: DDP's buckets beside gradients that still accumulate; the fp32 copy of a bf16 bucket (ZeRO-2)
    or of sums (ZeRO-1, after the backward pass) while it is reduced; at ZeRO-3 the weights gathered for the piece that
    computes and, prefetched, for the next.
    """
    count = total_parameters(config, layout.tensor)
    wide = layout.precision == "fp32"
    if layout.zero == 0:
        return {"lasting": 0, "passing": count * FP32 if layout.data > 1 else 0}
    if layout.zero == 1 and not wide:
        return {"lasting": 0, "passing": min(LARGEST_SUM, count) * FP32}
    count = min(LARGEST_BUCKET, count)
    if layout.zero == 3:
        return {"lasting": count * FP32, "passing": 2 * largest_module(config, layout.tensor) * layout.bytes}
    return {"lasting": count * layout.bytes, "passing": 0 if wide else count * FP32}


def largest_module(config: GPTConfig, tensor: int) -> int:
    """Parameters of the largest piece that ZeRO-3 gathers at once: a block, the embedding or the head."""
    groups = parameters(config, tensor)
    block = (groups["attention"] + groups["feed-forward"]) // config.n_layer
    return max(block, groups["token embedding"], groups["condition embedding"])


@dataclass(frozen=True)
class Kept:
    """A tensor that autograd keeps for the backward pass; elements of one image on one rank, bytes per element."""

    name: str
    elements: int
    bytes: int


def block_kept(config: GPTConfig, layout: Layout) -> list[Kept]:
    """What one block keeps for one image, in the order of models/gpt.py's forward (eager).

    Under sequence parallelism norms, residual stream and dropout masks hold this rank's positions only; the inputs of
    the split layers are gathered and whole.
    """
    b, t = layout.bytes, layout.tensor
    length = config.prefix + config.image_tokens - 1
    rows = -(-length // t) if layout.sequence else length
    d, f, kv = config.dim, config.ffn_dim, config.kv_heads * config.head_dim
    dropped = config.drop_path_rate == 0  # drop path replaces the masks by one number per image

    def norm(name: str) -> list[Kept]:
        return [
            Kept(f"{name} input", rows * d, b),
            Kept(f"{name} 1/rms", rows, FP32),
            Kept(f"{name} output", length * d, b),
        ]

    def mask(name: str, p: float) -> list[Kept]:
        return [Kept(f"{name} kept", rows * d, 1)] if dropped and p > 0 else []

    # The fused kernel has no dropout by sample and position, so attention with dropout is written out; then the
    # probabilities exist, and they grow with the square of the length.
    explicit = config.attn_dropout_p > 0
    attention = [
        # one fused tensor; where products are explicit three copies, repeated for query heads that share keys
        Kept("q, k, v", length * (3 * d if explicit else d + 2 * kv) // t, b),
        Kept("attention output", length * d // t, b),
    ]
    if explicit:
        pairs = length * length * config.n_head // t
        attention += [
            Kept("probabilities", pairs, FP32),
            Kept("probabilities kept", pairs, 1),
            Kept("probabilities dropped", pairs, b),
        ]
    else:
        attention.append(Kept("log-sum-exp", length * config.n_head // t, FP32))
    if config.qk_norm:
        attention += [
            # written-out attention has counted the q and k that it multiplies, and not what the norms keep of them
            Kept("q and k before their norm", length * (d + kv * (2 if explicit else 1)) // t, b),
            Kept("1/rms of q and k", length * (config.n_head + config.kv_heads) // t, FP32),
        ]
    feed_forward = [Kept(name, length * f // t, b) for name in ("w1 output", "w3 output")]
    return [
        *norm("attention norm"),
        *attention,
        *mask("attended", config.resid_dropout_p),
        *norm("ffn norm"),
        *feed_forward,
        *mask("fed", config.ffn_dropout_p),
    ]


def ends_kept(config: GPTConfig, layout: Layout) -> list[Kept]:
    """What is kept in front of and behind the blocks for one image: the embedded condition, the final norm, the head's
    input; and the logits, whose place their gradient takes (models/loss.py)."""
    b, n, d = layout.bytes, config.image_tokens, config.dim
    length = config.prefix + n - 1
    kept = [
        Kept("final norm input", (length if config.condition == "class" else n) * d, b),
        Kept("final norm 1/rms", n, FP32),
        Kept("head input", n * d, b),
        Kept("logits", n * config.vocab_size // layout.tensor, b),
    ]
    if config.order == "rar" or config.condition == "text":
        kept.append(Kept("rotary of each image", length * config.head_dim, FP32))
    if config.order == "rar":
        kept.append(Kept("order", n, 8))
    if config.token_dropout_p > 0:
        kept.append(Kept("embedded kept", length * d, 1))
    if config.condition == "text":
        kept += [
            Kept("caption before gelu", config.prefix * d, b),
            Kept("caption after gelu", config.prefix * d, b),
            Kept("caption order", length + n, 8),
        ]
        if b != FP32:
            kept.append(Kept("caption features", config.prefix * config.caption_dim, b))
    return kept


def activations(config: GPTConfig, layout: Layout) -> dict[str, int]:
    """Bytes kept for the backward pass of one micro-batch, by part.

    blocks: what the blocks keep; a recomputed one only its input. recomputed: the one block that the backward pass has
    just computed again. logits: the logits alone. ends: the rest of ``ends_kept``.
    """
    one = sum(k.elements * k.bytes for k in block_kept(config, layout)) * layout.micro
    length = config.prefix + config.image_tokens - 1
    rows = -(-length // layout.tensor) if layout.sequence else length
    again = -(-config.n_layer // layout.recompute_every) if layout.recompute_every else 0
    inputs = rows * config.dim * layout.bytes * layout.micro
    ends = {k.name: k.elements * k.bytes * layout.micro for k in ends_kept(config, layout)}
    logits = ends.pop("logits")
    return {
        "blocks": (config.n_layer - again) * one + again * inputs,
        "recomputed": one if again else 0,
        "logits": logits,
        "ends": sum(ends.values()),
    }


def working(config: GPTConfig, layout: Layout) -> int:
    """Bytes of temporaries at the fullest moment: of one block's backward pass (gradients of its feed-forward's three
    inner tensors, one of which is computed again, and of two residual streams) or, where that is more, of the loss's
    fp32 chunk in front of it, which comes before anything is recomputed. An estimate: kernels differ."""
    length = config.prefix + config.image_tokens - 1
    inner = 4 * length * config.ffn_dim // layout.tensor
    block = (inner + 2 * length * config.dim) * layout.bytes * layout.micro
    logits = layout.micro * config.image_tokens * config.vocab_size // layout.tensor
    loss = 2 * min(logits, LOSS_CHUNK) * FP32
    if config.guidance == "free":  # the null logits, before the two are mixed
        loss = max(loss, logits * layout.bytes)
    return max(block, loss - activations(config, layout)["recomputed"])


def per_rank(config: GPTConfig, layout: Layout) -> dict[str, int]:
    """Bytes by part at the fullest moment, in the middle of a backward pass: the parts of ``state``, buckets,
    activations, logits and working memory. They add up."""
    kept = activations(config, layout)
    buffers = buckets(config, layout)
    computing = {
        "activations": kept["blocks"] + kept["recomputed"] + kept["ends"],
        "logits": kept["logits"],
        "working": working(config, layout),
    }
    passing = buffers["passing"]
    if layout.zero == 1:  # comes after the backward pass, in the place of what that has freed
        passing = max(0, passing - sum(computing.values()))
    passing += max(0, orthogonalizing(config, layout) - passing - sum(computing.values()))  # later still
    return {**state(config, layout), "buckets": buffers["lasting"] + passing, **computing}


def checkpoint_bytes(config: GPTConfig, ema: int, muon: bool = False) -> int:
    """On disk: fp32 masters, their moments and so many moving averages, whole, whatever the layout."""
    return (total_parameters(config) * (3 + ema) - (by_muon(config) if muon else 0)) * FP32


def validation_bytes(config: GPTConfig, layout: Layout, batch: int) -> int:
    """Bytes of a forward pass over ``batch`` images that keeps nothing: the larger of the logits and one block's inner
    tensors. An estimate."""
    length = config.prefix + config.image_tokens - 1
    block = length * (4 * config.ffn_dim // layout.tensor + 3 * config.dim)
    logits = config.image_tokens * (config.vocab_size // layout.tensor + config.dim)
    return max(block, logits) * layout.bytes * batch


def drawn_picture(
    config: GPTConfig, layout: Layout, vq: VQConfig, image_size: int, guided: bool, window: int
) -> dict[str, int]:
    """Bytes that one more picture in a batch of samples takes on a rank, by part, beside weights.

    An estimate (tests/unit/test_batch.py: at most a few per cent above real peaks on CPU) but for the cache.
    vq: the tokenizer that decodes, in fp32, to image_size pixels along a side.
    guided: each picture with its null half.
    window: tokens per pass.
    """
    b, t, rows = layout.bytes, layout.tensor, 2 if guided else 1
    prefix = config.prefix if config.condition == "text" and config.prefix_rotation != "zero" else 1  # models/cache.py
    slots = prefix + config.image_tokens - 1 + window - 1
    # logits, their fp32 copy; guided, scaled and chosen scores; noise in int64 and float64 (sampling/draw.py)
    step = window * config.vocab_size * (rows * (b + FP32) + 3 * FP32 + 5 * 2 * FP32)
    first = rows * config.prefix * (b * (7 * config.dim + 3 * config.ffn_dim // t) + FP32 * config.caption_dim)
    # a residual block holds five tensors of its own width, or three of the width that comes in, at its resolution
    levels = enumerate(zip(vq.channel_multipliers, (*vq.channel_multipliers[1:], 1), strict=True))
    decoder = max(vq.channels * max(5 * own, 3 * before) * (image_size >> n) ** 2 for n, (own, before) in levels)
    return {
        "cache": rows * config.n_layer * 2 * slots * config.kv_dim // t * b,
        "logits and noise": max(step, first),
        "decoder": FP32 * decoder,
    }
