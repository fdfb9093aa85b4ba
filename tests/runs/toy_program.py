"""A program small enough to launch in a test: what it does is its first argument."""

import os
import signal
import sys
import time
from pathlib import Path

from llamagen_dist.console import Progress
from llamagen_dist.errors import Stopped, UserError
from llamagen_dist.program import run

RANK, WORLD = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
VERSION = "as launched"


def join(out: Path) -> None:
    """All ranks meet over gloo and add up rank + 1."""
    import torch
    import torch.distributed as dist

    dist.init_process_group("gloo")
    total = torch.tensor([RANK + 1.0])
    dist.all_reduce(total)
    names = ("LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "OMP_NUM_THREADS", "PYTHONPATH")
    facts = {name: os.environ[name] for name in names}
    facts |= {"progress": os.environ.get("LLAMAGEN_PROGRESS", "none"), "cwd": os.getcwd(), "file": __file__}
    lines = [f"total={total.item():.0f}", f"world={WORLD}", *(f"{k}={v}" for k, v in facts.items())]
    (out / f"joined_{RANK}.txt").write_text("\n".join(lines))


def work(out: Path, steps: int, pause: float) -> None:
    """Count to ``steps`` in a file; a signal raises a flag, and the step after it saves and stops."""
    asked: list[int] = []
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2):
        signal.signal(number, lambda n, _: asked.append(n))
    file = out / f"steps_{RANK}.txt"
    seen = file.read_text().split() if file.exists() else []
    with Progress("counting", steps) as progress:
        while len(seen) < steps:
            time.sleep(pause)
            seen.append(str(len(seen)))
            progress.set(len(seen), "ok")
            if asked:
                break
    file.write_text(" ".join(seen))
    (out / f"version_{RANK}.txt").write_text(VERSION)
    if len(seen) < steps:
        raise Stopped(f"stopped at step {len(seen)}")


def main(argv: list[str]) -> None:
    what, out, *rest = argv
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    if what == "join":
        join(folder)
    elif what == "work":
        work(folder, int(rest[0]), float(rest[1]))
    elif what == "touch":
        with open(folder / "touched.txt", "a") as file:
            file.write("x")
    elif what == "mend":
        if not (folder / "mended").exists():
            raise UserError("toy.yaml: nonsense was given; mend it")
    elif int(rest[0]) != RANK:
        time.sleep(600)  # deaf: it would wait for the other rank for ever
    elif what == "refuse":
        raise UserError(f"toy.yaml: rank {RANK} was given nonsense; give it sense")
    elif what == "crash":
        [][RANK]
    elif what == "die":
        print("about to die", flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
    else:
        sys.exit(7)


if __name__ == "__main__":
    run(main)
