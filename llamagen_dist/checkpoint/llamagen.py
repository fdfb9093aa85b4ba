"""Released LlamaGen weight files: reading them, which model they are, and what they lack of it.

A file is a bare state dict, or one under ``ema``, ``model``, ``module`` or ``state_dict`` (a tokenizer of GEAR: under
``vq_ema`` or ``vq``). ``Weights.notes`` names what was taken where a file leaves a choice, and which wrapper's prefix
its names carried. Tokenizers of other projects are read under LlamaGen's names (foreign.py).
"""

import argparse
import re
import struct
import zipfile
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llamagen_dist.checkpoint import foreign
from llamagen_dist.config import TokenizerModelSection
from llamagen_dist.errors import UserError
from llamagen_dist.files import cut_short
from llamagen_dist.models.gpt import GPT, GPTConfig
from llamagen_dist.models.initial import added_by, options_in
from llamagen_dist.models.quantizer import SIGNATURE
from llamagen_dist.models.sizes import BETA_EMBEDDING, GPT_SIZES, TARGET_POSITIONS
from llamagen_dist.models.vq import VQ_SIZES, VQConfig, VQModel

STATISTIC = "quantize.codebook_used"  # a tokenizer's usage counter, absent from some files
SIZES = (*GPT_SIZES, *VQ_SIZES)
CLASSES, _CAPTION = "cls_embedding.embedding_table.weight", "cls_embedding.uncond_embedding"
TRAINED = ("model", "module", "state_dict")
AVERAGES = ("vq_ema", "ema")
# First match wins; the average is what upstream evaluates. GEAR's files hold a GPT's average beside their tokenizer.
CONTAINERS = ("vq_ema", "vq", "ema", *TRAINED)

# torch.compile, FSDP and activation checkpointing put a segment of their own before whatever they wrap, at any depth;
# DDP (module.) and training modules that hold the model (model.) only stand in front.
_WRAPPER = re.compile(r"(?:^|(?<=\.))(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
_FRONT = re.compile(r"^(?:(?:module|model)\.)+")


@dataclass(frozen=True)
class Weights:
    """tensors: by LlamaGen's names. notes: what was chosen or left out on the way, one sentence each."""

    tensors: dict[str, Tensor]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Described:
    """kind: ``class-conditional GPT``, ``text-conditional GPT`` or ``tokenizer``. size: a released name, or None."""

    kind: str
    size: str | None
    parameters: int


# --- reading ---


def load(path: Path) -> Any:
    """What a .safetensors, .pt or .pth file holds, mapped into memory where its format allows: the processes of one
    machine then share the pages, so that the file is read once. Nothing in it is ever executed.

    Raises UserError, with the likely cause, for a file that is missing, cut short, damaged, or holds more than data.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such weights file")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        zipped = zipfile.is_zipfile(path)
        # LlamaGen's own training checkpoints carry their argparse.Namespace: plain values, nothing that runs
        with torch.serialization.safe_globals([argparse.Namespace, *(_lightning(path) if zipped else ())]):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except MemoryError:
        raise
    except Exception as error:  # bytes that are no such file make the readers stumble over anything
        raise UserError(unreadable(path, error)) from None


def _lightning(path: Path) -> list[tuple[type, str]]:
    """PyTorch Lightning's classes that a checkpoint of its names beside the weights (its callbacks), each with an empty
    class to stand for it: Lightning need not be installed, and nothing of it runs. Raises ValueError for other code."""
    named = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    ours = [name for name in named if name.startswith(("pytorch_lightning.", "lightning."))]
    if others := set(named) - {*ours, "argparse.Namespace"}:
        raise ValueError(f"it names {min(others)}, which is code and no data")
    return [(type(name.rpartition(".")[2], (), {}), name) for name in ours]


def unreadable(path: Path, error: Exception) -> str:
    """One sentence for a weights file that its reader refused with ``error``."""
    ended = isinstance(error, (EOFError, struct.error)) or "unexpected EOF" in str(error)
    if ended or cut_short(path):
        return (
            f"{path}: the file ends too early ({path.stat().st_size:,} bytes), most likely because its download or "
            "copy was interrupted; fetch it again"
        )
    first = " ".join(str(error).split())[:200] or type(error).__name__
    return f"{path}: cannot be read as a file of weights ({first})"


def plain_names(names: Collection[str]) -> tuple[dict[str, str], list[str]]:
    """(name without wrappers' prefixes -> name in the file, the prefixes that were left out, sorted).

    Raises UserError where two tensors would share a name.
    """
    plain: dict[str, str] = {}
    prefixes: set[str] = set()
    for name in names:
        bare = _WRAPPER.sub("", name)
        bare = _FRONT.sub("", bare)
        prefixes |= {segment + "." for segment in name.split(".")} - {segment + "." for segment in bare.split(".")}
        if bare in plain:
            raise UserError(f"holds both {plain[bare]} and {name}, which are one tensor but for a wrapper's prefix")
        plain[bare] = name
    return plain, sorted(prefixes)


def unwrap(content: Any, path: Path, group: str | None = None) -> Weights:
    """The state dict in any of the containers, without wrappers' prefixes and the stray ``freqs_cis`` table.

    group: ``weights`` or ``ema``; None takes the average where the file holds one, as LlamaGen's own evaluation does.
    Raises UserError where there is no such thing in it.
    """
    notes = []
    if isinstance(content, dict):
        there = [key for key in CONTAINERS if isinstance(content.get(key), dict)]
        wanted = [key for key in there if group is None or (key in AVERAGES) == (group == "ema")]
        if group == "ema" and not wanted:
            raise UserError(f"{path}: one file of weights has no ema in it; give a run directory, or take the weights")
        if there and not wanted:
            raise UserError(f"{path}: holds nothing but an average (ema); take that")
        if wanted:
            content = content[wanted[0]]
        if len(there) > 1:
            others = ", ".join(f"`{key}`" for key in there if key != wanted[0])
            notes.append(f"took `{wanted[0]}` and not {others}, which the file also holds")
    if not isinstance(content, dict) or not any(isinstance(v, Tensor) for v in content.values()):
        raise UserError(f"{path}: holds no state dict (looked at the top level and under {', '.join(CONTAINERS)})")
    tensors = {str(k): v for k, v in content.items() if isinstance(v, Tensor)}
    try:
        plain, prefixes = plain_names(tensors)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    if prefixes:
        notes.append(f"its tensors' names carry {', '.join(f'`{p}`' for p in prefixes)}, which was left out")
    named = {k: tensors[name] for k, name in plain.items() if k != "freqs_cis"}
    if foreign.is_taming(named):
        try:
            named, note = foreign.from_taming(named)
        except UserError as error:
            raise UserError(f"{path}: {error}") from None
        notes.append(note)
    return Weights(named, tuple(notes))


def read(path: str | Path) -> dict[str, Tensor]:
    """The state dict in a .safetensors or .pt/.pth file. Raises UserError (``load``, ``unwrap``)."""
    path = Path(path)
    return unwrap(load(path), path).tensors


# --- which model it is ---


def describe(weights: Mapping[str, Tensor]) -> Described:
    """Tell the model from its names and shapes alone. Raises UserError for neither a GPT nor a tokenizer."""
    kind = kind_of(weights)
    sizes = VQ_SIZES if kind == "tokenizer" else GPT_SIZES
    size = next((name for name in sizes if difference(weights, name) is None), None)
    buffers = (STATISTIC, _CAPTION, foreign.PLAIN_CODES)
    return Described(kind, size, sum(t.numel() for name, t in weights.items() if name not in buffers))


def kind_of(weights: Collection[str]) -> str:
    """From the tensors' names. Raises UserError, naming what is missing where they are nearly one of the kinds."""
    needed = ["tok_embeddings.weight", "output.weight"]
    if any(name in needed or name.startswith("layers.") for name in weights):
        missing = [name for name in needed if name not in weights]
        if not missing and CLASSES in weights:
            return "class-conditional GPT"
        if not missing and _CAPTION in weights:
            return "text-conditional GPT"
        raise UserError(f"a GPT that lacks {', '.join(missing) or f'{CLASSES} or {_CAPTION}'}")
    if SIGNATURE in weights:
        raise UserError(f"a tokenizer with a quantizer that LlamaGen has not ({SIGNATURE}); use its run directory")
    if any(name.startswith(("encoder.down_blocks.", "decoder.up_blocks.")) for name in weights):
        raise UserError("an autoencoder by diffusers' names; give the original VQGAN checkpoint (encoder.down.0.…)")
    parts = {"encoder.", "decoder."} & {name.split(".")[0] + "." for name in weights}
    if "quantize.embedding.weight" in weights or len(parts) == 2:
        missing = [part for part in ("encoder.", "decoder.") if part not in parts]
        missing += [name for name in ("quantize.embedding.weight",) if name not in weights]
        if missing and missing != ["decoder."]:
            raise UserError(f"a tokenizer that lacks {', '.join(missing)}")
        return "tokenizer"
    some = ", ".join(sorted(weights)[:3])
    raise UserError(f"neither a LlamaGen GPT nor a tokenizer: the first of its {len(weights)} tensors are {some}")


def difference(weights: Mapping[str, Tensor], size: str) -> str | None:
    """The first key (in the model's own order) where ``weights`` are not a model of this released size; None: they
    are. The vocabulary, the classes and the length of captions are not part of a size. Raises UserError (kind_of)."""
    kind = kind_of(weights)
    if (kind == "tokenizer") != (size in VQ_SIZES):
        return f"it is a {kind}, and {size} is a {'tokenizer' if size in VQ_SIZES else 'GPT'}"
    if foreign.PLAIN_CODES in weights:
        return f"its codes are compared as they are, and {size} normalises them"
    own = VQ_SIZES[size] if kind == "tokenizer" else GPT_SIZES[size]
    return first_difference(_shapes_in(weights), _expected(weights, kind, own), size)


def incomplete(weights: Mapping[str, Tensor]) -> str | None:
    """What is missing or does not belong to a model of the file's own size, whatever that is; None: it is whole.

    The sizes are read off the tensors that are there: the number of layers from the largest index, widths from the
    embeddings, so that a gap anywhere shows. Raises UserError (kind_of).
    """
    kind, shapes = kind_of(weights), _shapes_in(weights)
    if kind == "tokenizer":
        own = _vq_sizes(shapes)
        if own is None:
            return "encoder.conv_in.weight or encoder.conv_out.weight is missing"
        return first_difference(shapes, _expected(weights, kind, own), "this tokenizer")
    layers = 1 + max((int(name.split(".")[1]) for name in shapes if re.match(r"layers\.\d+\.", name)), default=0)
    dim = shapes["tok_embeddings.weight"][1]
    # one head, unless QK-norm shows their width: the number of heads shows in no other shape; the two widths that are
    # free are then taken from the layers
    own = {"n_layer": layers, "n_head": 1, "dim": dim, "multiple_of": 1, "qk_norm": "qk_norm" in options_in(shapes)}
    if own["qk_norm"]:
        head = next(shape[0] for name, shape in shapes.items() if added_by(name) == "qk_norm")
        own["n_head"] = dim // head if dim % head == head % 4 == 0 else 1
    expected = _expected(weights, kind, own)
    for part, free in (("attention.wqkv", 0), ("feed_forward.w1", 0), ("feed_forward.w3", 0), ("feed_forward.w2", 1)):
        names = [f"layers.{layer}.{part}.weight" for layer in range(layers)]
        width = next((shapes[name][free] for name in names if len(shapes.get(name, ())) == 2), 0)
        for name in names:
            expected[name] = (width, dim) if free == 0 else (dim, width)
    return first_difference(shapes, expected, "this GPT")


def beyond(names: Collection[str]) -> str | None:
    """Why weights with tensors of these names are no LlamaGen model, and when they will be; None: nothing of that kind.

    Continues a sentence that begins with where they are.
    """
    if any(name.startswith(BETA_EMBEDDING) for name in names):
        return (
            f"was trained guidance-free (model.guidance: free): its {BETA_EMBEDDING}* is no part of LlamaGen's model; "
            "keep the run"
        )
    if TARGET_POSITIONS in names:
        return (
            f"is not in raster order yet (model.order: rar) and needs the table {TARGET_POSITIONS}, which LlamaGen's "
            "model has not; take a checkpoint from image train.anneal_until on, which is without it"
        )
    return None


def first_difference(
    shapes: Mapping[str, tuple[int, ...]], expected: Mapping[str, tuple[int, ...]], what: str
) -> str | None:
    """The first key (in the order of ``expected``) that is missing, of another shape, or does not belong there."""
    missing = [name for name in expected if name not in shapes and name != STATISTIC]
    for name, shape in expected.items():
        if name == STATISTIC:
            continue
        if name not in shapes:
            return f"{name} is missing" + (f", and {len(missing) - 1} more" if len(missing) > 1 else "")
        if shapes[name] != shape:
            return f"{name} has shape {list(shapes[name])}, and {what} has {list(shape)}"
    extra = next((name for name in shapes if name not in expected), None)
    return None if extra is None else f"{extra} does not belong to {what}"


def _shapes_in(weights: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in weights.items() if name != foreign.PLAIN_CODES}


def tokenizer_section(weights: Mapping[str, Tensor]) -> TokenizerModelSection | None:
    """``model`` of a tokenizer that is known by its weights: a released size, or another project's; None for others.

    Raises UserError for another project's that no config describes.
    """
    if kind_of(weights) != "tokenizer":
        return None
    codes, dim = weights["quantize.embedding.weight"].shape
    if foreign.PLAIN_CODES not in weights:
        size = describe(weights).size if (codes, dim) == (VQConfig.codebook_size, VQConfig.codebook_dim) else None
        return None if size is None else TokenizerModelSection(size=size)
    if lacks := incomplete(weights):
        raise UserError(f"not a whole VQGAN of a size that can be loaded: {lacks}")
    own = _vq_sizes(_shapes_in(weights)) or {}
    if own.pop("image_channels", 3) != 3:
        raise UserError("a tokenizer of pictures with other than 3 channels; it cannot be loaded")
    return TokenizerModelSection(**own, codebook_size=codes, codebook_dim=dim, l2_norm=False)


def _vq_sizes(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any] | None:
    """VQConfig's keys as the shapes show them; None where a tensor that shows one is missing."""
    first, last = shapes.get("encoder.conv_in.weight"), shapes.get("encoder.conv_out.weight")
    blocks = re.compile(r"(?:encoder|decoder)\.conv_blocks\.(\d+)\.")
    res = re.compile(r"encoder\.conv_blocks\.\d+\.res\.(\d+)\.")
    levels = 1 + max((int(match[1]) for name in shapes if (match := blocks.match(name))), default=-1)
    deep = 1 + max((int(match[1]) for name in shapes if (match := res.match(name))), default=-1)
    if first is None or last is None or levels == 0 or deep == 0:
        return None
    widths = []
    for level in range(levels):  # the last convolution of a level has its width; any block of it will do
        names = [f"encoder.conv_blocks.{level}.res.{block}.conv2.weight" for block in range(deep)]
        widths.append(next((shapes[name][0] for name in names if name in shapes), first[0]))
    return {
        "channels": first[0],
        "image_channels": first[1],
        "z_channels": last[0],
        "channel_multipliers": tuple(max(1, width // first[0]) for width in widths),
        "res_blocks": deep,
    }


def _expected(weights: Mapping[str, Tensor], kind: str, own: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """name -> shape of the model of the sizes ``own``, with the vocabulary and the conditions of ``weights``."""
    with torch.device("meta"):
        model: torch.nn.Module
        if kind == "tokenizer":
            codes, dim = weights["quantize.embedding.weight"].shape
            model = VQModel(VQConfig(codebook_size=codes, codebook_dim=dim, **own))
        else:
            sizes: dict[str, Any] = {**own, "vocab_size": weights["output.weight"].shape[0], "image_tokens": 4}
            if kind == "class-conditional GPT":
                sizes["num_classes"] = weights[CLASSES].shape[0] - 1
            else:
                length, dim = weights[_CAPTION].shape
                sizes |= {"condition": "text", "prefix_tokens": length, "caption_dim": dim}
            model = GPT(GPTConfig(**sizes))
    return _shapes_in(model.state_dict())
