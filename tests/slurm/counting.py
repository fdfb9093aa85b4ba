"""A program that costs nothing and resumes: it counts, saves what it counted as a run's checkpoints, and can go wrong.

COUNT in the environment: ``STEPS PAUSE EVERY [FAULT]``. It saves every EVERY steps and when it is told to stop.
FAULT: ``deaf=S`` does not listen to signals for S seconds, ``die=N`` kills rank 1 before step N in the first
incarnation, ``dies=N`` in every one, ``refuse=N`` and ``nan=N`` end rank 0 there as a user's mistake or a loss that is
not finite.
"""

import time

STARTED = time.time()

import os  # noqa: E402 - what is imported is not the launcher's time
import signal  # noqa: E402
from pathlib import Path  # noqa: E402

from llamagen_dist.config import load  # noqa: E402
from llamagen_dist.errors import Stopped, UserError  # noqa: E402
from llamagen_dist.program import run  # noqa: E402

RANK = int(os.environ["RANK"])


class NonFiniteError(Exception):
    """Named as training's own."""


def counted(folder: Path) -> list[str]:
    """Lines of steps.txt: what rank 0 has counted."""
    return (folder / "steps.txt").read_text().split() if (folder / "steps.txt").exists() else []


def main(argv: list[str]) -> None:
    folder: Path = load(argv[0], kind="gpt").run_dir
    if RANK == 0:
        with open(folder / "started.txt", "a") as file:
            file.write(f"{STARTED}\n")
    steps, pause, every, *fault = os.environ["COUNT"].split()
    what, _, at = (fault or ["none=0"])[0].partition("=")
    if what == "deaf":
        time.sleep(float(at))
    asked: list[int] = []
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2):
        signal.signal(number, lambda n, _: asked.append(n))
    saved = sorted((folder / "checkpoints").glob("step_*"))
    step = int(saved[-1].name.removeprefix("step_")) if saved else 0
    first = os.environ["LLAMAGEN_OWNER"].endswith(".0")
    lost = folder / f"lost-{os.environ['LLAMAGEN_OWNER']}"
    while step < int(steps):
        if step + 1 == int(at):
            if RANK == 1 and (what == "dies" or (what == "die" and first)):
                while int((counted(folder) or ["0"])[-1]) < step:  # rank 0 may have started later
                    time.sleep(0.01)
                lost.touch()
                os.kill(os.getpid(), signal.SIGKILL)
            if RANK == 0 and what == "refuse":
                raise UserError("toy.yaml: step is nonsense; give it sense")
            if RANK == 0 and what == "nan":
                raise NonFiniteError("loss or gradient not finite")
        time.sleep(float(pause))
        if lost.exists():
            os._exit(1)  # as a collective would end without the other rank: nothing is counted or saved
        step += 1
        if RANK == 0:
            with open(folder / "steps.txt", "a") as file:
                file.write(f"{step}\n")
            if step % int(every) == 0 or asked:
                mark = folder / f"checkpoints/step_{step:08d}/COMPLETE"
                mark.parent.mkdir(parents=True)
                mark.touch()
        if asked:
            raise Stopped(f"stopped at step {step}")


if __name__ == "__main__":
    run(main)
