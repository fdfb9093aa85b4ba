"""The smaller jobs that a launch submits beside the wanted one, for the day its nodes do not come back (elastic.py)."""

from collections.abc import Callable
from dataclasses import replace

from llamagen_dist.config import ClusterConfig, Section, TrainingConfig
from llamagen_dist.errors import UserError
from llamagen_dist.launch.slurm import lock
from llamagen_dist.launch.slurm.submit import Size, Submission
from llamagen_dist.parallel.division import data_ranks, per_rank_batch


def sizes(profile: ClusterConfig, size: Size) -> list[Size]:
    """Of the stand-bys that the profile wants below ``size``, the largest first."""
    return [replace(size, nodes=nodes) for nodes in profile.elastic.nodes if nodes < size.nodes]


def fixed_micro_batch(config: Section, ranks: int) -> Section:
    """The config with the micro-batch of the full size written down: with fewer ranks a share is larger, and must be
    accumulated in pieces that fit into memory as before (and, for a discriminator, are normalised as before)."""
    if not isinstance(config, TrainingConfig) or config.train.micro_batch is not None:
        return config
    micro = per_rank_batch(config.train.global_batch, data_ranks(ranks, config.parallel.tensor))
    return config.model_copy(update={"train": config.train.model_copy(update={"micro_batch": micro})})


def begins_after(profile: ClusterConfig, number: int) -> str:
    """sbatch's --begin for the stand-by with this number, from 1."""
    return f"now+{round(60 * profile.elastic.after_minutes * number)}"


def submit_all(wanted: Submission, job: str, smaller: list[Size], say: Callable[[str], None]) -> None:
    """Submit the stand-bys of ``job`` under its lock and name them there. One that SLURM refuses is said: the run does
    without it.

    wanted: what was submitted as ``job``, with its token.
    """
    folder, jobs = wanted.specs[0].job, [job]
    for number, size in enumerate(smaller, start=1):
        begin = begins_after(wanted.profile, number)
        try:  # not held: it begins later than it takes to name it
            (standby,) = replace(wanted, size=size, begin=begin).enqueue(hold=False)
        except UserError as error:
            say(f"no stand-by on {_nodes(size)}: {error}")
            continue
        jobs.append(standby)
        lock.name_jobs(folder, wanted.token, tuple(jobs))
        folder.tell("stands_by", job=standby, nodes=size.nodes, ranks=size.ranks)
        say(f"job {standby} stands by on {_nodes(size)}")


def _nodes(size: Size) -> str:
    return f"{size.nodes} node{'s' * (size.nodes > 1)}"
