"""Typed configuration: YAML files plus ``key=value`` become one frozen, validated section.

public.py lists what is here. It is imported at the first use of a name: building the sections takes 0.3 s, which
``llamagen status``, the ends of a job's batch script and ``--help`` need not wait for.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from llamagen_dist.config.public import *  # noqa: F403
    from llamagen_dist.config.public import __all__ as __all__
else:

    def __getattr__(name: str) -> Any:
        # not "from llamagen_dist.config import public", which would ask here for public
        public = importlib.import_module("llamagen_dist.config.public")
        if name == "__all__" or name in public.__all__:
            return getattr(public, name)
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
