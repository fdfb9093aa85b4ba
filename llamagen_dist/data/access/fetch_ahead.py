"""The shards of the next window come into the cache while those of the present one are read."""

import threading
from collections.abc import Sequence

from llamagen_dist.data.access.folders import RemoteFolder
from llamagen_dist.data.order import Windows
from llamagen_dist.data.shards import Shards
from llamagen_dist.errors import UserError

_AT_ONCE = 2  # per rank; the ranks of a node share the work through the cache's locks


class FetchAhead:
    """Follows the positions that a stream reads. Does nothing for shards that need no cache.

    rank: where this rank begins in the list, so that the ranks of a node do not all wait for the same shard.
    """

    def __init__(self, shards: Shards, windows: Windows | None, rank: int) -> None:
        self._shards, self._rank = shards, rank
        self._windows = windows if isinstance(shards.source, RemoteFolder) else None
        self._first, self._end = 0, 0  # positions of the window that was seen last

    def at(self, position: int) -> None:
        """Say that this position is read now. Returns at once; a shard that fails is told of by whoever reads it."""
        if self._windows is None or self._first <= position < self._end:
            return
        present, self._first, self._end = self._windows.window(position)
        coming, _, _ = self._windows.window(self._end)
        wanted = [*self._turned(present), *self._turned(coming)]
        assert isinstance(self._shards.source, RemoteFolder)
        records = self._shards.manifest.shards
        if sum(records[shard].bytes for shard in {*wanted}) > self._shards.source.cache.limit:
            return  # what is fetched ahead would push out what is being read
        for number in range(_AT_ONCE):
            threading.Thread(target=self._fetch, args=(wanted[number::_AT_ONCE],), daemon=True).start()

    def _turned(self, shards: Sequence[int]) -> list[int]:
        start = self._rank % len(shards)
        return [*shards[start:], *shards[:start]]

    def _fetch(self, shards: Sequence[int]) -> None:
        for shard in shards:
            try:
                self._shards.source.open(self._shards.manifest.shards[shard]).close()
            except UserError:
                return
