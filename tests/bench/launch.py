"""PROGRAM: what the launcher itself costs, on a real SLURM of this machine (slurm/local_cluster.sh, root).

    python -m tests.bench.launch [--repeats 5]

Submission to the program's first line, in parts that are ours: the launch command (snapshot, lock, sbatch), ``batch
begin`` in the batch script, and a rank from submitit's call to the program's first line; SLURM's queueing is not in
them, and how much of them is Python starting and importing is shown beside. Then a signal to the requeue, for a program
that saves in no time and whose steps take 10 ms. Medians; both are wanted below 2 s.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from llamagen_dist.files import json_if_there
from llamagen_dist.launch.folder import JobFolder
from llamagen_dist.launch.slurm import batch, lock, queue
from tests.slurm.local_cluster import cluster
from tests.slurm.toy import Toy, wait_for

IMPORTS = "import llamagen_dist.cli, llamagen_dist.commands.launch, llamagen_dist.launch.slurm.launch, submitit"
WANTED_S = 2.0


def timed(words: list[str], **environment: str) -> float:
    began = time.perf_counter()
    subprocess.run(words, check=True, capture_output=True, env={**os.environ, **environment})
    return time.perf_counter() - began


def once(toy: Toy, name: str) -> dict[str, float]:
    """One launch, one signal. Seconds by part."""
    began = time.time()
    done = toy.launch(name, "400 0.01 1000", nodes=1)
    submitted = time.time()
    assert done.returncode == 0, done.stderr
    wait_for(lambda: toy.steps(name))
    place = JobFolder.of(toy.run(name))
    first = float((toy.run(name) / "started.txt").read_text().split()[0])
    wait_for(lambda: len(toy.steps(name)) > 20)
    asked = time.time()
    queue.signal(toy.job(name))
    wait_for(lambda: toy.last(name)["event"] == "requeued")
    requeued = toy.last(name)["time"]
    owner = f"{toy.job(name)}.0"
    wait_for(lambda: toy.last(name)["event"] == "done")
    note = json_if_there(place.ranks(owner) / "rank_0.json")
    held = lock.read(place)
    assert note is not None
    assert held is not None
    works = str(place.path / f"spec-{held.token}.json")
    begin = (
        "import sys; from llamagen_dist.launch.slurm import batch; from llamagen_dist.launch import folder; "
        "sys.exit(batch.begin(folder.read_spec(sys.argv[1])))"
    )
    environment = {"SLURM_JOB_ID": owner.split(".")[0], "SLURM_RESTART_COUNT": "99"}
    python = timed([sys.executable, "-c", f"import {batch.__name__}"])
    return {
        "launch command, whole": submitted - began,
        "  of which Python and its imports": timed([sys.executable, "-c", IMPORTS]),
        "batch begin, whole": timed([sys.executable, "-c", begin, works], **environment),
        "  of which Python and imports, there": python,
        "rank: submitit's call to the program's first line": first - note["began"],
        "signal to requeue submitted": requeued - asked,
        "everything from the command to the first line": first - began,
    }


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--repeats", type=int, default=5)
    repeats = options.parse_args().repeats
    with tempfile.TemporaryDirectory(prefix="launch-") as folder, cluster():
        toy = Toy(Path(folder))
        runs = [once(toy, f"run{n}") for n in range(repeats)]
    median = {part: statistics.median(run[part] for run in runs) for part in runs[0]}
    for part, seconds in median.items():
        spread = [run[part] for run in runs]
        print(f"{part:<52} {seconds:7.3f} s  ({min(spread):.3f} to {max(spread):.3f})")
    whole = "launch command, whole", "batch begin, whole", "rank: submitit's call to the program's first line"
    ours = sum(median[part] for part in whole)
    print(
        f"{'ours with imports, to the first line':<52} {ours:7.3f} s  (wanted without imports: below {WANTED_S:.0f} s)"
    )


if __name__ == "__main__":
    main()
