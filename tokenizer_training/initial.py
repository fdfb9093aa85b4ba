"""init_from: a new run that starts from another tokenizer's weights, whatever else their file lacks.

Released weights have neither optimizer nor discriminator; both start fresh here, from any source. Refused: another
quantizer, codebook or size, since a tensor of another meaning would be trained on as if nothing were wrong.
"""

from typing import Any

import torch

from llamagen_dist.checkpoint import llamagen
from llamagen_dist.checkpoint.checkpoint import Checkpoint
from llamagen_dist.checkpoint.foreign import PLAIN_CODES
from llamagen_dist.config import TokenizerConfigFile
from llamagen_dist.errors import UserError
from llamagen_dist.models.quantizer import VectorQuantizer
from llamagen_dist.models.quantizers import quantizer_of
from llamagen_dist.models.vq import VQModel
from llamagen_dist.parallel.topology import Topology


def start_from(model: VQModel, config: TokenizerConfigFile, topology: Topology) -> dict[str, Any] | None:
    """Put the weights of ``config.init_from`` into ``model`` (collective); what record.json says of them.

    None without ``init_from``. Prints what was filled and what starts fresh. Raises UserError for a source that is
    missing, damaged or does not fit; the model is then as it was.
    """
    if config.init_from is None:
        return None
    try:
        source = Checkpoint.open(config.init_from, topology)
        _check(source, model, config)
    except UserError as error:
        raise UserError(f"init_from: {error}") from None
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if name != llamagen.STATISTIC:
                tensor.copy_(source.read(name))
    parameters = sum(p.numel() for p in model.parameters())
    d = config.loss.discriminator
    alone = f", alone for {d.warmup_images:,} images" if d.warmup_images else ""
    joins = f"discriminator (from image {d.start_images:,} of this run{alone})" if d.takes_part else "no discriminator"
    topology.log0(
        f"init_from: all {parameters:,} parameters of {source.folder or source.path} (sha256 "
        f"{source.identity[:12]}…); fresh: optimizer, image count, code usage, {joins}"
    )
    record: dict[str, Any] = {"path": str(source.path), "weights_sha256": source.identity}
    if source.folder is not None:
        record |= {"folder": str(source.folder), "images_seen": source.state.get("images_seen")}
    return record


def _check(source: Checkpoint, model: VQModel, config: TokenizerConfigFile) -> None:
    path, shapes = source.path, dict(source.shapes)
    if "tok_embeddings.weight" in shapes:
        raise UserError(f"{path} is a GPT; give a tokenizer's run directory, step folder or weights file")
    state = model.state_dict()
    theirs, ours = quantizer_of(source.read_all()), quantizer_of(state)
    if theirs != ours:
        raise UserError(
            f"{path} was trained with the quantizer {theirs}, and model.quantizer says {ours}; use the same"
        )
    plain = True if shapes.pop(PLAIN_CODES, None) is not None else None  # None: a bare file that does not say it
    if isinstance(source.config, TokenizerConfigFile):
        plain = not source.config.model.l2_norm
    if ours == VectorQuantizer.kind and plain is config.model.l2_norm:
        how = "as they are" if plain else "normalised"
        raise UserError(f"{path} compares its codes {how}; set model.l2_norm={'false' if plain else 'true'}")
    table = "quantize.embedding.weight"
    if table in state and shapes.get(table, state[table].shape) != tuple(state[table].shape):
        (codes, dim), own = shapes[table], tuple(state[table].shape)
        raise UserError(
            f"{path} has {codes:,} codes of {dim} numbers, and this run {own[0]:,} of {own[1]}; set "
            f"model.codebook_size={codes} and model.codebook_dim={dim}, or train a new tokenizer"
        )
    expected = {name: tuple(tensor.shape) for name, tensor in state.items()}
    problem = llamagen.first_difference(shapes, expected, "this run's model")
    if problem is not None:
        raise UserError(f"{path}: {problem}; make model.* the source's own sizes")
