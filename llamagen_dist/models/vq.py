"""LlamaGen's image tokenizer: a convolutional autoencoder around a small codebook (paper section 2.2).

Module and parameter names are LlamaGen's, so its released weights load strictly. Nothing here knows about
ranks, losses on pixels or runs.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from llamagen_dist.models.quantizer import VQLosses, code_histogram
from llamagen_dist.models.quantizers import make_quantizer
from llamagen_dist.models.sizes import VQ_SIZES, VQConfig

__all__ = ["VQ_SIZES", "VQConfig", "VQLosses", "VQModel", "code_histogram"]


def group_norm(channels: int) -> nn.GroupNorm:
    """GroupNorm with LlamaGen's 32 groups, or with the largest divisor of ``channels`` below that.

    All channel counts of the released sizes are multiples of 32; those of a small size of one's own (24, say) need
    not be, and GroupNorm wants equal groups.
    """
    groups = max(g for g in range(1, min(32, channels) + 1) if channels % g == 0)
    return nn.GroupNorm(groups, channels, eps=1e-6)


class Block(nn.Module):
    """(B, C, H, W) -> (B, C', H, W).

    recompute: keep only the input for the backward pass, which computes the rest again.
    random: whether it draws from torch's global generator, which then has to repeat itself.
    """

    recompute = random = False

    def forward(self, x: Tensor) -> Tensor:
        if not (self.recompute and torch.is_grad_enabled()):
            return self.compute(x)
        again: Tensor = checkpoint(self.compute, x, use_reentrant=False, preserve_rng_state=self.random)
        return again

    def compute(self, x: Tensor) -> Tensor:
        raise NotImplementedError


class ResidualBlock(Block):
    def __init__(self, in_channels: int, out_channels: int, dropout: float) -> None:
        super().__init__()
        self.random = dropout > 0
        self.norm1 = group_norm(in_channels)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.norm2 = group_norm(out_channels)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        if in_channels != out_channels:
            self.nin_shortcut = nn.Conv2d(in_channels, out_channels, 1)

    def compute(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(self.dropout(F.silu(self.norm2(h))))
        return (self.nin_shortcut(x) if hasattr(self, "nin_shortcut") else x) + h


class AttentionBlock(Block):
    """Single-head self-attention over the h x w positions, with a residual connection."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = group_norm(channels)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(channels, channels, 1) for _ in range(4))

    def compute(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        q, k, v = (conv(h).flatten(2).transpose(1, 2).unsqueeze(1) for conv in (self.q, self.k, self.v))
        out = F.scaled_dot_product_attention(q, k, v)  # (B, 1, hw, C)
        return x + self.proj_out(out.squeeze(1).transpose(1, 2).reshape(x.shape))


class Downsample(nn.Module):
    """Halves the resolution: zeros on the right and at the bottom, then a 3x3 convolution of stride 2."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))  # one-sided, as the released weights were trained


class Upsample(nn.Module):
    """Doubles the resolution: nearest neighbour, then a 3x3 convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class Level(nn.Module):
    """The blocks of one resolution. Attention follows every residual block where ``attention`` is set."""

    def __init__(self, in_channels: int, out_channels: int, blocks: int, dropout: float, attention: bool) -> None:
        super().__init__()
        inputs = [in_channels] + [out_channels] * (blocks - 1)
        self.res = nn.ModuleList(ResidualBlock(c, out_channels, dropout) for c in inputs)
        self.attn = nn.ModuleList(AttentionBlock(out_channels) for _ in range(blocks if attention else 0))

    def forward(self, x: Tensor) -> Tensor:
        for number, block in enumerate(self.res):
            x = block(x)
            if len(self.attn):
                x = self.attn[number](x)
        for change in ("downsample", "upsample"):
            if change in self._modules:
                x = getattr(self, change)(x)
        return x


def middle(channels: int, dropout: float) -> nn.Sequential:
    return nn.Sequential(
        ResidualBlock(channels, channels, dropout),
        AttentionBlock(channels),
        ResidualBlock(channels, channels, dropout),
    )


class Encoder(nn.Module):
    """(B, 3, H, W) -> (B, z_channels, H/f, W/f)."""

    def __init__(self, config: VQConfig) -> None:
        super().__init__()
        widths = [config.channels * m for m in config.channel_multipliers]
        self.conv_in = nn.Conv2d(config.image_channels, config.channels, 3, padding=1)
        self.conv_blocks = nn.ModuleList()
        for number, (before, width) in enumerate(zip([config.channels, *widths], widths, strict=False)):
            last = number == len(widths) - 1
            level = Level(before, width, config.res_blocks, config.dropout, attention=last)
            if not last:
                level.downsample = Downsample(width)
            self.conv_blocks.append(level)
        self.mid = middle(widths[-1], config.dropout)
        self.norm_out = group_norm(widths[-1])
        self.conv_out = nn.Conv2d(widths[-1], config.z_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv_out(self.features(x))

    def features(self, x: Tensor) -> Tensor:
        """All but the last convolution: (B, 3, H, W) -> (B, C, H/f, W/f)."""
        x = self.conv_in(x)
        for level in self.conv_blocks:
            x = level(x)
        return F.silu(self.norm_out(self.mid(x)))


class Decoder(nn.Module):
    """(B, z_channels, h, w) -> (B, 3, f h, f w); its levels run from the lowest resolution to the highest."""

    def __init__(self, config: VQConfig) -> None:
        super().__init__()
        widths = [config.channels * m for m in reversed(config.channel_multipliers)]
        self.conv_in = nn.Conv2d(config.z_channels, widths[0], 3, padding=1)
        self.mid = middle(widths[0], config.dropout)
        self.conv_blocks = nn.ModuleList()
        for number, (before, width) in enumerate(zip([widths[0], *widths], widths, strict=False)):
            level = Level(before, width, config.res_blocks + 1, config.dropout, attention=number == 0)
            if number < len(widths) - 1:
                level.upsample = Upsample(width)
            self.conv_blocks.append(level)
        self.norm_out = group_norm(widths[-1])
        self.conv_out = nn.Conv2d(widths[-1], config.image_channels, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        return self.conv_out(self.features(z))

    def features(self, z: Tensor) -> Tensor:
        """All but the last convolution: (B, z_channels, h, w) -> (B, C, f h, f w)."""
        x = self.mid(self.conv_in(z))
        for level in self.conv_blocks:
            x = level(x)
        return F.silu(self.norm_out(x))


class VQModel(nn.Module):
    """Images to codes and back. Images: floats (B, 3, H, W), nominally in [-1, 1]; H, W multiples of f."""

    def __init__(self, config: VQConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        self.quantize = make_quantizer(config)
        self.quant_conv = nn.Conv2d(config.z_channels, self.quantize.codebook_dim, 1)
        self.post_quant_conv = nn.Conv2d(self.quantize.codebook_dim, config.z_channels, 1)

    @property
    def device(self) -> torch.device:
        return self.quant_conv.weight.device

    def recompute(self, every: int) -> None:
        """Activation checkpointing: 0 of no block, k of every k-th residual or attention block."""
        blocks = [module for module in self.modules() if isinstance(module, Block)]
        for number, block in enumerate(blocks):
            block.recompute = every > 0 and number % every == 0

    def compile_halves(self) -> None:
        """torch.compile encoder and decoder in place.

        Their last convolutions are left out: a gradient of the decoder's alone (an adaptive weight's) would otherwise
        go through all of it.
        """
        for half in (self.encoder, self.decoder):
            half.features = torch.compile(half.features)  # type: ignore[assignment]

    def latents(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, C, H/f, W/f), before quantisation; ValueError unless f divides H and W."""
        factor = self.config.downsampling
        if images.shape[-1] % factor or images.shape[-2] % factor:
            raise ValueError(
                f"{tuple(images.shape[-2:])} pixels cannot be cut into tokens of {factor} x {factor} pixels"
            )
        return self.quant_conv(self.encoder(images))

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) in [-1, 1] -> codes int64 (B, H/f, W/f); flattened row by row they are the tokens."""
        rows = self.quantize.prepare(self.latents(images))
        return self.quantize.nearest(rows.reshape(-1, self.quantize.codebook_dim)).view(rows.shape[:-1])

    @torch.no_grad()
    def decode(self, codes: Tensor, lengths: Tensor | None = None) -> Tensor:
        """codes int64 (B, h, w) -> images (B, 3, f h, f w), nominally in [-1, 1] and not clamped.

        lengths: see ``forward``.
        """
        return self.render(self.quantize.lookup(codes), lengths)

    def render(self, quantised: Tensor, lengths: Tensor | None = None) -> Tensor:
        """(B, C, h, w) -> (B, 3, f h, f w). lengths: of prefix tokens, of which there are none here."""
        return self.decoder(self.post_quant_conv(quantised))

    def forward(
        self,
        images: Tensor,
        entropy: bool = False,
        exchange: Callable[[Tensor], Tensor] | None = None,
        lengths: Tensor | None = None,
    ) -> tuple[Tensor, VQLosses, Tensor]:
        """Training: (reconstruction, unweighted losses, codes int64 (B, h, w)).

        entropy: that loss too.
        exchange: the codes that the decoder gets in place of the encoder's; gradients pass as if they were those.
        lengths: int64 (B,), of prefix tokens: how many of an image's the decoder gets; None: all.
        """
        quantised, losses, codes = self.quantize(self.latents(images), entropy=entropy)
        if exchange is not None:
            moved = self.quantize.lookup(exchange(codes)) - self.quantize.lookup(codes)
            quantised = quantised + moved.detach()
        return self.render(quantised, lengths), losses, codes


def to_uint8(images: Tensor) -> Tensor:
    """Pictures in [-1, 1] to bytes as LlamaGen writes them: 127.5 x + 128, clamped to 0…255, truncated."""
    return (images.float() * 127.5 + 128.0).clamp(0, 255).to(torch.uint8)
