"""A trained GPT and its tokenizer from checkpoints, checked to belong together."""

import difflib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llamagen_dist.build import build_vq, gpt_config
from llamagen_dist.checkpoint import store
from llamagen_dist.checkpoint.released import CLASSES as _CLASSES
from llamagen_dist.config import GPTConfigFile, GPTModelSection, TokenizerConfigFile, TokenizerModelSection, is_remote
from llamagen_dist.data.manifest import MANIFEST, Manifest, read_manifest
from llamagen_dist.data.shards import manifest_of
from llamagen_dist.errors import UserError
from llamagen_dist.models.gpt import GPT, GPTConfig
from llamagen_dist.models.vq import VQModel


@dataclass(frozen=True)
class Tokenizer:
    """model: in evaluation mode. image_size: what it was trained on, pixels; None for a bare weights file."""

    path: Path
    model: VQModel
    sha256: str
    image_size: int | None


@dataclass(frozen=True)
class TrainedGPT:
    """model: in evaluation mode. seed: of its initial weights (0 where unknown). classes: their names, none for a
    text-conditional model. captions: which encoder made the caption features it was trained on (``encoder``,
    ``encoder_sha256``), where that is known. tokens: the folder of the token shards it was trained on, if that is still
    there, with its manifest."""

    path: Path
    model: GPT
    seed: int
    classes: list[str]
    captions: dict[str, Any] | None
    image_size: int
    tokens: Path | None
    manifest: Manifest | None

    @property
    def config(self) -> GPTConfig:
        return self.model.config


def load_tokenizer(
    path: Path,
    section: TokenizerModelSection | None = None,
    key: str = "tokenizer",
    sizes: str = "model",
    check: Callable[[VQModel], None] | None = None,
) -> Tokenizer:
    """path: a run directory, a step folder, or (with ``section``, its sizes) a weights file.

    key, sizes: the config keys that messages name. check: may refuse the model before its weights are put in.
    Raises UserError: not there, another kind, does not fit.
    """
    weights, trained = _read(path, key)
    image_size = None
    if trained is not None:
        if not isinstance(trained, TokenizerConfigFile):
            raise UserError(f"{key}: {path} is not a tokenizer's run")
        section, image_size = trained.model, trained.data.image_size
    if section is None:
        raise UserError(f"{key}: {path} is a bare weights file; say what it is, as in {sizes}.size=VQ-16")
    model = build_vq(section)
    if check is not None:
        check(model)
    sha256 = store.identity_of(weights)
    weights.setdefault("quantize.codebook_used", model.state_dict()["quantize.codebook_used"])  # a statistic
    _fill(model, weights, key, path)
    return Tokenizer(path, model.eval(), sha256, image_size)


def load_gpt(
    path: Path,
    tokenizer: Tokenizer,
    section: GPTModelSection | None = None,
    image_size: int | None = None,
    group: str = "weights",
) -> TrainedGPT:
    """The GPT at ``path``, which must have been trained on ``tokenizer``'s tokens.

    group: ``weights`` or ``ema``, the moving average that a run may have kept.

    Vocabulary and classes are read off the weights; the number of tokens follows from the picture's size: image_size,
    or what the token shards' manifest says, or what the tokenizer was trained on. Raises UserError.
    """
    weights, trained = _read(path, "checkpoint", group)
    seed, tokens = 0, None
    if trained is not None:
        if not isinstance(trained, GPTConfigFile):
            raise UserError(f"checkpoint: {path} is not a GPT's run")
        section, seed = trained.model, trained.train.seed
        tokens = None if is_remote(trained.data.train) else Path(trained.data.train)
    if section is None:
        raise UserError(f"checkpoint: {path} is a bare weights file; say what it is, as in model.size=GPT-B")
    if "output.weight" not in weights:
        raise UserError(f"checkpoint: {path} holds no output.weight: these are not the weights of a GPT")
    by_class = _CLASSES in weights
    if by_class != (section.condition == "class"):
        kind = "classes" if by_class else "text"
        raise UserError(f"checkpoint: {path} is conditioned on {kind}; say so with model.condition")
    manifest = read_manifest(tokens) if tokens is not None and (tokens / MANIFEST).exists() else None
    _check_pair(path, weights, tokenizer, manifest)
    num_classes = weights[_CLASSES].shape[0] - 1 if by_class else 0
    size = image_size or (manifest.image_size if manifest else None) or tokenizer.image_size
    factor = tokenizer.model.config.downsampling
    if size is None:
        raise UserError(
            "image_size: neither the checkpoint nor the tokenizer knows it; set image_size=256, for example"
        )
    if size % factor:
        raise UserError(f"image_size: {size} is not a multiple of {factor}, the pixels per token of {tokenizer.path}")
    config = gpt_config(
        section,
        vocab_size=weights["output.weight"].shape[0],
        image_tokens=(size // factor) ** 2,
        num_classes=num_classes,
    )
    model = GPT(config)
    _fill(model, weights, "checkpoint", path)
    folder = path if (path / "index.json").exists() else store.newest(path, warn=False) if path.is_dir() else None
    classes = _class_names(folder) or (manifest.classes if manifest else None)
    if classes is None or len(classes) != num_classes:
        classes = [str(number) for number in range(num_classes)]
    captions = None if folder is None or by_class else store.read_state(folder).get("captions")
    return TrainedGPT(path, model.eval(), seed, list(classes), captions, size, tokens if manifest else None, manifest)


def _class_names(folder: Path | None) -> list[str] | None:
    """From classes.json of the checkpoint, where there is one."""
    if folder is None or not (folder / "classes.json").exists():
        return None
    return [str(name) for name in json.loads((folder / "classes.json").read_text(encoding="utf-8"))]


def _check_pair(path: Path, weights: dict[str, Tensor], tokenizer: Tokenizer, manifest: Manifest | None) -> None:
    vocabulary, codes = weights["output.weight"].shape[0], tokenizer.model.config.codebook_size
    if vocabulary != codes:
        raise UserError(
            f"tokenizer: {tokenizer.path} has {codes} codes, but {path} was trained on {vocabulary}; "
            "name the tokenizer that its token shards were made with"
        )
    if manifest is not None and manifest.tokenizer_sha256 != tokenizer.sha256:
        raise UserError(
            f"tokenizer: {tokenizer.path} (sha256 {tokenizer.sha256[:12]}…) is not the one whose tokens {path} was "
            f"trained on ({manifest.tokenizer_path}, sha256 {str(manifest.tokenizer_sha256)[:12]}…)"
        )


def _read(path: Path, key: str, group: str = "weights") -> tuple[dict[str, Tensor], object]:
    if not path.exists():
        raise UserError(f"{key}: {path} does not exist; give a run directory, a step_… folder or a weights file")
    try:
        return store.read_weights(path, group), store.read_config(path)
    except UserError as error:
        raise UserError(f"{key}: {error}") from None


def _fill(model: torch.nn.Module, weights: dict[str, Tensor], key: str, path: Path) -> None:
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        first = " ".join(str(error).split())[:300]
        raise UserError(f"{key}: the weights in {path} do not fit its sizes: {first}") from None


def tokenizer_of(checkpoint: Path) -> Path:
    """Where the token shards' manifest says the GPT's tokenizer lies. Raises UserError if that cannot be found."""
    _, trained = _read(checkpoint, "checkpoint")
    hint = "say where it is with --tokenizer PATH"
    if not isinstance(trained, GPTConfigFile):
        raise UserError(f"{checkpoint}: does not say which tokenizer it was trained with; {hint}")
    tokens = trained.data.train
    if not is_remote(tokens) and not (Path(tokens) / MANIFEST).exists():
        raise UserError(f"{checkpoint}: its token shards ({tokens}), which name the tokenizer, are gone; {hint}")
    named = manifest_of(tokens, trained.data).tokenizer_path
    if named is None or not Path(named).exists():
        raise UserError(f"{checkpoint}: its tokenizer ({named or 'not named'}) is gone; {hint}")
    return Path(named)


def class_number(name: str, classes: Sequence[str]) -> int:
    """The label of a class given by name (upper or lower case) or number. Raises UserError with the nearest name."""
    lower = [known.lower() for known in classes]
    if name.lower() in lower:
        return lower.index(name.lower())
    if name.isdigit():
        if int(name) < len(classes):
            return int(name)
        raise UserError(f"class {name}: there are {len(classes)} classes, 0 to {len(classes) - 1}")
    near = difflib.get_close_matches(name.lower(), lower, n=1, cutoff=0.0)
    hint = f"did you mean {classes[lower.index(near[0])]!r}?" if near else ""
    shown = f" (one of {', '.join(classes)})" if len(classes) <= 20 else ""
    raise UserError(f"class {name!r} is unknown; {hint}{shown}")
