"""The kinds that start programs: a cluster's profile, a sweep and a pipeline."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field

from llamagen_dist.config.data import Location
from llamagen_dist.config.section import CountInt, PositiveFloat, PositiveInt, Section

_TIME = re.compile(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?")
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_SET_BY = {  # who sets an sbatch parameter that a profile may therefore not name: a key of its own, or the launcher
    name: owner
    for owner, names in {
        "ranks_per_node": "ntasks ntasks-per-node",
        "cpus_per_rank": "cpus-per-task",
        "gpus_per_node": "gpus-per-node",
        "memory_gb": "mem",
        "signal_delay_s": "signal",
        "requeue": "requeue no-requeue",
        "the launcher": "job-name output error open-mode comment",
        "llamagen sweep": "array",
        "llamagen pipeline": "dependency kill-on-invalid-dep",
        "elastic": "begin",
        **{key: key for key in ("partition", "account", "qos", "constraint", "nodes", "time", "exclusive")},
    }.items()
    for name in names.split()
}


def minutes(time: str) -> float:
    """SLURM's MINUTES, MINUTES:SECONDS, HOURS:MINUTES:SECONDS, DAYS-HOURS, DAYS-HOURS:MINUTES[:SECONDS] in minutes.

    Raises ValueError for anything else.
    """
    match = _TIME.fullmatch(time.strip())
    if match is None:
        raise ValueError(
            "write a time as SLURM does: 90 (minutes), 12:00:00 or 2-00:00:00 (days-hours:minutes:seconds)"
        )
    days, *parts = match.groups()
    given = [int(part) for part in parts if part is not None]
    if days is None and len(given) < 3:
        given.insert(0, 0)  # one or two numbers alone begin with the minutes
    hours, mins, seconds = (*given, 0, 0)[:3]
    return int(days or 0) * 1440 + hours * 60 + mins + seconds / 60


def _at_least_one(time: str) -> str:
    if minutes(time) < 1:
        raise ValueError("SLURM counts in minutes: give at least one")
    return time


def _are_names(variables: dict[str, str]) -> dict[str, str]:
    for name in variables:
        if not _VARIABLE.fullmatch(name):
            raise ValueError(f"{name!r} is not a valid name of an environment variable")
    return variables


def _are_free(parameters: dict[str, str | int | bool]) -> dict[str, str | int | bool]:
    for name in parameters:
        plain = name.replace("_", "-").lstrip("-")
        if plain in _SET_BY:
            raise ValueError(f"{name} is set by {_SET_BY[plain]}, not here")
    return parameters


Time = Annotated[str, AfterValidator(_at_least_one)]
Variables = Annotated[dict[str, str], AfterValidator(_are_names)]
Parameters = Annotated[dict[str, str | int | bool], AfterValidator(_are_free)]


class ElasticSection(Section):
    """Continuing with fewer nodes when the wanted ones do not come back, and growing again later."""

    nodes: tuple[PositiveInt, ...] = ()
    """Node counts to continue with, the largest first; empty: the run waits for all its nodes."""
    after_minutes: PositiveFloat = 30.0
    """How long the wanted nodes (then each smaller number) are waited for."""


class ClusterConfig(Section):
    """``kind: cluster``. Every rank is one task of one job step: one per GPU, or ``ranks_per_node`` without GPUs."""

    kind: Literal["cluster"]
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None
    nodes: PositiveInt = 1
    """Unless --nodes says otherwise."""
    gpus_per_node: CountInt = 8
    """0: CPU ranks (gloo)."""
    ranks_per_node: PositiveInt | None = None
    """Tasks per node; empty: one per GPU (one without GPUs)."""
    cpus_per_rank: PositiveInt | None = None
    """Empty: the partition's default. Threads of a rank follow it."""
    memory_gb: PositiveFloat | None = None
    """Per node; empty: the partition's default."""
    exclusive: bool = False
    time: Time = "1-00:00:00"
    """Of one time slice; a requeued run gets another."""
    requeue: bool = True
    """Let SLURM requeue after preemption and node failure, and requeue by itself after a time limit or a fault."""
    signal_delay_s: PositiveInt = 300
    """SIGUSR2 comes so long before the time limit: one step and one save must fit into it."""
    max_faults: CountInt = 20
    """Restarts after a fault (a killed or hung rank) in all; time limits and preemptions are not counted."""
    max_stuck: PositiveInt = 2
    """Restarts in a row without progress before the run is failed."""
    exports: Variables = Field(default_factory=dict)
    """Environment variables of the job."""
    nccl: Variables = Field(default_factory=dict)
    """NCCL_* variables, without their prefix: {SOCKET_IFNAME: ib0}."""
    modules: tuple[str, ...] = ()
    """``module load`` each."""
    setup: tuple[str, ...] = ()
    """Shell lines before the ranks start, on the first node."""
    python: str | None = None
    """The command that starts Python on a compute node, for a virtual environment or a container:
    ``/shared/venv/bin/python`` or ``apptainer exec --nv /shared/image.sif python``. Empty: the one that launches."""
    sbatch: Parameters = Field(default_factory=dict)
    """Further sbatch parameters, without their dashes: {reservation: maintenance}."""
    srun: tuple[str, ...] = ()
    """Further words for srun."""
    stage: Location | None = None
    """``data.stage`` of the runs launched here, unless their config says otherwise: /dev/shm, a local disk."""
    elastic: ElasticSection = ElasticSection()

    @property
    def ranks(self) -> int:
        """Tasks per node."""
        return self.ranks_per_node or max(1, self.gpus_per_node)

    @property
    def time_minutes(self) -> float:
        return minutes(self.time)

    def rules(self) -> Iterator[str]:
        if self.signal_delay_s >= 60 * self.time_minutes:
            yield (
                f"signal_delay_s: {self.signal_delay_s} s before the end of a time slice of {self.time} "
                f"({60 * self.time_minutes:.0f} s) is before its start; lower it or ask for more time"
            )
        if self.gpus_per_node and self.ranks_per_node not in (None, self.gpus_per_node):
            yield "ranks_per_node: with GPUs it is one rank per GPU; leave it out"
        if any(n >= self.nodes for n in self.elastic.nodes) or list(self.elastic.nodes) != sorted(
            set(self.elastic.nodes), reverse=True
        ):
            yield f"elastic.nodes: node counts below nodes ({self.nodes}), the largest first"
        if self.elastic.nodes and not self.requeue:
            yield "elastic.nodes: jobs that take turns go back into the queue; it needs requeue: true"


Values = Annotated[tuple[Any, ...], Field(min_length=1)]


class SweepConfig(Section):
    """``kind: sweep``, read by ``llamagen sweep``. Its points: every entry of ``list`` with every row of ``zip`` with
    every combination of ``grid``. Each is trained (sampled, …) in a folder of its own under --out."""

    kind: Literal["sweep"]
    title: str
    module: str
    """The program, for example ``llamagen_dist.train_gpt``."""
    config: Path
    """What all points have in common: a YAML file, relative to this one."""
    set: dict[str, Any] = Field(default_factory=dict)
    """Dotted keys merged over it for all points; ``key=value`` on the command line comes last."""
    grid: dict[str, Values] = Field(default_factory=dict)
    """Dotted key -> values: every combination."""
    zip: dict[str, Values] = Field(default_factory=dict)
    """Dotted key -> values that go together: the first of each, the second of each …"""
    list: dict[str, dict[str, Any]] | tuple[dict[str, Any], ...] = ()
    """Points written out, each as dotted keys; with names of your own as a mapping: name -> keys."""
    name: str | None = None
    """Of a point and its folder, with {dotted.key} for a value. Empty: made from the keys that differ."""
    at_once: PositiveInt | None = None
    """On a cluster, at most so many points run at the same time; empty: as many as find room."""
    nodes: PositiveInt | None = None
    """Of each point, on a cluster; empty: the profile's."""
    gpus_per_node: CountInt | None = None
    """Empty: the profile's."""
    ranks: PositiveInt = 1
    """Of each point, on this machine (``--cluster local``)."""

    def rules(self) -> Iterator[str]:
        if not (self.grid or self.zip or self.list):
            yield "give points: grid, zip or list"
        lengths = {key: len(values) for key, values in self.zip.items()}
        if len({*lengths.values()}) > 1:
            counts = ", ".join(f"{key} has {length}" for key, length in lengths.items())
            yield f"zip: its keys go together and need equally many values ({counts})"


class StageSection(Section):
    """One step of a pipeline: a program, started by its module name on so many ranks."""

    name: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_-]*$")]
    why: str
    """One sentence for the person who watches."""
    module: str
    """For example ``tokenizer_training.train``."""
    config: Path | None = None
    """A YAML file, relative to the pipeline file; resolved and saved with the stage. With a sweep the stage is all of
    its points: one after another here, one job array on a cluster."""
    arguments: tuple[str, ...] = ()
    """Words of the command line (for a stage without config), after substitution of {out} and friends."""
    out: str | None = None
    """For a config of kind sweep: the folder of its points. ``set`` then goes to every point."""
    set: dict[str, Any] = Field(default_factory=dict)
    """Dotted keys of the stage's config; strings may hold {out} and the pipeline's variables."""
    ranks: PositiveInt = 1
    """Processes on one machine. On a cluster: 1 is one CPU rank on one node, more are the profile's nodes …"""
    nodes: PositiveInt | None = None
    """… unless the stage says how many nodes it gets there …"""
    gpus_per_node: CountInt | None = None
    """… and how many GPUs (and ranks) on each."""
    images: str | None = None
    """How many images a stage without ``train`` goes through, for --dry-run; usually a {count}."""
    produces: tuple[str, ...] = ()
    """Files that must exist when the stage is done; a finished stage that lost one runs again."""


class PipelineConfig(Section):
    """``kind: pipeline``: stages run one after another through the launcher."""

    kind: Literal["pipeline"]
    title: str
    variables: dict[str, str] = Field(default_factory=dict)
    """Defaults for {names} in the stages, besides {out}; ``key=value`` on the command line replaces them."""
    counts: dict[str, PositiveInt] = Field(default_factory=dict)
    """Variables that are numbers of images: ``--small FACTOR`` scales them along with the training lengths."""
    stages: Annotated[tuple[StageSection, ...], Field(min_length=1)]

    def rules(self) -> Iterator[str]:
        names = [stage.name for stage in self.stages]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            yield f"two stages are called {twice[0]!r}"
