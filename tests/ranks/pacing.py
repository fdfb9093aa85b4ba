"""A disk as slow as a test wants it."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from llamagen_dist.checkpoint import staging


@contextmanager
def paced(pace: Callable[[int], None] | None) -> Iterator[None]:
    """``pace(bytes)`` is called from whatever thread writes a checkpoint's file, after each block; None: as usual."""
    real = staging.blocks

    def blocks(*arguments):
        for block in real(*arguments):
            yield block
            if pace is not None:
                pace(len(block))

    staging.blocks = blocks
    try:
        yield
    finally:
        staging.blocks = real
