"""No score is made from numbers that are not numbers: the metrics ask here first."""

import torch
from torch import Tensor


def require_finite(what: str, *values: Tensor) -> None:
    """Raises ValueError where one of ``values`` holds a NaN or an infinity. what: their name in its message.

    Comparisons with a NaN are false and ``max(0.0, nan)`` is 0, so that such a value could come out as a good score.
    """
    bad = sum(int((~torch.isfinite(value)).sum()) for value in values)
    if bad:
        raise ValueError(f"{what}: {bad} of {sum(value.numel() for value in values)} values are NaN or infinite")
