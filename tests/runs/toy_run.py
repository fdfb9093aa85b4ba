"""A program with a GPT's config and none of its cost: it writes down its rate; the seed says how it ends."""

import os
import signal
import time

from llamagen_dist.config import load
from llamagen_dist.errors import UserError
from llamagen_dist.program import run


def main(argv: list[str]) -> None:
    config = load(argv[0], kind="gpt")
    config.run_dir.mkdir(parents=True, exist_ok=True)
    written = config.run_dir / f"rate_{os.environ['RANK']}.txt"
    with open(written, "a") as file:
        file.write(f"{config.optim.lr!r}\n")
    mended = config.run_dir.parent / "mended"
    if config.train.seed == 13 and not mended.exists():
        raise UserError("toy.yaml: thirteen is nonsense; give it sense")
    if config.train.seed == 14 and not mended.exists():
        [][config.train.seed]
    if config.train.seed == 16 and written.name == "rate_0.txt" and len(written.read_text().split()) == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(config.guard.hang_minutes if config.train.seed == 15 else 0)


if __name__ == "__main__":
    run(main)
