"""PROGRAM: the held-out loss of a GPT at every token position, as numbers and as a picture.

    torchrun --nproc-per-node=8 -m eval.token_loss configs/eval/token-loss.yaml checkpoint=RUN data=SHARDS out=FILE.json

also plain ``python -m`` for one rank, or ``srun``. The numbers are the same to the last bit on any number of ranks.
"""

import json
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from llamagen_dist.build import gpt_config
from llamagen_dist.checkpoint.checkpoint import Checkpoint
from llamagen_dist.config import GPTConfigFile, TokenLossConfig, load
from llamagen_dist.console import LOG
from llamagen_dist.data.batch import TokenBatch
from llamagen_dist.data.shards import Shards, open_shards
from llamagen_dist.data.tokens import TokenStream
from llamagen_dist.errors import UserError
from llamagen_dist.files import write_bytes, write_text
from llamagen_dist.models.cost import LOSS_CHUNK
from llamagen_dist.models.gpt import GPT
from llamagen_dist.models.loss import token_nll
from llamagen_dist.parallel.topology import Topology, full_fp32, start
from llamagen_dist.program import run as run_program
from llamagen_dist.report import figures, plots
from llamagen_dist.sampling.load import WEIGHTS, fill, open_checkpoint
from llamagen_dist.tracking.provenance import versions


def main(argv: list[str]) -> None:
    if not argv:
        raise UserError("usage: python -m eval.token_loss CONFIG checkpoint=PATH data=SHARDS out=FILE.json")
    config: TokenLossConfig = load(argv[0], argv[1:], kind="token_loss")
    topology = start(threads=config.threads)
    full_fp32()
    if config.out.suffix != ".json" or config.out.is_dir():
        raise UserError(f"out: {config.out} must name a .json file; the picture is called alike")
    shards = open_shards(config.data, "tokens")
    checkpoint = open_checkpoint(config.checkpoint, "checkpoint", topology, WEIGHTS[config.weights])
    model = load_model(config, checkpoint, shards).to(topology.device)
    count = min(config.limit or len(shards), len(shards))
    shape = (model.config.prefix, model.config.caption_dim) if model.config.condition == "text" else None
    batches = TokenStream(shards, topology, topology.dp, 0, 0.0, shape).validation_batches(count, config.batch)
    loss, null = loss_by_position(model, batches, count, config.batch, topology)
    identity = checkpoint.identity  # collective
    topology.broadcast_from_rank0(lambda: finish(config, identity, shards, count, loss, null))


def load_model(config: TokenLossConfig, checkpoint: Checkpoint, shards: Shards) -> GPT:
    """The GPT, in evaluation mode. Raises UserError: not a GPT, other sizes than the shards', of other encoders."""
    trained, section, manifest = checkpoint.config, config.model, shards.manifest
    if trained is not None:
        if not isinstance(trained, GPTConfigFile):
            raise UserError(f"checkpoint: {checkpoint.path} is not a GPT's run")
        section = trained.model
    if section is None:
        raise UserError(f"checkpoint: {checkpoint.path} is a bare weights file; say what it is, as in model.size=GPT-B")
    captions = None if manifest.captions is None else manifest.captions.encoder_sha256
    known = checkpoint.state.get("tokenizer", {}).get("sha256"), checkpoint.state.get("captions", {})
    pairs = [("tokenizer", known[0], manifest.tokenizer_sha256)]
    if section.condition == "text":
        pairs.append(("text encoder", (known[1] or {}).get("encoder_sha256"), captions))
    for what, seen, here in pairs:
        if seen is not None and seen != here:
            raise UserError(
                f"data: {shards.location} was made with another {what} (sha256 {str(here)[:12]}…) than "
                f"{checkpoint.path} was trained on (sha256 {seen[:12]}…)"
            )
    model = GPT(gpt_config(section, **manifest.gpt_sizes(shards.location), tensors=checkpoint.shapes))
    fill(model, checkpoint.read_all(), "checkpoint", checkpoint.path)
    return model.eval()


@torch.no_grad()
def loss_by_position(
    model: GPT, batches: Iterable[TokenBatch], count: int, batch: int, topology: Topology
) -> tuple[Tensor, Tensor]:
    """float64 [N] each, mean nats at every position in raster order: with the true condition, and with the null one.
    Their means are the trainer's ``val_loss`` and ``val_loss_null`` of the same samples.

    Every batch is summed where it was computed, and the batches in their order: any number of ranks gives the same
    bits (collective).

    model: whole, in evaluation mode, on the topology's device.
    batches: this rank's share, as ``TokenStream.validation_batches(count, batch)`` cuts them.
    count, batch: samples over all ranks, and of a batch.
    Raises UserError, on every rank, where a loss is not finite.
    """
    positions = model.config.image_tokens
    sums = torch.zeros(2, -(-count // batch), positions, dtype=torch.float64, device=topology.device)
    for share in batches:
        number = int(share.positions[0]) // batch
        share = share.to(topology.device)
        for column, condition in enumerate((share.condition, model.null_condition(share.condition))):
            sums[column, number] = _nll(model(share.tokens, condition), share.tokens).double().sum(0)
    sums = topology.sum(sums).cpu()
    loss, null = sums.sum(1) / count
    if not bool(torch.isfinite(sums).all()):
        raise UserError("the loss of some tokens is NaN or infinite: the weights are damaged, or training diverged")
    return loss, null


def _nll(logits: Tensor, tokens: Tensor) -> Tensor:
    """(B, N, V), (B, N) -> fp32 (B, N), a few rows at a time."""
    rows = max(1, LOSS_CHUNK // logits.shape[-1])
    pairs = zip(logits.flatten(0, 1).split(rows), tokens.flatten().split(rows), strict=True)
    return torch.cat([token_nll(part, targets) for part, targets in pairs]).view(tokens.shape)


def finish(config: TokenLossConfig, identity: str, shards: Shards, count: int, loss: Tensor, null: Tensor) -> None:
    """Write the numbers and the picture. Rank 0 only."""
    result: dict[str, Any] = {
        "val_loss": float(loss.mean()),
        "val_loss_null": float(null.mean()),
        "loss_by_position": loss.tolist(),
        "null_loss_by_position": null.tolist(),
        "record": {
            "checkpoint": str(config.checkpoint),
            "checkpoint_sha256": identity,
            "data": str(shards.location),
            "data_sha256": shards.manifest.fingerprint(),
            "n": count,
            "batch": config.batch,
            "grid": shards.manifest.grid,
            "meaning": "mean nats at each token, raster order; null: without the class or caption; fp32",
            "versions": versions("torch", "numpy"),
        },
    }
    picture = plots.draw(figures.by_position(loss.numpy(), null.numpy(), shards.manifest.grid), "png")
    try:
        config.out.parent.mkdir(parents=True, exist_ok=True)
        write_bytes(config.out.with_suffix(".png"), picture)
        write_text(config.out, json.dumps(result, indent=1, allow_nan=False) + "\n")
    except OSError as error:
        raise UserError(f"out: {config.out} cannot be written ({error.strerror})") from None
    first, last = (float(part.mean()) for part in (loss[: len(loss) // 4], loss[-(len(loss) // 4) :]))
    LOG.info(
        f"{count:,} samples: {result['val_loss']:.4f} nats per token ({result['val_loss_null']:.4f} without condition)"
    )
    LOG.info(f"first quarter of the picture {first:.4f}, last quarter {last:.4f}: {config.out}")


if __name__ == "__main__":
    run_program(main)
