"""A picture drawn again from what its PNG says of how it was made."""

from collections.abc import Iterator
from pathlib import Path

import torch

from llamagen_dist.config.section import build
from llamagen_dist.errors import UserError
from llamagen_dist.sampling.drawing import PACKAGES, Drawing, Source, draw_tokens, open_source, page, save
from llamagen_dist.sampling.grid import picture_format
from llamagen_dist.sampling.png_record import pixels_sha256, read_record
from llamagen_dist.tracking.provenance import versions


def draw_again(
    picture: Path, out: Path | None, checkpoint: Path | None, tokenizer: Path | None, text_encoder: Path | None
) -> Iterator[str]:
    """Draw what ``picture`` says that it shows; yields the lines to print; the last says whether it is the same.

    out: None writes NAME-again.png beside it.
    checkpoint, tokenizer, text_encoder: where they lie now; None takes the paths in the picture.
    Raises UserError: no intact record in the picture, other weights at these paths.
    """
    out = out or picture.with_name(f"{picture.stem}-again.png")
    picture_format(out)
    record, pixels = read_record(picture)
    wanted = build(Drawing, record, str(picture))
    if pixels != wanted.pixels_sha256:
        yield f"{picture}: its pixels were changed since it was drawn; what was drawn is made again"
    torch.set_num_threads(wanted.threads)  # sums are split among them, so their last bits depend on it
    source = open_source(
        checkpoint or Path(wanted.checkpoint),
        wanted.weights,
        tokenizer or Path(wanted.tokenizer),
        wanted.captions,
        text_encoder or (Path(wanted.text_encoder) if wanted.text_encoder else None),
        quantized=wanted.quantize,
    )
    check_source(wanted, source, str(picture))
    try:
        passes = draw_tokens(wanted, source)
    except ValueError as error:  # settings that the sampler does not take
        raise UserError(f"{picture}: {error}") from None
    made = page(wanted, source, passes)
    here = {"device": str(source.gpt.model.rotary.device), "versions": versions(*PACKAGES)}
    yield save(out, wanted.model_copy(update=here), made)
    if pixels_sha256(made) == wanted.pixels_sha256:
        yield f"the same as {picture} when it was drawn, pixel by pixel"
        return
    was = {"device": wanted.device} | wanted.versions
    now = {"device": here["device"]} | versions(*PACKAGES)
    differs = [f"{name} {was[name]} -> {now.get(name)}" for name in was if was[name] != now.get(name)]
    yield f"not the same as {picture} when it was drawn ({', '.join(differs) or 'perhaps another processor'})"


def check_source(wanted: Drawing, source: Source, where: str) -> None:
    """Raises UserError unless these are the weights and captions that a picture was drawn from.

    where: begins the message.
    """
    gpt, tokenizer, captions = source.gpt, source.tokenizer, source.conditions
    for what, path, is_now, was in (
        ("the checkpoint", gpt.path, gpt.checkpoint.identity, wanted.checkpoint_sha256),
        ("the tokenizer", tokenizer.path, tokenizer.sha256, wanted.tokenizer_sha256),
        ("the text encoder", wanted.text_encoder, captions.identity, wanted.conditions_sha256),
    ):
        if is_now != was:
            raise UserError(
                f"{where}: was drawn by {what} with sha256 {str(was)[:12]}…, but {path} has {str(is_now)[:12]}…; say "
                "where the one from then lies (CHECKPOINT, --tokenizer, --text-encoder)"
            )
    if not all(0 <= row < captions.count for row in wanted.rows):
        raise UserError(f"{where}: rows: there are {captions.count} classes or captions, 0 to {captions.count - 1}")
    if not all(0 <= seed < 1 << 31 and 0 <= number < 1 << 16 for seed, number in wanted.pictures):
        raise UserError(f"{where}: pictures: seeds are below 2^31 and numbers below 2^16")
