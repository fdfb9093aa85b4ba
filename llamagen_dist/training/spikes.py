"""The spike score: how far a loss lies above those before it, in their standard deviations."""

import statistics
from collections import deque
from collections.abc import Iterable

FEWEST = 8  # losses before there is a score


class Spikes:
    """Scores every logged loss against the ``window`` logged ones before it; a pure function of metrics.jsonl.

    before: the losses logged so far, oldest first, where a run goes on. It reports and never stops or changes anything.
    """

    def __init__(self, window: int, threshold: float, before: Iterable[float] = ()) -> None:
        self._threshold = threshold
        self._losses: deque[float] = deque(before, maxlen=window)

    def score(self, loss: float) -> float | None:
        """(loss - mean) / standard deviation where that is above the threshold, else None; remembers ``loss``."""
        found = None
        if len(self._losses) >= FEWEST:
            deviation = statistics.stdev(self._losses)
            if deviation > 0:
                found = (loss - statistics.fmean(self._losses)) / deviation
        self._losses.append(loss)
        return found if found is not None and found > self._threshold else None
