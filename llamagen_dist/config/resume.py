"""What may change between two starts of one run, and what may not."""

from pathlib import Path

from llamagen_dist.config.loader import difference, load
from llamagen_dist.config.section import Section
from llamagen_dist.errors import UserError

# How a run is executed and watched, never what is computed.
ELASTIC = (
    "run_dir",
    "parallel",
    "train.micro_batch",
    "compute.recompute_every",
    "compute.compile",
    "checkpoint",
    "guard",
    "log",
    "validation.batch",
    "data.workers",
    "data.cache",
    "data.cache_gb",
    "data.stage",
    "data.allow_pipe",
    "ladder",
)


def same_config(directory: Path, config: Section) -> list[str]:
    """What differs from the run's config and may, for people. Raises UserError for what may not."""
    path = directory / "config.yaml"
    if not path.exists():
        return []
    before = load(path)
    changed = difference(before, config, ignore=ELASTIC)
    if changed:
        raise UserError(
            f"{directory}: holds a run with another config ({'; '.join(changed)}); "
            "choose another run_dir, or use the old values to continue it"
        )
    allowed = difference(before, config, ignore=("run_dir", "ladder"))
    return [f"{directory}: changed since the last start, which is allowed: {'; '.join(allowed)}"] if allowed else []
