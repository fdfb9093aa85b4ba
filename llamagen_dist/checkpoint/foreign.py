"""Tokenizers of other projects under LlamaGen's names: taming-transformers' VQGAN, and who trains with its code.

Its autoencoder has LlamaGen's layers (arXiv 2012.09841; ImageNet's f16 models, latent diffusion's f8 ones) under other
names, and its codebook is compared as it is, without l2 normalisation. No shape shows that, so the tensor
``PLAIN_CODES`` goes with the weights wherever they are written.

GEAR's VQ (arXiv 2606.32039) needs nothing here: its tensors have VQ-16's names, under ``vq_ema`` or ``vq``.
"""

import re
from collections.abc import Collection, Mapping

import torch
from torch import Tensor

from llamagen_dist.errors import UserError

PLAIN_CODES = "quantize.l2_norm"
"""0-d bool, false, beside weights whose codes are not normalised; absent elsewhere."""
_LEVEL = re.compile(r"(encoder|decoder)\.(?:down|up)\.(\d+)\.(.+)")
_MIDDLE = {"block_1": "0", "attn_1": "1", "block_2": "2"}
_LOSS = "loss."


def is_taming(names: Collection[str]) -> bool:
    return any(name.startswith(("encoder.down.", "decoder.up.")) for name in names)


def from_taming(weights: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], str]:
    """Weights by taming's names -> (the same by LlamaGen's, with ``PLAIN_CODES``; a sentence about them).

    Lightning's checkpoints hold the losses' networks too (``loss.``: LPIPS, discriminator), which are left out.
    Raises UserError for what has these layers and is no VQGAN, or has attention in other places.
    """
    _refuse_without_codebook(weights)
    leveled = [match for name in weights if (match := _LEVEL.fullmatch(name))]
    levels = 1 + max((int(match[2]) for match in leveled), default=0)
    attention = sorted({int(match[2]) for match in leveled if match[3].startswith("attn.")})
    if attention != [levels - 1]:
        where = f"at the levels {', '.join(map(str, attention))}" if attention else "at no level"
        raise UserError(
            f"a VQGAN with attention {where} of 0 to {levels - 1}; it cannot be loaded, as here attention is "
            "at the last level, the lowest resolution, alone"
        )
    kept = {name: tensor for name, tensor in weights.items() if not name.startswith(_LOSS)}
    codes, dim = weights["quantize.embedding.weight"].shape
    note = (
        f"taming-transformers' VQGAN, {codes:,} codes of {dim} numbers that are compared as they are (l2_norm: false)"
    )
    if dropped := len(weights) - len(kept):
        note += f"; {dropped} tensors of its losses (`{_LOSS}`) left out"
    return {_renamed(name, levels): tensor for name, tensor in kept.items()} | {PLAIN_CODES: torch.tensor(False)}, note


def _renamed(name: str, levels: int) -> str:
    if match := _LEVEL.fullmatch(name):
        part, level, rest = match[1], int(match[2]), match[3]
        # taming counts the decoder's levels from the highest resolution, too; LlamaGen in the order they are run
        number = level if part == "encoder" else levels - 1 - level
        return f"{part}.conv_blocks.{number}.{re.sub('^block', 'res', rest)}"
    part, _, rest = name.partition(".mid.")
    block, _, rest = rest.partition(".")
    return f"{part}.mid.{_MIDDLE[block]}.{rest}" if block in _MIDDLE else name


def _refuse_without_codebook(weights: Mapping[str, Tensor]) -> None:
    if "quantize.embedding.weight" in weights:
        return
    if "quantize.embed.weight" in weights:
        raise UserError(
            "a VQGAN with a Gumbel quantizer (quantize.embed.weight), which takes codes from logits and not the "
            "nearest of a codebook; it cannot be loaded"
        )
    out, into = (
        tuple(weights[n].shape) if n in weights else () for n in ("quant_conv.weight", "post_quant_conv.weight")
    )
    if out and into and out[0] == 2 * into[1]:
        raise UserError(
            f"a KL autoencoder has no codebook (quant_conv gives mean and variance of {into[1]} channels), and tokens "
            "need one; give a VQGAN, such as vqgan_imagenet_f16_16384"
        )
    raise UserError("an autoencoder by taming's names that lacks quantize.embedding.weight, its codebook")
