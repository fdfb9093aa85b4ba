"""From programs and a cluster profile to an sbatch script, and to SLURM."""

import math
import os
import re
import secrets
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass, replace
from io import StringIO
from pathlib import Path
from typing import Any

from llamagen_dist.config import ClusterConfig
from llamagen_dist.config.data import STAGE
from llamagen_dist.errors import UserError
from llamagen_dist.launch.folder import JobSpec, Limits, write_specs
from llamagen_dist.launch.slurm import lock, queue
from llamagen_dist.launch.slurm.batch import REQUEUE
from llamagen_dist.launch.slurm.task import SlurmRank


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
    if not kinds:
        return size
    name = f"partition {profile.partition}" if profile.partition else "the default partition"
    there = sum(kind.nodes for kind in kinds)
    if there < nodes:
        raise UserError(f"{nodes} nodes: {name} has only {there}")
    most_gpus, most_cpus = max(kind.gpus for kind in kinds), max(kind.cpus for kind in kinds)
    if gpus > most_gpus:
        raise UserError(f"{gpus} GPUs per node: the nodes of {name} have {most_gpus or 'none'}")
    ranks, cpus = size.ranks_per_node, profile.cpus_per_rank or 1
    if ranks * cpus > most_cpus:
        raise UserError(f"{ranks} ranks with {cpus} CPUs each: the nodes of {name} have {most_cpus} CPUs")
    longest = max(math.inf if kind.minutes is None else kind.minutes for kind in kinds)
    if profile.time_minutes > longest:
        raise UserError(f"time: {profile.time} is longer than {name} allows ({longest:.0f} minutes)")
    return size


def limits_of(profile: ClusterConfig) -> Limits:
    after_s = 60 * profile.elastic.after_minutes if profile.elastic.nodes else 0.0
    return Limits(profile.requeue, profile.max_faults, profile.max_stuck, profile.signal_delay_s, after_s)


def many(number: int, thing: str) -> str:
    """``1 node``, ``2 nodes``."""
    return f"{number} {thing}{'s' * (number > 1)}"


def job_name(name: str) -> str:
    """A name without the characters that SLURM, file names and tables stumble over."""
    return re.sub(r"[^A-Za-z0-9._+-]+", "-", name).strip("-.")[:100] or "llamagen"


@dataclass(frozen=True)
class Submission:
    """One job, or one array, of ``specs`` that differ in their programs and folders alone."""

    specs: tuple[JobSpec, ...]
    profile: ClusterConfig
    size: Size
    at_once: int | None = None
    """So many items of the array at a time."""
    after: tuple[str, ...] = ()
    """Jobs that have to end well first; if one does not, SLURM cancels this one."""
    begin: str | None = None
    """sbatch's --begin; without it the job is submitted held."""
    logs: Path | None = None
    """Where SLURM's logs go; None: into log/ of the first spec's folder."""
    token: str = "TOKEN"
    """Of the launch; it is also the jobs' comment."""

    def __post_init__(self) -> None:
        """Raises UserError where SLURM would read something else in the path of a log."""
        for path in (str(self.log), *(spec.folder for spec in self.specs)):
            if "%" in path or "\n" in path:
                raise UserError(f"{path}: SLURM reads % in the path of a log; choose a folder without it")

    @property
    def log(self) -> Path:
        return self.logs or self.specs[0].job.log

    @property
    def file(self) -> Path:
        """The specs, for the batch script and the ranks."""
        return self.specs[0].job.spec(self.token)

    @property
    def stand_bys(self) -> "list[Submission]":
        """The smaller jobs that its profile wants beside it, for the day its nodes do not come back (elastic.py): the
        largest first, and the smaller the later."""
        elastic = self.profile.elastic
        fewer = [nodes for nodes in elastic.nodes if nodes < self.size.nodes]
        begins = [f"now+{round(60 * elastic.after_minutes * number)}" for number in range(1, len(fewer) + 1)]
        sizes = [replace(self.size, nodes=nodes) for nodes in fewer]
        return [replace(self, size=size, begin=begin) for size, begin in zip(sizes, begins, strict=True)]

    def script(self) -> str:
        """The sbatch script exactly as ``submit`` would hand it over, but for the token; needs no SLURM."""
        executor = self._executor()
        if len(self.specs) > 1:
            executor.parameters["map_count"] = len(self.specs)
        text: str = executor._make_submission_file_text(executor._submitit_command_str, "")
        return text + "\n"

    def submit(self, stale: Sequence[lock.Lock | None] = ()) -> list[str]:
        """Take the lock of every folder and submit; returns one job id per spec, ``123_0`` … of an array.

        The job is submitted held and released once every folder names it, so that none of its items can begin, or end,
        in a folder that does not know of it yet.

        stale: per spec, the lock of an earlier launch that is over.
        Raises UserError, and lock.TakenError where somebody else was quicker; then nothing is submitted.
        """
        queue.require_slurm()
        token = secrets.token_hex(6)
        mine = replace(self, token=token, specs=tuple(replace(spec, token=token) for spec in self.specs))
        for path in [mine.log, *(Path(spec.folder) for spec in mine.specs)]:
            path.mkdir(parents=True, exist_ok=True)
        folders = [spec.job for spec in mine.specs]
        taken = []
        try:
            for item, (folder, old) in enumerate(zip(folders, stale or [None] * len(folders), strict=True)):
                folder.path.mkdir(mode=0o700, exist_ok=True)
                lock.take(folder, token, old, item if len(folders) > 1 else None)
                taken.append(folder)
            write_specs(mine.file, mine.specs)
            for folder in folders:
                folder.forget(folder.failed, folder.done)
            jobs = mine._enqueue()
        except BaseException:
            for folder in taken:
                lock.release(folder, token)
            mine.file.unlink(missing_ok=True)
            raise
        for folder, job in zip(folders, jobs, strict=True):
            lock.name_submitted(folder, token, job, nodes=self.size.nodes, ranks=self.size.ranks)
        if not self.profile.sbatch.get("hold"):
            queue.release(jobs[0])
        return jobs

    def _enqueue(self) -> list[str]:
        """``submit`` under a lock that is ours, for specs whose file is written. Raises UserError."""
        from submitit.core.utils import FailedJobError, FailedSubmissionError

        executor, program = self._executor(), SlurmRank(str(self.file))
        before = set(self.log.iterdir())
        try:
            with _outside_of_jobs(), redirect_stderr(StringIO()):  # submitit prints what it raises
                if len(self.specs) == 1:
                    return [str(executor.submit(program).job_id)]
                with executor.batch():
                    jobs = [executor.submit(program) for _ in self.specs]
                return [str(job.job_id) for job in jobs]
        except (FailedJobError, FailedSubmissionError, subprocess.CalledProcessError) as error:
            said = " ".join(str(error).split())
            said = said.partition("sbatch: error: ")[2] or said
            for left in set(self.log.iterdir()) - before:  # submitit's script and pickle
                if left.is_file():
                    left.unlink(missing_ok=True)
            raise UserError(f"SLURM refused the job: {said[:400]}") from None

    def _before(self) -> list[str]:
        """The script's lines before srun."""
        profile, code = self.profile, shlex.quote(self.specs[0].code)
        exports = {f"NCCL_{name.removeprefix('NCCL_')}": value for name, value in profile.nccl.items()}
        if profile.stage is not None:
            exports[STAGE] = str(profile.stage)
        exports |= profile.exports
        return [
            # the login shell's number comes along with sbatch, but a rank takes its own share of the node's cores,
            # unless the profile says otherwise in the lines that follow
            "unset OMP_NUM_THREADS MKL_NUM_THREADS",
            *(f"module load {shlex.quote(name)}" for name in profile.modules),
            *(f"export {name}={shlex.quote(value)}" for name, value in exports.items()),
            *profile.setup,
            f"export PYTHONPATH={code} PYTHONUNBUFFERED=1",
            f"cd {code} || exit $?",
            f"mkdir -p {shlex.quote(str(self.log))}/{self._job}",
            f"{self._batch('begin')} $$ || exit $?",
        ]

    def _after(self) -> list[str]:
        """Its lines after srun."""
        return [
            "status=$?",
            f"{self._batch('end')} $status",
            "verdict=$?",
            f"[ $verdict -eq {REQUEUE} ] || exit $verdict",
            f"scontrol requeue {self._job} && exit 0",
            "# refused: SLURM requeues by itself when it has lost this node; this script's end is not the job's then",
            "lost=",
            f"while scontrol show job {self._job} | grep -q JobState=PENDING; do lost=yes; sleep 5; done",
            f'[ -n "$lost" ] || exec {self._batch("refused")}',
            "exit 0",
        ]

    @property
    def _job(self) -> str:
        """The job's id in the script; an array's item by both numbers, since SLURM_JOB_ID of the last item is the whole
        array's, and would requeue all."""
        return "${SLURM_ARRAY_JOB_ID}_${SLURM_ARRAY_TASK_ID}" if len(self.specs) > 1 else "$SLURM_JOB_ID"

    @property
    def _python(self) -> str:
        return self.profile.python or shlex.quote(sys.executable)

    def _batch(self, what: str) -> str:
        return f"{self._python} -m llamagen_dist.launch.slurm.batch {what} {shlex.quote(str(self.file))}"

    def _executor(self) -> Any:
        """submitit's, for what it does here: it writes the script, pickles ``SlurmRank`` and calls sbatch."""
        import submitit

        class Executor(submitit.SlurmExecutor):
            """One that can write its script where there is no SLURM."""

            @classmethod
            def affinity(cls) -> int:
                return 2

        profile, size = self.profile, self.size
        extra: dict[str, Any] = {"requeue" if profile.requeue else "no-requeue": True}
        extra |= {"begin": self.begin} if self.begin else {"hold": True}
        if self.after:
            extra |= {"dependency": "afterok:" + ":".join(self.after), "kill-on-invalid-dep": "yes"}
        own = profile.sbatch.items()
        extra |= {name.lstrip("-").replace("_", "-"): value for name, value in own if value is not False}
        optional = {
            "array_parallelism": self.at_once,
            "gpus_per_node": size.gpus_per_node,
            "cpus_per_task": profile.cpus_per_rank,
            "mem": f"{round(profile.memory_gb * 1000)}M" if profile.memory_gb else None,
            "exclusive": profile.exclusive,
            "partition": profile.partition,
            "account": profile.account,
            "qos": profile.qos,
            "constraint": profile.constraint,
        }
        executor = Executor(folder=self.log / "%j", python=self._python)
        executor.parameters = {}
        executor.update_parameters(
            job_name=job_name(self.log.parent.name if len(self.specs) > 1 else self.specs[0].name),
            time=int(-(-profile.time_minutes // 1)),
            nodes=size.nodes,
            ntasks_per_node=size.ranks_per_node,
            signal_delay_s=profile.signal_delay_s,
            comment=self.token,
            stderr_to_stdout=True,
            wckey="none",
            setup=self._before(),
            teardown=self._after(),
            srun_args=["--kill-on-bad-exit=1", *profile.srun],
            additional_parameters=extra,
            **{name: value for name, value in optional.items() if value},
        )
        executor.parameters["wckey"] = None  # accounting by keys is few sites' habit, and the others refuse one
        return executor


def submit_stand_bys(wanted: Submission, job: str, say: Callable[[str], None]) -> None:
    """Submit the stand-bys of ``job`` under its lock and name them there. One that SLURM refuses is said: the run does
    without it.

    wanted: what was submitted as ``job``.
    """
    folder, jobs = wanted.specs[0].job, [job]
    current = lock.read(folder)
    if current is None or current.jobs != (job,):
        return  # another launch has followed already
    for less in replace(wanted, token=current.token).stand_bys:
        where = many(less.size.nodes, "node")
        try:
            (stand_by,) = less._enqueue()  # not held: it begins later than it takes to name it
        except UserError as error:
            say(f"no stand-by on {where}: {error}")
            continue
        jobs.append(stand_by)
        lock.name_jobs(folder, current.token, tuple(jobs))
        folder.tell("stands_by", job=stand_by, nodes=less.size.nodes, ranks=less.size.ranks)
        say(f"job {stand_by} stands by on {where}")


@contextmanager
def _outside_of_jobs() -> Iterator[None]:
    """Submitting from inside a job: what SLURM has set for that job must not shape the new one."""
    names = [n for n in os.environ if n.startswith(("SLURM_", "SBATCH_", "SRUN_")) and n != "SLURM_CONF"]
    kept = {name: os.environ.pop(name) for name in names}
    try:
        yield
    finally:
        os.environ.update(kept)
