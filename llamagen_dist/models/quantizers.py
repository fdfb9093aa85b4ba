"""Which quantizer a config means, and which one a file of weights has."""

from collections.abc import Mapping

from torch import Tensor

from llamagen_dist.models.fixed_codebooks import FSQ, IFSQ, LFQ
from llamagen_dist.models.learned_codebooks import EMAQuantizer, IndexBackpropagationQuantizer
from llamagen_dist.models.quantizer import SIGNATURE, Quantizer, VectorQuantizer
from llamagen_dist.models.sizes import VQConfig


def make_quantizer(config: VQConfig) -> Quantizer:
    """A new quantizer; a table of codes is drawn from torch's global generator."""
    table = config.codebook_size, config.codebook_dim, config.l2_norm
    made: Quantizer
    if config.quantizer == "ema":
        made = EMAQuantizer(*table, config.codebook_decay)
    elif config.quantizer == "ibq":
        made = IndexBackpropagationQuantizer(*table)
    elif config.quantizer == "lfq":
        made = LFQ(config.codebook_size.bit_length() - 1, config.entropy_groups)
    elif config.quantizer in ("fsq", "ifsq"):
        made = (FSQ if config.quantizer == "fsq" else IFSQ)(config.levels)
    else:
        made = VectorQuantizer(*table)
    made.temperature = config.entropy_temperature
    return made


def quantizer_of(weights: Mapping[str, Tensor]) -> str:
    """The quantizer, with its options, that a tokenizer's weights were trained with; ``vq`` where they do not say."""
    return bytes(weights[SIGNATURE].tolist()).decode("ascii") if SIGNATURE in weights else VectorQuantizer.kind
