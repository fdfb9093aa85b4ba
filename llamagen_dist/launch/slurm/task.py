"""What every rank of a SLURM job runs: set the environment that programs expect, run the program, say how it ended.

submitit pickles ``SlurmRank`` and calls it in every task of the job step. It has no ``checkpoint`` method and replaces
submitit's signal handlers first thing: those would requeue from rank 0 alone, at once. Here the program's own flag
stops all ranks together, and the batch script requeues (batch.py).
"""

import os
import re
import signal
import sys
import time
import traceback
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llamagen_dist.console import PROGRESS_FILE
from llamagen_dist.errors import EXIT_INTERRUPTED, EXIT_STOPPED, EXIT_USER_ERROR, UserError
from llamagen_dist.launch import rank as ranks
from llamagen_dist.launch.folder import JobSpec, read_spec
from llamagen_dist.process import STOP_SIGNALS, cores, peak_rss_gb
from llamagen_dist.program import ERROR_FILE, LOCK, OWNER, SIGNAL_DELAY

MARKS = "LLAMAGEN_MARKS"  # environment variable of slurm/plain.sbatch: a folder
_EXIT = {ranks.USER_ERROR: EXIT_USER_ERROR, ranks.INTERRUPTED: EXIT_INTERRUPTED, ranks.CRASHED: 1}


@dataclass(frozen=True)
class SlurmRank:
    """specs: the file of what the job (or each item of the array) runs."""

    specs: str

    def __call__(self) -> None:
        for number in STOP_SIGNALS:
            signal.signal(number, ranks._interrupt)
        spec = read_spec(self.specs, int(os.environ.get("SLURM_ARRAY_TASK_ID", "0")))
        run_rank(spec)


def run_rank(spec: JobSpec) -> None:
    """Run the program; returns where it is done, else ends the process: 0 after a stop that has saved everything."""
    job, me = spec.job, owner(os.environ)
    rank = int(os.environ["SLURM_PROCID"])
    reports = job.ranks(me)
    reports.mkdir(parents=True, exist_ok=True)
    report = ranks.RankReport(reports, rank)
    began = time.time()

    def prepare() -> None:
        ranks.set_rank_environment(spec.code, rank_environment(spec.ranks_per_node))
        os.environ.update(
            {
                ERROR_FILE: str(report.sentence),
                OWNER: me,
                LOCK: str(job.owner),
                SIGNAL_DELAY: str(spec.limits.signal_delay_s),
            }
        )
        os.environ.pop(PROGRESS_FILE, None)
        if rank == 0:
            os.environ[PROGRESS_FILE] = str(job.progress)

    outcome, message, failure = ranks.run_program(spec.module, spec.arguments, prepare)
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    if not message and report.sentence.exists():
        message = report.sentence.read_text(encoding="utf-8")
    # of thousands of ranks that end well or stop together, one need say so
    if rank == 0 or outcome not in (ranks.DONE, ranks.STOPPED):
        error = type(failure).__name__ if failure is not None else ""
        report.write(
            began=began,
            outcome=outcome,
            message=message,
            error=error,
            ended=time.time(),
            seconds=time.time() - began,
            peak_rss_gb=peak_rss_gb(children=True),
        )
    if outcome == ranks.DONE:
        return
    if failure is not None and not isinstance(failure, SystemExit):
        traceback.print_exception(failure)
    sys.stdout.flush()
    sys.stderr.flush()
    # Not sys.exit: taking torch down takes a second of the time that is left, and an exception would be pickled as
    # submitit's result. A rank that has stopped ends well, since srun kills the others at the first that does not.
    os._exit(_EXIT.get(outcome, 0))


def owner(environment: Mapping[str, str]) -> str:
    """This incarnation of the job: JOB.RESTART; JOB as the lock and the log name it, ARRAY_ITEM of an array."""
    name = environment["SLURM_JOB_ID"]
    if "SLURM_ARRAY_JOB_ID" in environment:
        name = f"{environment['SLURM_ARRAY_JOB_ID']}_{environment['SLURM_ARRAY_TASK_ID']}"
    return f"{name}.{environment.get('SLURM_RESTART_COUNT') or '0'}"


def facts_of(spec: JobSpec, me: str) -> dict[str, Any]:
    """What events in the history say of the incarnation ``me``: its job, which restart, how far the run is on disk."""
    job, restart = me.split(".")
    return {"job": job, "restart": int(restart), "steps": spec.steps_done()}


def rank_environment(ranks_per_node: int | None = None) -> dict[str, str]:
    """What torch and our programs read, from what srun has set.

    ranks_per_node: where srun learns it otherwise than by --ntasks-per-node.
    """
    env = os.environ
    local = ranks_per_node or int(env.get("SLURM_NTASKS_PER_NODE") or env["SLURM_NTASKS"])
    threads = int(env.get("SLURM_CPUS_PER_TASK") or 0) or max(1, cores() // local)
    environment = {
        "RANK": env["SLURM_PROCID"],
        "WORLD_SIZE": env["SLURM_NTASKS"],
        "LOCAL_RANK": env["SLURM_LOCALID"],
        "LOCAL_WORLD_SIZE": str(local),
        "MASTER_ADDR": first_host(env.get("SLURM_STEP_NODELIST") or env["SLURM_JOB_NODELIST"]),
        "MASTER_PORT": str(port(owner(env))),
    }
    if "OMP_NUM_THREADS" not in env:
        environment["OMP_NUM_THREADS"] = str(threads)
    return environment


def port(owner: str) -> int:
    """The same on all ranks, another for every restart, and below 32768, where Linux gives ports to anybody."""
    return 15000 + zlib.crc32(owner.encode()) % 17000


def first_host(nodelist: str) -> str:
    """``n[03-5,9],m1`` -> ``n03``; SLURM's node lists may have several brackets and anything after them."""
    depth, end = 0, len(nodelist)
    for position, letter in enumerate(nodelist):
        depth += {"[": 1, "]": -1}.get(letter, 0)
        if letter == "," and depth == 0:
            end = position
            break
    return re.sub(r"\[([^\],-]*)[^\]]*\]", r"\1", nodelist[:end])


def main(argv: list[str]) -> None:
    """``srun … python -m llamagen_dist.launch.slurm.task MODULE CONFIG [key=value …]``, in a script of one's own
    (slurm/plain.sbatch).

    How it ended is a file in the folder that LLAMAGEN_MARKS names, since srun's status is the highest of all ranks', so
    that of those it has killed. There a rank that stopped after saving ends with 0 (75 without the folder): srun kills
    the others at the first that does not end well.
    """
    if not argv:
        raise UserError("usage: srun … python -m llamagen_dist.launch.slurm.task MODULE [ARGUMENTS …]")
    if "SLURM_PROCID" not in os.environ:
        raise UserError("there is no SLURM_PROCID: start this with srun, once per rank")
    outcome, message, failure = ranks.run_program(
        argv[0], tuple(argv[1:]), lambda: ranks.set_rank_environment(str(Path.cwd()), rank_environment())
    )
    marks = os.environ.get(MARKS)
    if marks is not None and outcome in (ranks.STOPPED, ranks.USER_ERROR):
        Path(marks, outcome).touch()
    if outcome == ranks.STOPPED:
        if marks is None:
            sys.exit(EXIT_STOPPED)
    elif failure is not None:
        raise failure
    elif message:
        raise UserError(message)
    elif outcome != ranks.DONE:
        sys.exit(_EXIT[outcome])


if __name__ == "__main__":
    from llamagen_dist.program import run

    run(main)
