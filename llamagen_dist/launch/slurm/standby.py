"""The smaller jobs that a launch submits beside the wanted one, for the day its nodes do not come back (elastic.py)."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from llamagen_dist.config import ClusterConfig, GPTConfigFile, Section, TokenizerConfigFile
from llamagen_dist.errors import UserError
from llamagen_dist.launch.slurm import lock
from llamagen_dist.launch.slurm.records import Place, Work
from llamagen_dist.launch.slurm.submission import Size, enqueue
from llamagen_dist.parallel.division import data_ranks, per_rank_batch


def sizes(profile: ClusterConfig, size: Size) -> list[Size]:
    """Of the stand-bys that the profile wants below ``size``, the largest first."""
    return [replace(size, nodes=nodes) for nodes in profile.elastic.nodes if nodes < size.nodes]


def fixed_micro_batch(config: Section, ranks: int) -> Section:
    """The config with the micro-batch of the full size written down: with fewer ranks a share is larger, and must be
    accumulated in pieces that fit into memory as before (and, for a discriminator, are normalised as before)."""
    if not isinstance(config, (GPTConfigFile, TokenizerConfigFile)) or config.train.micro_batch is not None:
        return config
    tensor = config.parallel.tensor if isinstance(config, GPTConfigFile) else 1
    micro = per_rank_batch(config.train.global_batch, data_ranks(ranks, tensor))
    return config.model_copy(update={"train": config.train.model_copy(update={"micro_batch": micro})})


def begins_after(profile: ClusterConfig, number: int) -> str:
    """sbatch's --begin for the stand-by with this number, from 1."""
    return f"now+{round(60 * profile.elastic.after_minutes * number)}"


def submit_all(
    work: Work, profile: ClusterConfig, smaller: list[Size], wanted: str, token: str, say: Callable[[str], None]
) -> None:
    """Submit the stand-bys of job ``wanted`` under its lock and name them there. One that SLURM refuses is said: the
    run does without it."""
    place, jobs = Place.of(work.folder), [wanted]
    for number, size in enumerate(smaller, start=1):
        begin = begins_after(profile, number)
        try:
            (job,) = enqueue([work], profile, size, token, begin=begin, log=Path(work.folder) / "log")
        except UserError as error:
            say(f"no stand-by on {_nodes(size)}: {error}")
            continue
        jobs.append(job)
        lock.name_jobs(place, token, tuple(jobs))
        place.tell("stands_by", job=job, nodes=size.nodes, ranks=size.ranks)
        say(f"job {job} stands by on {_nodes(size)}")


def _nodes(size: Size) -> str:
    return f"{size.nodes} node{'s' * (size.nodes > 1)}"
