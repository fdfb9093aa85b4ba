"""PROGRAM: FID, sFID, KID, precision, recall and class agreement of image sets against real images.

    torchrun --nproc-per-node=8 -m eval.evaluate configs/eval/plain.yaml generated=PATH reference=PATH out=FILE.json

also plain ``python -m`` for one rank, or ``srun``. A PATH is an .npz (arr_0), a folder of image shards, or a folder or
zip of pictures; ``generated=null sample.checkpoint=RUN sample.tokenizer=RUN`` scores what a GPT draws, without files.
The ranks share out the images; the numbers do not depend on how many there are. What cannot be measured is in the
result's ``absent``, with the reason.
"""

from llamagen_dist.config import EvaluateConfig, load
from llamagen_dist.errors import UserError
from llamagen_dist.evaluation import scoring
from llamagen_dist.parallel.topology import full_fp32, start
from llamagen_dist.program import run as run_program


def main(argv: list[str]) -> None:
    if not argv:
        raise UserError("usage: python -m eval.evaluate CONFIG generated=PATH reference=PATH out=FILE.json")
    config: EvaluateConfig = load(argv[0], argv[1:], kind="evaluate")
    topology = start(threads=config.threads)
    full_fp32()
    if config.out.is_dir():
        raise UserError(f"out: {config.out} is a folder; name the JSON file to write")
    result = scoring.evaluate(config, topology, _file_alone(argv[0]))
    if topology.rank == 0:
        scoring.write(config.out, result)
        scoring.show(result)


def _file_alone(file: str) -> EvaluateConfig | None:
    """The config without the command line; None where it needs one."""
    try:
        config: EvaluateConfig = load(file, kind="evaluate")
    except UserError:
        return None
    return config


if __name__ == "__main__":
    run_program(main)
