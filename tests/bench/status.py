"""PROGRAM: what ``llamagen status`` takes.

    python -m tests.bench.status [--runs 200] [--repeats 5] [--slurm]

Makes so many run directories as a training leaves them (2 MB of metrics each), half of them launched on a cluster, and
times the whole command, Python's start included, and reading alone. SLURM's answer is stood in for by a squeue that
prints as many jobs, unless --slurm asks the real one.
"""

import argparse
import json
import os
import stat
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from llamagen_dist.config import dump, load
from llamagen_dist.launch.slurm import queue
from llamagen_dist.launch.status.survey import look
from tests.unit.run_folders import history, metrics

ROOT = Path(__file__).resolve().parents[2]


def make(folder: Path, number: int, config: str) -> None:
    run = folder / f"run-{number:03d}"
    for step in (1000, 2000):
        (run / f"checkpoints/step_{step:08d}").mkdir(parents=True)
        (run / f"checkpoints/step_{step:08d}/COMPLETE").write_text("x")
    (run / "config.yaml").write_text(config)
    (run / "record.json").write_text("{}")
    (run / "metrics.jsonl").write_text(metrics(5000, 256))
    if number % 2:
        (run / "launch").mkdir()
        lock = {"token": "t", "jobs": [str(number)], "user": "me", "host": "login", "since": 0.0}
        (run / "launch/lock.json").write_text(json.dumps(lock))
        history(run, *[("started", {"job": str(number), "restart": k}) for k in range(20)])


def squeue(folder: Path, runs: int) -> None:
    """A command that answers as squeue does in llamagen_dist/launch/slurm/queue.py."""
    rows = [(str(n), "RUNNING", "None", "2", "n[1-2]", "1:00:00", "t", f"run-{n:03d}") for n in range(runs)]
    lines = [queue.FIELD_END.join(row) + queue.JOB_END for row in rows]
    (folder / "jobs").write_text("\n".join(lines) + "\n")
    command = folder / "squeue"
    command.write_text(f"#!/bin/sh\ncat {folder}/jobs\n")
    command.chmod(command.stat().st_mode | stat.S_IXUSR)
    os.environ["PATH"] = f"{folder}:{os.environ['PATH']}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=200)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--slurm", action="store_true", help="ask the real squeue")
    args = parser.parse_args()
    config = dump(load(ROOT / "configs/gpt/GPT-B.yaml", ["train.images=9999872", "data.train=t", "data.validation=v"]))
    with tempfile.TemporaryDirectory() as scratch:
        folder, bin_folder = Path(scratch) / "runs", Path(scratch) / "bin"
        bin_folder.mkdir()
        for number in range(args.runs):
            make(folder, number, config)
        if not args.slurm:
            squeue(bin_folder, args.runs)
        whole, inside = [], []
        for _ in range(args.repeats):
            began = time.perf_counter()
            subprocess.run(
                [sys.executable, "-m", "llamagen_dist.cli", "status", str(folder)],
                check=True,
                cwd=ROOT,
                stdout=subprocess.DEVNULL,
            )
            whole.append(time.perf_counter() - began)
            began = time.perf_counter()
            found = look([folder])
            inside.append(time.perf_counter() - began)
        states = {row.state.name for row in found.rows}
        print(f"{len(found.rows)} runs ({', '.join(sorted(states))}), median of {args.repeats} [best, worst]:")
        for name, times in (("llamagen status, the whole command", whole), ("reading alone", inside)):
            print(f"  {name}: {statistics.median(times):.2f} s [{min(times):.2f}, {max(times):.2f}]")


if __name__ == "__main__":
    main()
