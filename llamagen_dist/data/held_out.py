"""Which images are kept apart for validation."""

import numpy as np
import torch
from numpy.typing import NDArray

from llamagen_dist import prng
from llamagen_dist.errors import UserError


def held_out_mask(labels: NDArray[np.int64] | None, count: int, held_out: int) -> NDArray[np.bool_]:
    """bool [count], ``held_out`` of them True: the same share of every class, chosen by a hash of the image
    number.

    Where the shares are not whole numbers the largest remainders are rounded up.
    labels: int64 [count], or None for one class.
    Raises UserError when nothing would be left to train on.
    """
    if not 0 < held_out < count:
        raise UserError(f"--held-out {held_out}: there are {count} images; hold out fewer, and at least one")
    labels = np.zeros(count, np.int64) if labels is None else labels
    sizes = np.bincount(labels)
    exact = sizes * held_out / count
    quota = np.floor(exact).astype(np.int64)
    quota[np.argsort(quota - exact, kind="stable")[: held_out - int(quota.sum())]] += 1
    rank = prng.bits(0, "held-out", torch.arange(count)).to(torch.int64).numpy()
    mask = np.zeros(count, np.bool_)
    for label, wanted in enumerate(quota):
        members = np.nonzero(labels == label)[0]
        mask[members[np.argsort(rank[members], kind="stable")[:wanted]]] = True
    return mask
