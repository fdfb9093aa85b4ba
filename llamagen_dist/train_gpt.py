"""PROGRAM: train a Llama GPT on token shards.

    torchrun --nproc-per-node=2 -m llamagen_dist.train_gpt configs/gpt/ladder.yaml run_dir=runs/ladder data.train=… …

also plain ``python -m`` for one rank, or ``srun``. The same command again resumes. A config with a ``ladder`` trains
its rungs one after another in run_dir/NAME, in one process start.
"""

from dataclasses import dataclass
from functools import partial

from llamagen_dist.build import build_gpt_on_meta, fresh_weights, gpt_config
from llamagen_dist.checkpoint.folder import complete
from llamagen_dist.config import GPTConfigFile, load, rungs
from llamagen_dist.data.manifest import Manifest
from llamagen_dist.data.prefetch import Prefetcher
from llamagen_dist.data.shards import Shards, open_shards
from llamagen_dist.data.tokens import TokenStream, check_captions
from llamagen_dist.errors import Stopped, UserError
from llamagen_dist.models.gpt import GPTConfig
from llamagen_dist.parallel.division import check_split, divide_batch
from llamagen_dist.parallel.topology import Topology, start
from llamagen_dist.program import run as run_program
from llamagen_dist.sampling.guidance import misguided
from llamagen_dist.sampling.load import load_tokenizer
from llamagen_dist.tracking import evaluations
from llamagen_dist.training.fit import fit
from llamagen_dist.training.gpt_task import GPTTask
from llamagen_dist.training.initial import Initial, initial_weights, note_origin
from llamagen_dist.training.run import open_run


def main(argv: list[str]) -> None:
    if not argv:
        raise UserError("usage: python -m llamagen_dist.train_gpt CONFIG [key=value …]")
    config: GPTConfigFile = load(argv[0], argv[1:], kind="gpt")
    topology = start(config.parallel.tensor, config.parallel.threads, 60 * config.guard.start_minutes, config.run_dir)
    # every refusal comes before any training
    plan = [_rung(name, rung, topology) for name, rung in rungs(config)]
    for number, rung in enumerate(plan, 1):
        stopped = train_one(rung, rung.name if len(plan) == 1 else f"{rung.name} ({number}/{len(plan)})", topology)
        if stopped and number < len(plan):
            raise Stopped(f"{config.run_dir}: stopped after {rung.name}; the same command continues with the next one")


@dataclass(frozen=True)
class Rung:
    """One run: all that is read and checked before anything is trained.

    initial: what ``init_from`` names; None without it, and for a run that has checkpoints to resume from.
    """

    name: str
    config: GPTConfigFile
    train: Shards
    validation: Shards
    model: GPTConfig
    initial: Initial | None


def _rung(name: str, config: GPTConfigFile, topology: Topology) -> Rung:
    train, validation = _data(config)
    model = _model(config, train, validation, topology)
    topology.broadcast_from_rank0(lambda: _check_evaluation(config, train.manifest))
    initial = None
    # whether the checkpoints that are there are good is verified once, when the run is opened
    if not topology.broadcast_from_rank0(lambda: complete(config.run_dir)):
        initial = initial_weights(config, model, train.manifest, topology, name)
    return Rung(name, config, train, validation, model, initial)


def _data(config: GPTConfigFile) -> tuple[Shards, Shards]:
    """Open both sets of token shards; refuse pairs that were not made by one tokenizer (and one text encoder) for one
    set of classes."""
    train, validation = (
        open_shards(folder, access=config.data) for folder in (config.data.train, config.data.validation)
    )
    for key, shards in (("data.train", train), ("data.validation", validation)):
        if shards.manifest.kind != "tokens":
            raise UserError(
                f"{key}: {shards.location} holds {shards.manifest.kind}, not tokens; run tokenizer_training.extract "
                "on it"
            )
    for what in ("tokenizer_sha256", "vocab_size", "grid", "classes"):
        if getattr(train.manifest, what) != getattr(validation.manifest, what):
            raise UserError(
                f"data.validation: its {what} differs from that of data.train; extract both with one tokenizer"
            )
    one, other = train.manifest.captions, validation.manifest.captions
    if one is not None and other is not None and one.encoder_sha256 != other.encoder_sha256:
        raise UserError("data.validation: its captions were encoded by another text encoder than those of data.train")
    return train, validation


def _model(config: GPTConfigFile, train: Shards, validation: Shards, topology: Topology) -> GPTConfig:
    model = gpt_config(config.model, **train.manifest.gpt_sizes(train.location))
    if model.condition == "text":
        check_captions(train, model.prefix, model.caption_dim, config.data.short_captions)
        check_captions(validation, model.prefix, model.caption_dim, 0.0)
    check_split(model, topology.tensor)
    divide_batch(config.train, topology.dp)
    return model


def _check_evaluation(config: GPTConfigFile, tokens: Manifest) -> None:
    """Refuse, before the training, to score its checkpoints with another tokenizer than that of its tokens."""
    if config.evaluation is None:
        return
    evaluations.check(config)
    drawn, scored = evaluations.sampling(config.evaluation), evaluations.scoring(config.evaluation)
    if (reason := misguided(config.model, drawn.cfg_scale, drawn.beta)) is not None:
        raise UserError(f"evaluation: {reason}")
    path, made = drawn.tokenizer, tokens.tokenizer_sha256
    tokenizer = load_tokenizer(path, drawn.tokenizer_model, "evaluation.tokenizer", "tokenizer_model", made=made)
    if made not in (None, tokenizer.sha256):
        raise UserError(
            f"evaluation.tokenizer: {tokenizer.path} (sha256 {tokenizer.sha256[:12]}…) is not the one that made the "
            f"tokens of data.train (sha256 {str(made)[:12]}…); name that one"
        )
    if scored.reference is not None and not scored.reference.exists():
        raise UserError(f"evaluation.reference: {scored.reference} does not exist; name real images, or statistics")


def train_one(rung: Rung, label: str, topology: Topology) -> bool:
    """One run in its run directory, from where it stands to its end. Returns whether a signal came in its last step."""
    config, model, train, validation = rung.config, rung.model, rung.train, rung.validation
    prints = train.manifest.fingerprint(), validation.manifest.fingerprint()
    with open_run(config, topology, config.run_dir, train.manifest.classes, prints[0], label, prints[1]) as run:
        initial = rung.initial
        if initial is None and run.newest is None:  # all its checkpoints are damaged: it begins again
            initial = initial_weights(config, model, train.manifest, topology, rung.name)
        note_origin(run, initial, train.manifest)
        stream = token_stream(train, config, model, topology, training=True)
        held_out = token_stream(validation, config, model, topology, training=False)
        task = GPTTask(
            build_gpt_on_meta(model, config.train.seed),
            config,
            topology,
            rung.name,
            partial(held_out.validation_batches, config.validation.images, config.validation.batch),
            fresh_weights(model, config.train.seed) if initial is None else initial.tensor,
            0 if run.newest is None else run.newest.state["images_seen"],
        )
        run.say(
            f"{label}: {task.parameters:,} parameters, {topology.world} ranks (tensor {topology.tensor}, "
            f"data {topology.dp}, ZeRO-{config.parallel.zero}), {config.train.images:,} images"
        )
        with Prefetcher(stream, config.train.global_batch, pin=topology.device.type == "cuda") as batches:
            return fit(task, batches, config, run)


def token_stream(
    shards: Shards, config: GPTConfigFile, model: GPTConfig, topology: Topology, training: bool
) -> TokenStream:
    """The batches of one set; nothing is dropped or shortened unless they are for training."""
    return TokenStream(
        shards,
        topology,
        config.train.global_batch,
        config.train.seed,
        config.model.class_dropout_p if training else 0.0,
        (model.prefix, model.caption_dim) if model.condition == "text" else None,
        config.data.short_captions if training else 0.0,
        config.data.window_shards,
    )


if __name__ == "__main__":
    run_program(main)
