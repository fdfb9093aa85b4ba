"""One picture file of ``llamagen generate``: everything that decides its pixels, and how it is drawn from that."""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from pydantic import Field, TypeAdapter, ValidationError
from torch import Tensor

from llamagen_dist.config import Section
from llamagen_dist.config.section import PositiveInt
from llamagen_dist.console import Progress
from llamagen_dist.data.text_encoder import CaptionEncoder
from llamagen_dist.errors import UserError
from llamagen_dist.sampling import grid, int8
from llamagen_dist.sampling.conditions import Conditions, classes, encoded_captions, encoder_of
from llamagen_dist.sampling.guidance import misguided
from llamagen_dist.sampling.load import (
    Tokenizer,
    TrainedGPT,
    load_gpt,
    load_tokenizer,
    maker_of,
    open_checkpoint,
    tokenizer_of,
)
from llamagen_dist.sampling.pictures import BATCH, Settings, decode_tokens, model_tokens, sample_seeds
from llamagen_dist.sampling.png_record import pixels_sha256, record_text
from llamagen_dist.tracking.provenance import versions

PACKAGES = ("torch", "numpy", "pillow")  # that decide the pixels
AXES = {"cfg": "cfg_scale", "beta": "beta", "temperature": "temperature", "top-k": "top_k", "top-p": "top_p"} | {
    "first-tokens": "first_tokens"
}
"""What ``--grid-over`` may vary: the option -> the field of Settings."""


@dataclass(frozen=True)
class Source:
    """What pictures are drawn from, opened and checked to belong together."""

    gpt: TrainedGPT
    tokenizer: Tokenizer
    conditions: Conditions
    encoder: CaptionEncoder | None = None
    """Of captions."""
    quantized: Literal["int8"] | None = None
    """What the GPT's linear layers were rounded to."""


class Drawing(Section):
    """Everything that decides a picture file's pixels. Its PNG carries this, and ``--again`` reads it."""

    format: Literal[1] = 1
    checkpoint: str
    """The step folder or weights file that the GPT was read from."""
    weights: str | None
    checkpoint_sha256: str
    tokenizer: str
    tokenizer_sha256: str
    text_encoder: str | None = None
    conditions_sha256: str | None = None
    """Of the captions and their encoder."""
    rows: tuple[int, ...]
    """The label of each row's class, or the number of its caption."""
    names: tuple[str, ...]
    """The rows' classes or captions in words."""
    captions: tuple[str, ...] | None
    """All captions; null for classes."""
    cut: dict[int, int] = Field(default_factory=dict)
    """Captions whose end the GPT does not see, by number, with how many tokens they have."""
    pictures: tuple[tuple[int, int], ...]
    """(seed, number) of each picture in a row; its noise also depends on the row's class or caption number."""
    quantize: Literal["int8"] | None = None
    settings: dict[str, Any]
    """The fields of ``pictures.Settings``."""
    axes: dict[str, tuple[float, ...]] = Field(default_factory=dict)
    """Settings that are varied: down the rows, then across the columns."""
    show: Literal["pictures", "film"] = "pictures"
    """film: the first picture, as far as it is after each row of tokens."""
    batch: tuple[int, ...]
    """How many samples were computed together, one batch after the other: the last bits depend on it."""
    device: str
    threads: PositiveInt
    versions: dict[str, str]
    pixels_sha256: str = ""
    """Of the picture that was drawn."""

    def rules(self) -> Iterator[str]:
        if not self.rows or sum(self.batch) != len(self.rows) * len(self.pictures) or min(self.batch) < 1:
            yield f"batch: {self.batch} do not add up to the {len(self.rows)} x {len(self.pictures)} pictures"
        if unknown := [name for name in self.axes if name not in AXES]:
            yield f"axes: {unknown[0]} is not one of {', '.join(AXES)}"
        if unknown := sorted(self.settings.keys() - {field.name for field in fields(Settings)}):
            yield f"settings: this version does not know {', '.join(unknown)}"

    def points(self) -> list[Settings]:
        """The settings of every pass over the pictures; one, unless axes vary them. Raises UserError."""
        try:
            base = TypeAdapter(Settings).validate_python(self.settings)
        except ValidationError as error:
            raise UserError(f"settings: {error.errors()[0]['msg']}") from None
        steps: list[list[tuple[str, Any]]] = [
            [(AXES[name], int(v) if name in ("top-k", "first-tokens") else float(v)) for v in values]
            for name, values in self.axes.items()
        ]
        return [replace(base, **dict(point)) for point in itertools.product(*steps)]


def open_source(
    checkpoint: Path,
    weights: str | None,
    tokenizer: Path | None,
    captions: Sequence[str] | None,
    text_encoder: Path | None,
    either: bool = False,
    quantized: Literal["int8"] | None = None,
) -> Source:
    """Load a GPT and its tokenizer, onto the GPU where there is one, and encode the captions.

    weights: as ``Checkpoint.open`` takes it.
    tokenizer, text_encoder: None takes the ones that the checkpoint names.
    captions: None for a class-conditional GPT.
    either: whether a GPT may also be text-conditional without captions, which then come later.
    quantized: round its linear layers to int8.
    Raises UserError: not there, of other kinds, or not made for each other.
    """
    torch.backends.cudnn.allow_tf32 = False  # pictures are decoded as tokens were encoded: in full fp32
    torch.backends.cudnn.deterministic = True
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    opened = open_checkpoint(checkpoint, "checkpoint", which=weights)
    named = load_tokenizer(tokenizer or tokenizer_of(opened), key="--tokenizer", made=maker_of(opened))
    gpt = load_gpt(opened, named)
    by_class = gpt.config.condition == "class"
    if by_class and captions is not None:
        raise UserError(f"--caption: {checkpoint} is conditioned on classes; use --class")
    if not (by_class or either or captions is not None):
        raise UserError(f"--class: {checkpoint} is conditioned on text; use --caption TEXT")
    encoder = None if by_class else encoder_of(gpt, text_encoder, device, "--text-encoder")
    found = classes(gpt) if encoder is None else encoded_captions(captions or [""], gpt, encoder)
    if quantized is not None:
        int8.quantize(gpt.model)
    gpt.model.to(device)
    named.model.to(device)
    return Source(gpt, named, found, encoder, quantized)


def drawing(
    source: Source,
    weights: str | None,
    captions: Sequence[str] | None,
    text_encoder: Path | None,
    rows: Sequence[int],
    pictures: Sequence[tuple[int, int]],
    settings: Settings,
    axes: dict[str, tuple[float, ...]],
) -> Drawing:
    """What is asked for, with all that decides it written down."""
    gpt, count = source.gpt, len(rows) * len(pictures)
    encoder = text_encoder or (gpt.captions and gpt.captions["encoder"])
    return Drawing(
        checkpoint=str((gpt.checkpoint.folder or gpt.path).absolute()),
        weights=weights,
        checkpoint_sha256=gpt.checkpoint.identity,
        tokenizer=str(source.tokenizer.path.absolute()),
        tokenizer_sha256=source.tokenizer.sha256,
        text_encoder=None if captions is None else str(Path(str(encoder)).absolute()),
        conditions_sha256=source.conditions.identity,
        rows=tuple(rows),
        names=tuple(map(source.conditions.name, rows)),
        captions=None if captions is None else tuple(captions),
        cut=dict(source.conditions.cut),
        pictures=tuple(pictures),
        quantize=source.quantized,
        settings={name: value for name, value in asdict(settings).items() if value is not None},
        axes=axes,
        batch=tuple(min(BATCH, count - start) for start in range(0, count, BATCH)),
        device=str(gpt.model.rotary.device),
        threads=torch.get_num_threads(),
        versions=versions(*PACKAGES),
    )


def draw_tokens(wanted: Drawing, source: Source) -> list[Tensor]:
    """int64 [rows x pictures, N] for each of the drawing's ``points``; shown with progress. Raises UserError."""
    labels = torch.tensor(wanted.rows).repeat_interleave(len(wanted.pictures))
    seeds = torch.tensor([seed for seed, _ in wanted.pictures]).repeat(len(wanted.rows))
    numbers = torch.tensor([number for _, number in wanted.pictures]).repeat(len(wanted.rows))
    noise = sample_seeds(seeds, (labels << 16) + numbers)
    for settings in wanted.points():
        if (reason := misguided(source.gpt.config, settings.cfg_scale, settings.beta)) is not None:
            raise UserError(f"{source.gpt.path}: {reason}")
    passes = []
    with Progress("pictures", len(wanted.points()) * len(labels)) as progress:
        for settings in wanted.points():
            made = []
            for batch, keys in zip(labels.split(wanted.batch), noise.split(wanted.batch), strict=True):
                made.append(model_tokens(source.gpt.model, source.conditions.at(batch), keys, settings).cpu())
                progress.advance(len(batch))
            passes.append(torch.cat(made))
    return passes


def page(wanted: Drawing, source: Source, passes: Sequence[Tensor]) -> Image.Image:
    """The picture file, from the tokens of ``draw_tokens``."""
    if wanted.show == "film":
        stages = film(source, passes[0][0])
        seed, number = wanted.pictures[0]
        by_prefix = source.tokenizer.model.config.token_count is not None
        after = "from its first tokens" if by_prefix else "after each row of tokens"
        title = f"{wanted.names[0]}, {_picture_name(seed, number)}: {after}"
        texts = [f"{row} of {len(stages)}" for row in range(1, len(stages) + 1)]
        return grid.contact_sheet([Image.fromarray(stage) for stage in stages], texts, title)
    images = np.stack([_decoded(source, tokens, wanted.batch) for tokens in passes])
    if not wanted.axes:
        labels = np.repeat(wanted.rows, len(wanted.pictures))
        return grid.class_grid(images[0], labels, source.conditions.name, len(wanted.pictures))
    (down, values), *across = wanted.axes.items()
    seeds = [_picture_name(*picture) for picture in wanted.pictures]
    headings = [f"{name} {value:g}" for name, settings in across for value in settings for _ in wanted.pictures]
    columns = headings or seeds
    cells = images.reshape(len(values), len(columns), *images.shape[2:])
    title = f"{wanted.names[0]}, {', '.join(seeds)}" if across else wanted.names[0]
    return grid.labelled_grid(cells, [f"{down} {value:g}" for value in values], columns, title)


def _picture_name(seed: int, number: int) -> str:
    return f"seed {seed}" + (f" ({number})" if number else "")


def _decoded(source: Source, tokens: Tensor, batch: Sequence[int]) -> NDArray[np.uint8]:
    return np.concatenate([decode_tokens(source.tokenizer.model, part) for part in tokens.split(list(batch))])


def film(source: Source, tokens: Tensor) -> NDArray[np.uint8]:
    """One image as far as it is after each row of tokens: uint8 [rows, S, S, 3], grey where there are no codes yet.
    Of prefix tokens: after each token.

    tokens: int64 (N,). The decoder sees a whole grid, in which the last row that is there stands for those to come:
    its lower edge then looks as little as possible like the edge of a picture.
    """
    if source.tokenizer.model.config.token_count is not None:
        counts = range(1, len(tokens) + 1)
        return np.concatenate([decode_tokens(source.tokenizer.model, tokens[None, :count]) for count in counts])
    side = int(len(tokens) ** 0.5)
    codes, stages = tokens.view(side, side), []
    for row in range(side):
        seen = codes[torch.arange(side).clamp(max=row)]
        stage = decode_tokens(source.tokenizer.model, seen.reshape(1, -1))[0]
        stage[(row + 1) * len(stage) // side :] = 160
        stages.append(stage)
    return np.stack(stages)


def save(path: Path, wanted: Drawing, picture: Image.Image) -> str:
    """Write the picture with what it was drawn from, and return the line that says so. Raises UserError."""
    record = wanted.model_copy(update={"pixels_sha256": pixels_sha256(picture)}).model_dump(mode="json")
    grid.save(path, lambda: picture, record_text(record))
    kept = grid.picture_format(path) == "PNG"
    return f"{path}" if kept else f"{path}    # only a .png says how it was made, for --again"
