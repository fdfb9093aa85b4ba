"""Where shards may lie, and how they are brought near: the keys that every program that reads shards shares."""

import os
import re
from pathlib import Path
from typing import Annotated, Any

from pydantic import BeforeValidator, Field

from llamagen_dist.config.section import Section

_REMOTE = re.compile(r"(?:[A-Za-z][A-Za-z0-9+.-]+://|pipe:)")


def is_remote(location: str | Path) -> bool:
    """Whether this is a URL (``https://…``, ``s3://…``) or a command (``pipe:…``), not a folder."""
    return isinstance(location, str) and _REMOTE.match(location) is not None


def _location(value: Any) -> Any:
    return Path(value) if isinstance(value, str) and not is_remote(value) else value


Location = Annotated[Path | str, BeforeValidator(_location)]
"""A folder as a Path, or a URL as a str, because a Path would turn ``https://`` into ``https:/``."""

STAGE = "LLAMAGEN_STAGE"
"""Environment variable: the ``stage`` of a cluster's profile, for the runs launched there."""


class ShardAccess(Section):
    """How shards are reached that do not lie on a fast local disk."""

    cache: Path | None = None
    """Folder on a local disk where remote shards are kept, shared by all processes of a node; needed for URLs
    unless they are staged."""
    cache_gb: Annotated[float, Field(gt=0)] = 50.0
    """Most that the cache may hold, in 10^9 bytes; what was unused for longest goes first. With data.window_shards
    it should hold two windows, else the whole set."""
    allow_pipe: bool = False
    """Whether ``pipe:COMMAND`` may be run as a source of shards ({name} in it stands for the file's name)."""
    stage: Path | None = None
    """Copy the shards here once per node before anything starts (/dev/shm, or a local disk), checked against their
    sha256, shared by the node's ranks and removed at the end. /dev/shm counts as memory of the job. The nodes wait for
    each other afterwards, at most guard.start_minutes."""

    @property
    def staged_in(self) -> Path | None:
        """``stage``, or the cluster profile's where these keys say nothing of how to bring shards near."""
        if self.stage is not None or self.cache is not None:
            return self.stage
        return Path(os.environ[STAGE]) if os.environ.get(STAGE) else None
