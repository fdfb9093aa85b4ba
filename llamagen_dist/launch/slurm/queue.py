"""What SLURM knows of our jobs, asked through its own commands; each has a deadline and no answer is an answer too."""

import getpass
import re
import shutil
import subprocess
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from llamagen_dist.errors import UserError

ANSWER_S = 20.0
LIVE = {
    *("PENDING", "CONFIGURING", "RUNNING", "SUSPENDED", "STOPPED", "SIGNALING", "RESIZING", "STAGE_OUT", "COMPLETING"),
    *("REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED", "SPECIAL_EXIT", "RESV_DEL_HOLD"),
}
# A job's comment and name may hold anything that a person types, line breaks too, but not these control characters.
FIELD_END, JOB_END = "\x1f", "\x1e"
_FIELDS = ("%i", "%T", "%r", "%D", "%N", "%L", "%k", "%j")


class SilentError(UserError):
    """SLURM gave no answer: nothing may be concluded about its jobs."""


@dataclass(frozen=True)
class QueuedJob:
    """One job, or one item of an array (``123_4``), as squeue shows it."""

    job: str
    state: str
    reason: str
    nodes: int
    where: str
    left: str
    comment: str
    name: str

    @property
    def alive(self) -> bool:
        """Whether it runs, waits, or is just ending."""
        return self.state in LIVE


def require_slurm() -> None:
    """Raises UserError where SLURM's commands are not on PATH."""
    for command in ("sbatch", "squeue", "scontrol", "scancel"):
        if shutil.which(command) is None:
            raise UserError(
                f"there is no {command} on PATH: this is not a login node of a SLURM cluster; use --cluster local, or "
                "try a cluster of this machine's own with slurm/local_cluster.sh up"
            )


def run_slurm(words: Sequence[str], patience_s: float = ANSWER_S) -> str:
    """stdout of one of SLURM's commands. Raises SilentError where it fails or gives no answer in time."""
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=patience_s, check=False)
    except FileNotFoundError:
        require_slurm()
        raise SilentError(f"there is no {words[0]} on PATH") from None
    except subprocess.TimeoutExpired:
        raise SilentError(
            f"{words[0]} gave no answer within {patience_s:.0f} s; try again when SLURM answers"
        ) from None
    if done.returncode:
        said = " ".join(done.stderr.split())[:300] or f"exit code {done.returncode}"
        raise SilentError(f"{words[0]} failed ({said}); try again when SLURM answers")
    return done.stdout


def my_jobs(patience_s: float = ANSWER_S) -> dict[str, QueuedJob]:
    """This user's jobs that SLURM still remembers, ended ones too, by id; one call however many there are.

    Raises SilentError.
    """
    words = ["squeue", "-a", "-h", "-r", "-t", "all", "-u", getpass.getuser(), "-o", FIELD_END.join(_FIELDS) + JOB_END]
    text = run_slurm(words, patience_s)
    jobs = {}
    for entry in text.split(JOB_END)[:-1]:
        job, state, reason, nodes, where, left, comment, name = entry.lstrip("\n").split(FIELD_END)
        jobs[job] = QueuedJob(job, state, reason, int(nodes or 0), where, left, comment, name)
    return jobs


def array_of(job: str) -> str:
    """The array of an item, or the job itself."""
    return job.partition("_")[0]


def signal(job: str, name: str = "USR2", patience_s: float = ANSWER_S) -> None:
    """Send a signal to all ranks of a job, not to its batch script. Raises SilentError, after a long while for a job
    that is back in the queue, since scancel waits for it to run."""
    run_slurm(["scancel", f"--signal={name}", job], patience_s)


def cancel(jobs: Iterable[str]) -> None:
    """Raises SilentError; jobs that have ended are no error."""
    names = list(jobs)
    if names:
        run_slurm(["scancel", "--quiet", *names])


def delay_start(job: str, seconds: int) -> None:
    """Let a waiting job begin in so many seconds at the earliest. Raises SilentError, for a job that runs too."""
    run_slurm(["scontrol", "update", f"JobId={job}", f"StartTime=now+{seconds}"])


def release(job: str) -> None:
    """Let a job begin that was submitted held (of an array: all its items). Raises UserError."""
    job = array_of(job)
    try:
        run_slurm(["scontrol", "release", job])
    except SilentError as error:
        raise UserError(f"job {job} is submitted but still held: {error}; the same command releases it") from None


def requeue(job: str) -> None:
    """Raises SilentError."""
    run_slurm(["scontrol", "requeue", job], patience_s=60.0)


@dataclass(frozen=True)
class NodeKind:
    """Nodes of a partition that are alike. minutes: its time limit; None: none."""

    nodes: int
    idle: int
    cpus: int
    gpus: int
    minutes: float | None


def partition(name: str | None) -> list[NodeKind]:
    """What a partition (None: the default one) has; empty where SLURM does not say, or there is none here.

    Raises UserError where there is no such partition.
    """
    from llamagen_dist.config.launch import minutes  # pydantic, which nothing else here needs

    if shutil.which("sinfo") is None:
        return []
    try:
        text = run_slurm(["sinfo", "-h", "-e", "-o", "%P|%F|%c|%G|%l"])
    except SilentError:
        return []
    rows = [line.split("|") for line in text.splitlines() if line.count("|") == 4]
    wanted = [row for row in rows if (row[0].endswith("*") if name is None else row[0].rstrip("*") == name)]
    if not wanted and name is not None:
        known = ", ".join(sorted({row[0].rstrip("*") for row in rows})) or "none"
        raise UserError(f"partition {name}: this cluster has no such partition, but {known}")
    kinds = []
    for _, nodes, cpus, gres, limit in wanted:
        _, idle, _, total = (int(part) for part in nodes.split("/"))
        gpus = sum(int(count) for count in re.findall(r"gpu:(?:[^:,(]+:)?(\d+)(?=[,(]|$)", gres))
        kinds.append(
            NodeKind(total, idle, int(cpus.rstrip("+")), gpus, None if limit == "infinite" else minutes(limit))
        )
    return kinds


def largest_array() -> int | None:
    """How many items a job array may have here; None where SLURM does not say."""
    try:
        match = re.search(r"^MaxArraySize\s*=\s*(\d+)$", run_slurm(["scontrol", "show", "config"]), re.MULTILINE)
    except UserError:
        return None
    return int(match[1]) if match else None
