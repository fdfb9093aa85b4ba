"""Which of the released models a state dict belongs to, and where it differs from one that it should be."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from llamagen_dist.errors import UserError
from llamagen_dist.models.gpt import GPT, GPTConfig
from llamagen_dist.models.sizes import GPT_SIZES
from llamagen_dist.models.vq import VQ_SIZES, VQConfig, VQModel

STATISTIC = "quantize.codebook_used"  # a tokenizer's usage counter, absent from some files
SIZES = (*GPT_SIZES, *VQ_SIZES)
CLASSES, _CAPTION = "cls_embedding.embedding_table.weight", "cls_embedding.uncond_embedding"


@dataclass(frozen=True)
class Described:
    """kind: ``class-conditional GPT``, ``text-conditional GPT`` or ``tokenizer``. size: a released name, or None."""

    kind: str
    size: str | None
    parameters: int


def describe(weights: Mapping[str, Tensor]) -> Described:
    """Tell the model from its names and shapes alone. Raises UserError for neither a GPT nor a tokenizer."""
    kind = kind_of(weights)
    sizes = VQ_SIZES if kind == "tokenizer" else GPT_SIZES
    size = next((name for name in sizes if difference(weights, name) is None), None)
    buffers = (STATISTIC, _CAPTION)
    return Described(kind, size, sum(t.numel() for name, t in weights.items() if name not in buffers))


def kind_of(weights: Collection[str]) -> str:
    """From the tensors' names. Raises UserError."""
    if "tok_embeddings.weight" in weights and "output.weight" in weights:
        if CLASSES in weights:
            return "class-conditional GPT"
        if _CAPTION in weights:
            return "text-conditional GPT"
    if "quantize.embedding.weight" in weights and any(name.startswith("encoder.") for name in weights):
        return "tokenizer"
    some = ", ".join(sorted(weights)[:3])
    raise UserError(f"neither a LlamaGen GPT nor a tokenizer: the first of its {len(weights)} tensors are {some}")


def difference(weights: Mapping[str, Tensor], size: str) -> str | None:
    """The first key (in the model's own order) where ``weights`` are not a model of this released size; None: they
    are. The vocabulary, the classes and the length of captions are not part of a size. Raises UserError (kind_of)."""
    kind = kind_of(weights)
    if (kind == "tokenizer") != (size in VQ_SIZES):
        return f"it is a {kind}, and {size} is a {'tokenizer' if size in VQ_SIZES else 'GPT'}"
    expected = _shapes(weights, kind, size)
    found = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    return first_difference(found, expected, size)


def first_difference(
    found: Mapping[str, tuple[int, ...]], expected: Mapping[str, tuple[int, ...]], what: str
) -> str | None:
    """The first key (in the order of ``expected``) that is missing, of another shape, or does not belong there."""
    for name, shape in expected.items():
        if name == STATISTIC:
            continue
        if name not in found:
            return f"{name} is missing"
        if found[name] != shape:
            return f"{name} has shape {list(found[name])}, and {what} has {list(shape)}"
    extra = next((name for name in found if name not in expected), None)
    return None if extra is None else f"{extra} does not belong to {what}"


def _shapes(weights: Mapping[str, Tensor], kind: str, size: str) -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):
        model: torch.nn.Module
        if kind == "tokenizer":
            codes, dim = weights["quantize.embedding.weight"].shape
            model = VQModel(VQConfig(codebook_size=codes, codebook_dim=dim, **VQ_SIZES[size]))
        else:
            own: dict[str, Any] = {**GPT_SIZES[size], "vocab_size": weights["output.weight"].shape[0]}
            if kind == "class-conditional GPT":
                own["num_classes"] = weights[CLASSES].shape[0] - 1
            else:
                length, dim = weights[_CAPTION].shape
                own |= {"condition": "text", "prefix_tokens": length, "caption_dim": dim}
            model = GPT(GPTConfig(**own))
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
