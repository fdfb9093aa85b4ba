"""The digest that a run must have, from its data order alone."""

import torch
from torch import Tensor

from llamagen_dist.data.digest import digest
from llamagen_dist.data.order import Order

_CHUNK = 1 << 18


def expected(order: Order, images_seen: int, first: int = 0) -> Tensor:
    """The digest of what positions ``first`` … ``images_seen`` - 1 of a run in this order show.

    It does not depend on the batch size or the number of ranks. About 2 µs a position.
    """
    total = torch.zeros((), dtype=torch.int64)
    for start in range(first, images_seen, _CHUNK):
        total += digest(order.at(torch.arange(start, min(start + _CHUNK, images_seen))))
    return total
