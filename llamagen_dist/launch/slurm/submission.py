"""From programs and a cluster profile to an sbatch script, and to SLURM."""

import os
import re
import secrets
import shlex
import subprocess
import sys
from collections.abc import Sequence
from contextlib import redirect_stderr
from dataclasses import dataclass, replace
from io import StringIO
from pathlib import Path
from typing import Any

from llamagen_dist.config import ClusterConfig
from llamagen_dist.config.data import STAGE
from llamagen_dist.errors import UserError
from llamagen_dist.launch.slurm import lock, queue
from llamagen_dist.launch.slurm.batch import REQUEUE
from llamagen_dist.launch.slurm.records import Limits, Place, Work, write_works
from llamagen_dist.launch.slurm.task import Task
from llamagen_dist.tracking.provenance import masked_script


@dataclass(frozen=True)
class Size:
    """Of one job. gpus_per_node 0: CPU ranks."""

    nodes: int
    ranks_per_node: int
    gpus_per_node: int

    @property
    def ranks(self) -> int:
        return self.nodes * self.ranks_per_node


def size_of(profile: ClusterConfig, nodes: int | None = None, gpus_per_node: int | None = None) -> Size:
    """The profile's size, or another. Raises UserError for what cannot be, or what its partition does not have."""
    nodes = profile.nodes if nodes is None else nodes
    gpus = profile.gpus_per_node if gpus_per_node is None else gpus_per_node
    if nodes < 1:
        raise UserError(f"--nodes {nodes}: give 1 or more")
    if gpus < 0:
        raise UserError(f"--gpus-per-node {gpus}: give 0 (CPU ranks) or more")
    size = Size(nodes, gpus or profile.ranks_per_node or 1, gpus)
    kinds = queue.partition(profile.partition)
    if kinds:
        name = f"partition {profile.partition}" if profile.partition else "the default partition"
        if sum(kind.nodes for kind in kinds) < nodes:
            raise UserError(f"{nodes} nodes: {name} has only {sum(kind.nodes for kind in kinds)}")
        most = max(kind.gpus for kind in kinds)
        if gpus > most:
            raise UserError(f"{gpus} GPUs per node: the nodes of {name} have {most or 'none'}")
        cores = size.ranks_per_node * (profile.cpus_per_rank or 1)
        if cores > max(kind.cpus for kind in kinds):
            raise UserError(
                f"{size.ranks_per_node} ranks with {profile.cpus_per_rank or 1} CPUs each: the nodes of {name} have "
                f"{max(kind.cpus for kind in kinds)} CPUs"
            )
        limits = [kind.minutes for kind in kinds if kind.minutes is not None]
        if len(limits) == len(kinds) and limits and profile.time_minutes > max(limits):
            raise UserError(f"time: {profile.time} is longer than {name} allows ({max(limits):.0f} minutes)")
    return size


def limits_of(profile: ClusterConfig) -> Limits:
    after_s = 60 * profile.elastic.after_minutes if profile.elastic.nodes else 0.0
    return Limits(profile.requeue, profile.max_faults, profile.max_stuck, profile.signal_delay_s, after_s)


def check_path(folder: Path) -> None:
    """Raises UserError where SLURM would read something else in the path of a log."""
    if "%" in str(folder) or "\n" in str(folder):
        raise UserError(f"{folder}: SLURM reads % in the path of a log; choose a folder without it")


def job_name(name: str) -> str:
    """A name without the characters that SLURM, file names and tables stumble over."""
    return re.sub(r"[^A-Za-z0-9._+-]+", "-", name).strip("-.")[:100] or "llamagen"


def script(
    works: Sequence[Work],
    profile: ClusterConfig,
    size: Size,
    *,
    at_once: int | None = None,
    after: Sequence[str] = (),
    begin: str | None = None,
    token: str = "TOKEN",
    log: Path | None = None,
) -> str:
    """The sbatch script exactly as ``submit`` would hand it over, but for the token; starts nothing, needs no SLURM."""
    log = log or Path(works[0].folder) / "log"
    executor = _executor(works, profile, size, at_once, after, begin, token, log, _works_file(works, token))
    if len(works) > 1:
        executor.parameters["map_count"] = len(works)
    text: str = executor._make_submission_file_text(executor._submitit_command_str, "")
    return text + "\n"


def masked(text: str) -> str:
    """A script for people's eyes: values of exported variables that look like secrets are hidden."""
    return masked_script(text)


def submit(
    works: Sequence[Work],
    profile: ClusterConfig,
    size: Size,
    *,
    at_once: int | None = None,
    after: Sequence[str] = (),
    begin: str | None = None,
    stale: Sequence[lock.Lock | None] | None = None,
    log: Path | None = None,
) -> list[str]:
    """Take the lock of every folder and submit; returns one job id per work, ``123_0`` … for several (one array).

    at_once: so many items of the array at a time. after: jobs that have to end well first; if one does not, SLURM
    cancels this one. begin: sbatch's --begin. stale: per work, the lock of an earlier launch that is over.
    Raises UserError, and lock.TakenError where somebody else was quicker; then nothing is submitted.
    """
    queue.need()
    token = secrets.token_hex(6)
    log = log or Path(works[0].folder) / "log"
    for path in [log, *(Path(work.folder) for work in works)]:
        check_path(path)
        path.mkdir(parents=True, exist_ok=True)
    works = [replace(work, token=token) for work in works]
    places = [Place.of(work.folder) for work in works]
    taken = []
    try:
        for place, old in zip(places, stale or [None] * len(works), strict=True):
            place.path.mkdir(mode=0o700, exist_ok=True)
            lock.take(place, token, old)
            taken.append(place)
        file = _works_file(works, token)
        write_works(file, list(works))
        for work, place in zip(works, places, strict=True):
            place.end.unlink(missing_ok=True)
            if work.done:
                Path(work.done).unlink(missing_ok=True)
        jobs = enqueue(works, profile, size, token, at_once=at_once, after=after, begin=begin, log=log)
    except BaseException:
        for place in taken:
            lock.release(place, token)
        _works_file(works, token).unlink(missing_ok=True)
        raise
    for place, job in zip(places, jobs, strict=True):
        place.tell("submitted", job=job, restart=0, nodes=size.nodes, ranks=size.ranks, token=token)
        lock.name_jobs(place, token, (job,))  # for this the job's begin waits
    return jobs


def enqueue(
    works: Sequence[Work],
    profile: ClusterConfig,
    size: Size,
    token: str,
    *,
    at_once: int | None = None,
    after: Sequence[str] = (),
    begin: str | None = None,
    log: Path | None = None,
) -> list[str]:
    """``submit`` under a lock that is held already, for works whose file is written. Raises UserError."""
    from submitit.core.utils import FailedJobError, FailedSubmissionError

    file = _works_file(works, token)
    log = log or Path(works[0].folder) / "log"
    executor = _executor(works, profile, size, at_once, after, begin, token, log, file)
    before = set(log.iterdir())
    try:
        with _outside_of_jobs(), redirect_stderr(StringIO()):  # submitit prints what it raises
            if len(works) == 1:
                return [str(executor.submit(Task(str(file))).job_id)]
            with executor.batch():
                jobs = [executor.submit(Task(str(file))) for _ in works]
            return [str(job.job_id) for job in jobs]
    except (FailedJobError, FailedSubmissionError, subprocess.CalledProcessError) as error:
        said = " ".join(str(error).split())
        said = said.partition("sbatch: error: ")[2] or said
        for left in set(log.iterdir()) - before:  # submitit's script and pickle
            if left.is_file():
                left.unlink(missing_ok=True)
        raise UserError(f"SLURM refused the job: {said[:400]}") from None


def _works_file(works: Sequence[Work], token: str) -> Path:
    return Place.of(works[0].folder).path / f"work-{token}.json"


class _outside_of_jobs:
    """Submitting from inside a job: what SLURM has set for that job must not shape the new one."""

    def __enter__(self) -> None:
        names = [n for n in os.environ if n.startswith(("SLURM_", "SBATCH_", "SRUN_")) and n != "SLURM_CONF"]
        self._kept = {name: os.environ.pop(name) for name in names}

    def __exit__(self, *_: object) -> None:
        os.environ.update(self._kept)


def _executor(
    works: Sequence[Work],
    profile: ClusterConfig,
    size: Size,
    at_once: int | None,
    after: Sequence[str],
    begin: str | None,
    token: str,
    log: Path,
    file: Path,
) -> Any:
    import submitit

    class Executor(submitit.SlurmExecutor):
        """One that can write its script where there is no SLURM."""

        @classmethod
        def affinity(cls) -> int:
            return 2

    first = works[0]
    python = profile.python or shlex.quote(sys.executable)
    ours = f"{python} -m llamagen_dist.launch.slurm.batch"
    words = shlex.quote(str(file))
    exports = {**{f"NCCL_{name.removeprefix('NCCL_')}": value for name, value in profile.nccl.items()}}
    if profile.stage is not None:
        exports[STAGE] = str(profile.stage)
    exports |= profile.exports
    # an array's item by both numbers: SLURM_JOB_ID of the last item is the whole array's, and would requeue all of it
    job = "$SLURM_JOB_ID" if len(works) == 1 else "${SLURM_ARRAY_JOB_ID}_${SLURM_ARRAY_TASK_ID}"
    setup = [
        # the login shell's number comes along with sbatch, but a rank takes its own share of the node's cores,
        # unless the profile says otherwise in the lines that follow
        "unset OMP_NUM_THREADS MKL_NUM_THREADS",
        *(f"module load {shlex.quote(name)}" for name in profile.modules),
        *(f"export {name}={shlex.quote(value)}" for name, value in exports.items()),
        *profile.setup,
        f"export PYTHONPATH={shlex.quote(first.code)} PYTHONUNBUFFERED=1",
        f"cd {shlex.quote(first.code)} || exit $?",
        f"mkdir -p {shlex.quote(str(log))}/{job}",
        f"{ours} begin {words} $$ || exit $?",
    ]
    teardown = [
        "status=$?",
        f"{ours} end {words} $status",
        "verdict=$?",
        f"[ $verdict -eq {REQUEUE} ] || exit $verdict",
        f"scontrol requeue {job} && exit 0",
        "# refused: SLURM requeues by itself when it has lost this node; the end of this script is not the job's then",
        "lost=",
        f"while scontrol show job {job} | grep -q JobState=PENDING; do lost=yes; sleep 5; done",
        f'[ -n "$lost" ] || exec {ours} refused {words}',
        "exit 0",
    ]
    extra: dict[str, Any] = {"requeue" if profile.requeue else "no-requeue": True}
    if after:
        extra |= {"dependency": "afterok:" + ":".join(after), "kill-on-invalid-dep": "yes"}
    if begin:
        extra["begin"] = begin
    extra |= {name.lstrip("-").replace("_", "-"): value for name, value in profile.sbatch.items() if value is not False}
    executor = Executor(folder=log / "%j", python=python)
    executor.parameters = {}
    executor.update_parameters(
        job_name=job_name(first.name if len(works) == 1 else Path(log).parent.name),
        time=int(-(-profile.time_minutes // 1)),
        nodes=size.nodes,
        ntasks_per_node=size.ranks_per_node,
        signal_delay_s=profile.signal_delay_s,
        comment=token,
        stderr_to_stdout=True,
        wckey="none",
        setup=setup,
        teardown=teardown,
        srun_args=["--kill-on-bad-exit=1", *profile.srun],
        additional_parameters=extra,
        **({"array_parallelism": at_once} if at_once else {}),
        **({"gpus_per_node": size.gpus_per_node} if size.gpus_per_node else {}),
        **({"cpus_per_task": profile.cpus_per_rank} if profile.cpus_per_rank else {}),
        **({"mem": f"{round(profile.memory_gb * 1000)}M"} if profile.memory_gb else {}),
        **({"exclusive": True} if profile.exclusive else {}),
        **{
            name: value
            for name in ("partition", "account", "qos", "constraint")
            if (value := getattr(profile, name)) is not None
        },
    )
    executor.parameters["wckey"] = None  # accounting by keys is few sites' habit, and the others refuse one
    return executor
