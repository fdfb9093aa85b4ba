"""A trained GPT and its tokenizer from checkpoints, checked to belong together."""

import difflib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from llamagen_dist.build import build_vq, gpt_config
from llamagen_dist.checkpoint import llamagen
from llamagen_dist.checkpoint.checkpoint import ALONE, Checkpoint
from llamagen_dist.checkpoint.foreign import PLAIN_CODES
from llamagen_dist.checkpoint.llamagen import CLASSES, STATISTIC
from llamagen_dist.config import GPTConfigFile, GPTModelSection, TokenizerConfigFile, TokenizerModelSection, is_remote
from llamagen_dist.data.manifest import MANIFEST, Manifest, read_manifest
from llamagen_dist.data.shards import manifest_of
from llamagen_dist.errors import UserError
from llamagen_dist.models.gpt import GPT, GPTConfig
from llamagen_dist.models.initial import ADDED, options_in
from llamagen_dist.models.quantizers import quantizer_of
from llamagen_dist.models.vq import VQModel
from llamagen_dist.parallel.topology import Topology

WEIGHTS = {"trained": "weights", "ema": "ema", None: None}
"""A config's ``weights`` -> the group of a checkpoint that it means."""
NEAREST = 3  # names that are offered for an unknown class


@dataclass(frozen=True)
class Tokenizer:
    """model: in evaluation mode. Of what it was trained on, None where nothing says it, as for a bare weights file:
    image_size, pixels; trained_on, the fingerprint of the image shards."""

    path: Path
    model: VQModel
    sha256: str
    image_size: int | None
    trained_on: str | None = None


@dataclass(frozen=True)
class TrainedGPT:
    """A GPT that can be sampled, and what its checkpoint says of it.

    model: in evaluation mode.
    seed: of its initial weights; 0 where unknown.
    classes: their names; none for a text-conditional model.
    captions: which encoder made the caption features it was trained on (``encoder``, ``encoder_sha256``), where that
        is known.
    image_size: pixels along a side.
    tokens, manifest: the folder of the token shards it was trained on, if that is still there, and its manifest.
    """

    checkpoint: Checkpoint
    model: GPT
    seed: int
    classes: list[str]
    captions: dict[str, Any] | None
    image_size: int
    tokens: Path | None
    manifest: Manifest | None

    @property
    def path(self) -> Path:
        return self.checkpoint.path

    @property
    def config(self) -> GPTConfig:
        return self.model.config


def open_checkpoint(path: Path, key: str, topology: Topology = ALONE, which: str | None = None) -> Checkpoint:
    """``Checkpoint.open`` (collective) whose refusals name the config key or option ``key``."""
    if not path.exists():
        raise UserError(f"{key}: {path} does not exist; give a run directory, a step_… folder or a weights file")
    try:
        return Checkpoint.open(path, topology, which)
    except UserError as error:
        raise UserError(f"{key}: {error}") from None


def load_tokenizer(
    path: Path,
    section: TokenizerModelSection | None = None,
    key: str = "tokenizer",
    sizes: str = "model",
    check: Callable[[VQModel], None] | None = None,
    topology: Topology = ALONE,
    weights: Literal["trained", "ema"] | None = None,
    made: str | None = None,
) -> Tokenizer:
    """The tokenizer at ``path`` (collective over ``topology``).

    path: a run directory, a step folder, or a weights file; with ``section``, its sizes, unless it is known by its
        weights (``llamagen.tokenizer_section``).
    key, sizes: the config keys that messages name.
    check: may refuse the model before its weights are put in.
    weights: a run's moving average, or its trained weights, which are also what None takes.
    made: sha256 of the tokenizer that made the tokens at hand, if that is known: of a run the average where it has it.

    Raises UserError: not there, another kind, does not fit.
    """
    checkpoint = open_checkpoint(path, key, topology, WEIGHTS[weights])
    trained, image_size = checkpoint.config, None
    if trained is not None:
        if not isinstance(trained, TokenizerConfigFile):
            raise UserError(f"{key}: {path} is not a tokenizer's run")
        if trained.ema.decay > 0 and made not in (None, checkpoint.identity):
            average = open_checkpoint(path, key, topology, "ema")
            checkpoint = average if average.identity == made else checkpoint
        section, image_size = trained.model, trained.data.image_size
    tensors = checkpoint.read_all()
    if trained is None:
        section = _section_of_file(tensors, section, f"{key}: {path}", sizes)
    if section is None:
        raise UserError(f"{key}: {path} is a bare weights file; say what it is, as in {sizes}.size=VQ-16")
    model = build_vq(section)
    if check is not None:
        check(model)
    known = {name: value for name, value in model.state_dict().items() if name == STATISTIC}
    of_file, of_model = quantizer_of(tensors), quantizer_of(model.state_dict())
    if of_file != of_model:
        raise UserError(
            f"{key}: {path} was trained with the quantizer {of_file}, and {sizes}.quantizer says {of_model}; give "
            f"{sizes}.quantizer and its options as they were"
        )
    tensors.pop(PLAIN_CODES, None)
    fill(model, known | tensors, key, path)
    return Tokenizer(path, model.eval(), checkpoint.identity, image_size, checkpoint.state.get("data"))


def _section_of_file(
    weights: Mapping[str, Tensor], given: TokenizerModelSection | None, where: str, sizes: str
) -> TokenizerModelSection | None:
    """The sizes of a bare file: those that are given, or those that its weights tell."""
    try:
        known = llamagen.tokenizer_section(weights) if given is None else None
    except UserError as error:
        raise UserError(f"{where}: {error}") from None
    if given is not None and given.l2_norm and PLAIN_CODES in weights:
        raise UserError(
            f"{where} compares its codes as they are, and {sizes} says that they are normalised; leave {sizes} out, or "
            f"set {sizes}.l2_norm=false"
        )
    return known if given is None else given


def check_first_tokens(tokenizer: Tokenizer, tokens: int | None, key: str) -> None:
    """Raises UserError, naming the config key or option, where no image can be decoded from its first ``tokens``."""
    count = tokenizer.model.config.token_count
    if tokens is not None and count is None:
        raise UserError(f"{key}: {tokenizer.path} makes a grid of tokens, which decode only all together; leave it out")
    if tokens is not None and count is not None and tokens > count:
        raise UserError(
            f"{key}: {tokens} tokens, and {tokenizer.path} makes {count} of an image; ask for at most {count}"
        )


def load_gpt(
    checkpoint: Checkpoint,
    tokenizer: Tokenizer,
    section: GPTModelSection | None = None,
    image_size: int | None = None,
) -> TrainedGPT:
    """The GPT of an open checkpoint, which must have been trained on ``tokenizer``'s tokens.

    section: its sizes, for a bare weights file; vocabulary and classes are read off the weights.
    image_size: pixels along a side, from which the number of tokens follows; None takes what the token shards'
        manifest says, or what the tokenizer was trained on.

    Raises UserError: not a GPT, of another tokenizer, does not fit.
    """
    path, shapes, trained = checkpoint.path, checkpoint.shapes, checkpoint.config
    seed, tokens = 0, None
    if trained is not None:
        if not isinstance(trained, GPTConfigFile):
            raise UserError(f"checkpoint: {path} is not a GPT's run")
        section, seed = trained.model, trained.train.seed
        tokens = None if is_remote(trained.data.train) else Path(trained.data.train)
    if section is None:
        raise UserError(f"checkpoint: {path} is a bare weights file; say what it is, as in model.size=GPT-B")
    if "output.weight" not in shapes:
        raise UserError(f"checkpoint: {path} holds no output.weight: these are not the weights of a GPT")
    by_class = CLASSES in shapes
    if by_class != (section.condition == "class"):
        kind = "classes" if by_class else "text"
        raise UserError(f"checkpoint: {path} is conditioned on {kind}; say so with model.condition")
    manifest = read_manifest(tokens) if tokens is not None and (tokens / MANIFEST).exists() else None
    _check_pair(checkpoint, shapes["output.weight"][0], tokenizer, manifest)
    num_classes = shapes[CLASSES][0] - 1 if by_class else 0
    factor = tokenizer.model.config.downsampling
    grid = checkpoint.state.get("grid")  # rows and columns of tokens, of checkpoints that know it
    own = tokenizer.model.config.image_size or (grid and grid[0] * factor)
    known = manifest.image_size if manifest else own
    size = image_size or known or tokenizer.image_size
    if size is None:
        raise UserError(
            "image_size: neither the checkpoint nor the tokenizer knows it; set image_size=256, for example"
        )
    if (why := tokenizer.model.config.uncoded(size)) is not None:
        raise UserError(f"image_size: {size} {why} {tokenizer.path}")
    rows, columns = tokenizer.model.config.grid(size)
    if grid is not None and [rows, columns] != grid:
        each = "prefix tokens" if tokenizer.model.config.token_count else f"{factor} pixels per token"
        raise UserError(
            f"checkpoint: {path} draws {grid[0]} x {grid[1]} tokens, but {tokenizer.path} makes {rows} x {columns} of "
            f"{size} pixels ({each})"
        )
    config = gpt_config(
        section,
        vocab_size=shapes["output.weight"][0],
        image_tokens=rows * columns,
        token_rows=rows if tokenizer.model.config.token_count else None,
        num_classes=num_classes,
        tensors=shapes,
    )
    for option in ADDED:
        there = option in options_in(shapes)
        if there != bool(getattr(config, option)):
            raise UserError(
                f"checkpoint: {path} was trained with{'' if there else 'out'} {option}; say so with "
                f"model.{option}={str(there).lower()}"
            )
    model = GPT(config)
    fill(model, checkpoint.read_all(), "checkpoint", path)
    classes = checkpoint.classes or (manifest.classes if manifest else None)
    if classes is None or len(classes) != num_classes:
        classes = [str(number) for number in range(num_classes)]
    captions = None if by_class else checkpoint.state.get("captions")
    return TrainedGPT(
        checkpoint, model.eval(), seed, list(classes), captions, size, tokens if manifest else None, manifest
    )


def _check_pair(checkpoint: Checkpoint, vocabulary: int, tokenizer: Tokenizer, manifest: Manifest | None) -> None:
    """Raises UserError for a tokenizer other than the one that made the GPT's tokens, as far as that is known."""
    path, codes = checkpoint.path, tokenizer.model.config.codebook_size
    if vocabulary != codes:
        raise UserError(
            f"tokenizer: {tokenizer.path} has {codes} codes, but {path} was trained on {vocabulary}; "
            "name the tokenizer that its token shards were made with"
        )
    where, sha256 = _made_by(checkpoint, manifest, tokenizer.sha256)
    if sha256 != tokenizer.sha256:
        raise UserError(
            f"tokenizer: {tokenizer.path} (sha256 {tokenizer.sha256[:12]}…) is not the one whose tokens {path} was "
            f"trained on ({where}, sha256 {str(sha256)[:12]}…)"
        )


def _made_by(checkpoint: Checkpoint, manifest: Manifest | None, unknown: str | None) -> tuple[str | None, str | None]:
    """(path, sha256) of the tokenizer that made a GPT's tokens, ``unknown`` where nothing says it."""
    if manifest is not None:
        return manifest.tokenizer_path, manifest.tokenizer_sha256
    noted = checkpoint.state.get("tokenizer", {})  # by the checkpoint itself, whose shards may be gone
    return noted.get("path"), noted.get("sha256", unknown)


def maker_of(checkpoint: Checkpoint) -> str | None:
    """sha256 of the tokenizer that made the tokens of this GPT, for ``load_tokenizer``; None where nothing says it."""
    trained = checkpoint.config
    tokens = trained.data.train if isinstance(trained, GPTConfigFile) else None
    there = tokens is not None and not is_remote(tokens) and (Path(tokens) / MANIFEST).exists()
    return _made_by(checkpoint, read_manifest(Path(str(tokens))) if there else None, None)[1]


def fill(model: torch.nn.Module, weights: Mapping[str, Tensor], key: str, path: Path) -> None:
    """Put ``weights`` into ``model``. Raises UserError, naming the config key, where they do not fit."""
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        first = " ".join(str(error).split())[:300]
        raise UserError(f"{key}: the weights in {path} do not fit its sizes: {first}") from None


def tokenizer_of(checkpoint: Checkpoint) -> Path:
    """Where the token shards' manifest says the GPT's tokenizer lies. Raises UserError if that cannot be found."""
    path, trained = checkpoint.path, checkpoint.config
    hint = "say where it is with --tokenizer PATH"
    if trained is not None and not isinstance(trained, GPTConfigFile):
        raise UserError(f"checkpoint: {path} is not a GPT's run")
    if trained is None:
        raise UserError(f"{path}: does not say which tokenizer it was trained with; {hint}")
    tokens = trained.data.train
    if not is_remote(tokens) and not (Path(tokens) / MANIFEST).exists():
        raise UserError(f"{path}: its token shards ({tokens}), which name the tokenizer, are gone; {hint}")
    named = manifest_of(tokens, trained.data).tokenizer_path
    if named is None or not Path(named).exists():
        raise UserError(f"{path}: its tokenizer ({named or 'not named'}) is gone; {hint}")
    return Path(named)


def class_number(name: str, classes: Sequence[str]) -> int:
    """The label of a class given by name or number.

    A name that is exactly a class's comes first, then one that differs in upper and lower case only, then one of
    several that a class has (``tabby`` of ``tabby, tabby cat``), then a number. Raises UserError for a name that
    several classes have, with their numbers, and for an unknown one, with the nearest.
    """
    exact = [[known] for known in classes]
    lower = [[known.lower()] for known in classes]
    parts = [[part.strip() for part in known.lower().split(",")] for known in classes]
    for wanted, names in ((name, exact), (name.lower(), lower), (name.lower(), parts)):
        numbers = [number for number, known in enumerate(names) if wanted in known]
        if len(numbers) > 1:
            which = ", ".join(f"{number} ({classes[number]})" for number in numbers)
            raise UserError(f"class {name!r} is the name of {len(numbers)} classes: {which}; give the number")
        if numbers:
            return numbers[0]
    if name.isdecimal():
        if int(name) < len(classes):
            return int(name)
        raise UserError(f"class {name}: there are {len(classes)} classes, 0 to {len(classes) - 1}")
    called = {part: number for number, known in enumerate(parts) for part in (*known, *lower[number])}
    near = difflib.get_close_matches(name.lower(), called, n=9) or difflib.get_close_matches(
        name.lower(), called, n=1, cutoff=0.0
    )
    meant = list(dict.fromkeys(repr(classes[called[part]]) for part in near))[:NEAREST]
    hint = f"did you mean {' or '.join(meant)}?" if meant else ""
    shown = f" (one of {', '.join(classes)})" if len(classes) <= 20 else ""
    raise UserError(f"class {name!r} is unknown; {hint}{shown}")
