"""PROGRAM: train the image tokenizer on image shards.

    torchrun --nproc-per-node=8 -m tokenizer_training.train configs/tokenizer/VQ-16.yaml run_dir=runs/VQ-16

also plain ``python -m`` for one rank, or ``srun``. The same command again resumes.
"""

import torch

from llamagen_dist.build import build_vq
from llamagen_dist.checkpoint.folder import complete
from llamagen_dist.config import TokenizerConfigFile, load
from llamagen_dist.data.images import ImageStream
from llamagen_dist.data.shards import Shards, open_shards
from llamagen_dist.errors import UserError
from llamagen_dist.parallel.topology import start
from llamagen_dist.program import run as run_program
from llamagen_dist.training.fit import fit
from llamagen_dist.training.initial import note_source
from llamagen_dist.training.run import open_run
from tokenizer_training.initial import start_from
from tokenizer_training.task import TokenizerTask


def main(argv: list[str]) -> None:
    if not argv:
        raise UserError("usage: python -m tokenizer_training.train CONFIG [key=value …]")
    config: TokenizerConfigFile = load(argv[0], argv[1:], kind="tokenizer")
    topology = start(1, config.parallel.threads, 60 * config.guard.start_minutes, config.run_dir)
    images = open_shards(config.data.train, "images", config.data)
    held_out = open_shards(config.data.validation, "images", config.data)
    stream = ImageStream(
        images,
        topology,
        config.train.global_batch,
        config.train.seed,
        config.data.image_size,
        random_crop=config.data.random_crop,
        horizontal_flip=config.data.horizontal_flip,
        workers=config.data.workers,
        window_shards=config.data.window_shards,
    )
    torch.manual_seed(config.train.seed)  # for the initial weights only; nothing after them draws from it
    model, source = build_vq(config.model), None
    if not topology.broadcast_from_rank0(lambda: complete(config.run_dir)):
        source = start_from(model, config, topology)  # before DDP, which sends rank 0's weights to all
    task = TokenizerTask(model, config, topology, held_out)
    trained_on, measured_on = images.manifest.fingerprint(), held_out.manifest.fingerprint()
    with open_run(config, topology, fingerprint=trained_on, held_out=measured_on, label="tokenizer") as run:
        run.say(
            f"tokenizer: {task.parameters:,} parameters, {topology.world} ranks, "
            f"{config.train.images:,} images of {config.data.image_size} x {config.data.image_size} pixels"
        )
        for key, shards in (("data.train", images), ("data.validation", held_out)):
            if said := enlarged(key, shards, config.data.image_size):
                run.say(said)
        run.say(task.loss.describe())
        run.say(task.describe_quantizer())
        if source is None and run.newest is None:  # all its checkpoints are damaged: it begins again
            source = start_from(model, config, topology)
            task.restart_average()
        note_source(run, source)
        fit(task, stream, config, run)


def enlarged(key: str, shards: Shards, size: int) -> str:
    """A sentence where the images, as far as their manifest says, are smaller than they are trained on; else empty."""
    stored = shards.manifest.image_size
    if stored is None or stored >= size:
        return ""
    return (
        f"{key}: images of {stored} x {stored} pixels are enlarged to data.image_size {size} (bicubic), which adds "
        "nothing to be learned"
    )


if __name__ == "__main__":
    run_program(main)
