"""Python's garbage collector on a schedule that all ranks share."""

import gc

EVERY_STEPS = 100


class ScheduledCollection:
    """Around the training loop; call ``freeze`` once a first step was computed, and ``step`` after every step.

    Left alone, the collector runs whenever a rank's own counters say so and then walks every object of torch and
    DeepSpeed, and all other ranks wait for that one in the next collective. What lives after the first step will live
    on: it is frozen, that is, never looked at again. The rest is collected every ``EVERY_STEPS`` steps, on all ranks
    at once.
    """

    def __init__(self) -> None:
        self._frozen, self._enabled = False, gc.isenabled()

    def __enter__(self) -> "ScheduledCollection":
        return self

    def freeze(self) -> None:
        gc.collect()
        gc.freeze()
        gc.disable()
        self._frozen = True

    def step(self, number: int) -> None:
        """number: steps done since the run began, the same on all ranks."""
        if number % EVERY_STEPS == 0:
            gc.collect()

    def __exit__(self, *_: object) -> None:
        if self._frozen:  # a ladder's next run makes its own objects, and this one's must not stay
            gc.unfreeze()
        if self._enabled:
            gc.enable()
