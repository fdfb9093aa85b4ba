"""How strong classifier-free guidance is at each token of an image."""

import math
from typing import Literal, get_args

from llamagen_dist.models.sizes import GPTOptions

Schedule = Literal["constant", "linear", "power-cosine", "step"]
SCHEDULES: tuple[Schedule, ...] = get_args(Schedule)


def guidance_scales(
    tokens: int, scale: float, schedule: str = "constant", interval: int = -1, power: float = 2.75, start: float = 0.18
) -> list[float]:
    """The scale s_t of each token t: guided = null + s_t x (conditional - null); 1 is the conditional alone.

    tokens: N, of an image.
    scale: s, the largest s_t; up to 1 nothing is guided.
    schedule: ``constant``, s; ``linear``, 1 + (s - 1) t / N; ``power-cosine``,
        1 + (s - 1) (1 - cos(pi (t / N)^power)) / 2; ``step``, 1 for the first ``start`` x N tokens, then s.
    interval: of ``constant``, LlamaGen's: k >= 0 guides the first k + 2 tokens (the first one and decoding steps
        0 … k); -1 all of them.
    power: of ``power-cosine``; above 1 guidance comes later.
    start: of ``step``, a share of the tokens in [0, 1].

    Raises ValueError: unknown schedule, a number outside of its range, an interval with another schedule.
    """
    if schedule not in SCHEDULES:
        raise ValueError(f"schedule {schedule!r} is none of {', '.join(SCHEDULES)}")
    if scale < 0 or interval < -1 or power <= 0 or not 0 <= start <= 1:
        raise ValueError(f"scale {scale}, interval {interval}, power {power}, start {start}")
    if interval >= 0 and schedule != "constant":
        raise ValueError(f"an interval ({interval}) belongs to the constant schedule, not to {schedule}")

    def share(t: int) -> float:
        """Of s - 1, what is added to 1 at token t."""
        if schedule == "linear":
            return t / tokens
        if schedule == "power-cosine":
            return (1 - math.cos(math.pi * (t / tokens) ** power)) / 2
        if schedule == "step":
            return float(t >= start * tokens)
        return float(interval < 0 or t <= interval + 1)

    return [1 + (scale - 1) * share(t) if scale > 1 else 1.0 for t in range(tokens)]


def misguided(model: GPTOptions, cfg_scale: float, beta: float | None) -> str | None:
    """Why a model cannot be sampled with this guidance, and what is meant instead; None: it can."""
    if beta is not None and not 0 < beta <= 1:
        return f"beta {beta:g} must lie above 0 and not above 1"
    if model.guidance == "free" and cfg_scale > 1:
        scale = 1 / cfg_scale
        return (
            f"the GPT was trained guidance-free (model.guidance: free) and has no guidance scale: instead of "
            f"cfg_scale {cfg_scale:g} set cfg_scale 1 and beta, such as {scale:.2g} for guidance of that strength"
        )
    if model.guidance != "free" and beta is not None:
        return (
            f"beta {beta:g} belongs to a GPT that was trained guidance-free (model.guidance: free), and this one was "
            f"not: set cfg_scale, such as {1 / beta:.3g} for guidance of that strength, and leave beta out"
        )
    return None
