"""The spike score: how far a loss lies above those before it, in their standard deviations."""

import statistics
from collections import deque
from collections.abc import Iterable

FEWEST = 8  # losses before there is a score


class Spikes:
    """Scores every logged loss against the logged ones before it; a pure function of metrics.jsonl.

    It reports and never stops or changes anything.

    window: how many losses a loss is compared with.
    threshold: in standard deviations; scores up to it are not reported.
    before: the losses logged so far, oldest first, when a run resumes.
    """

    def __init__(self, window: int, threshold: float, before: Iterable[float] = ()) -> None:
        self._threshold = threshold
        self._losses: deque[float] = deque(before, maxlen=window)

    def score(self, loss: float) -> float | None:
        """(loss - mean) / standard deviation where that is above the threshold, else None; remembers ``loss``."""
        score = 0.0
        if len(self._losses) >= FEWEST and (deviation := statistics.stdev(self._losses)) > 0:
            score = (loss - statistics.fmean(self._losses)) / deviation
        self._losses.append(loss)
        return score if score > self._threshold else None
