"""An image as an ordered row of tokens, any first k of which decode to an image: more tokens, more detail.

Learned queries collect the convolutional encoder's grid into N tokens, as TiTok does (arXiv 2406.07550, section 3.2),
and learned positions read them back into a grid for the convolutional decoder. In training the decoder gets a prefix of
random length and a learned mask token for the rest (nested dropout, arXiv 1402.0915), so what the first tokens can say
goes into them. The convolutions and the quantizers are VQModel's: to a quantizer the row is a grid of 1 x N.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llamagen_dist.models.sizes import VQConfig
from llamagen_dist.models.vq import VQModel

INITIAL_DEVIATION = 0.02
"""Of learned positions."""


class TokenBlock(nn.Module):
    """Self-attention in both directions and a feed-forward network, each normalised before and added after."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """(B, S, width) -> the same shape."""
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        x = x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class Resampler(nn.Module):
    """``read`` vectors into ``written`` others: blocks over both, of which the second begin as learned queries plus a
    learned mixture of the first.

    The mixture gives every query something of the image from the first step on. Without it (as in TiTok) what queries
    collect at first is nearly the same for all of them, and in a short training the decoder learns to ignore it.

    mask: a learned vector stands for those that are not kept.
    """

    def __init__(self, config: VQConfig, read: int, written: int, mask: bool) -> None:
        super().__init__()
        width, channels = config.token_width, config.z_channels
        self.into, self.out = nn.Linear(channels, width), nn.Linear(width, channels)
        self.positions = nn.Parameter(torch.randn(read, width) * INITIAL_DEVIATION)
        self.queries = nn.Parameter(torch.randn(written, width) * INITIAL_DEVIATION)
        self.mixture = nn.Parameter(torch.randn(written, read) * read**-0.5)
        self.mask = nn.Parameter(torch.randn(width) * INITIAL_DEVIATION) if mask else None
        self.blocks = nn.ModuleList(TokenBlock(width, config.token_heads) for _ in range(config.token_layers))
        self.norm = nn.LayerNorm(width)

    def forward(self, x: Tensor, kept: Tensor | None = None) -> Tensor:
        """(B, read, channels) -> (B, written, channels). kept: (B, read) bool; None: all."""
        x = self.into(x)
        if kept is not None and self.mask is not None:
            # everywhere, also where all are kept: the mask then has a gradient of zero, and DDP waits for one
            x = torch.where(kept[..., None], x, self.mask.to(x.dtype))
        x = torch.cat([x + self.positions, self.queries + self.mixture @ x], dim=1)
        for block in self.blocks:
            x = block(x)
        return self.out(self.norm(x[:, len(self.positions) :]))


class PrefixVQModel(VQModel):
    """Images (B, 3, S, S) with S = ``config.image_size`` to codes (B, 1, N) and, from codes (B, 1, k), k <= N, back.

    Raises ValueError: image_size is no multiple of the downsampling.
    """

    def __init__(self, config: VQConfig) -> None:
        super().__init__(config)
        if config.token_count is None or config.image_size is None or config.image_size % config.downsampling:
            raise ValueError(f"token_count {config.token_count}, image_size {config.image_size}")
        self.side = config.image_size // config.downsampling
        self.to_tokens = Resampler(config, self.side**2, config.token_count, mask=False)
        self.to_grid = Resampler(config, config.token_count, self.side**2, mask=True)

    def latents(self, images: Tensor) -> Tensor:
        """(B, 3, S, S) -> (B, C, 1, N), before quantisation; ValueError for images of another size."""
        size = self.config.image_size
        if images.shape[-2:] != (size, size):
            raise ValueError(f"{tuple(images.shape[-2:])} pixels: the tokens stand for {size} x {size}")
        tokens = self.to_tokens(self.encoder(images).flatten(2).transpose(1, 2))
        return self.quant_conv(tokens.transpose(1, 2).unsqueeze(2))

    def render(self, quantised: Tensor, lengths: Tensor | None = None) -> Tensor:
        """(B, C, 1, k) -> (B, 3, S, S).

        lengths: int64 (B,), how many of the k tokens are looked at; None: all. ValueError for k above N.
        """
        given, count = quantised.shape[-1], len(self.to_grid.positions)
        if given > count:
            raise ValueError(f"{given} tokens, and an image has {count}")
        padded = F.pad(quantised, (0, count - given))  # one shape for any k: another could round otherwise
        z = self.post_quant_conv(padded).flatten(2).transpose(1, 2)
        ends = torch.full((len(z),), given, device=z.device) if lengths is None else lengths.to(z.device)
        kept = torch.arange(count, device=z.device) < ends[:, None]
        grid = self.to_grid(z, kept).transpose(1, 2)
        return self.decoder(grid.unflatten(2, (self.side, self.side)))
