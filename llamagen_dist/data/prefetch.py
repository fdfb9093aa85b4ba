"""The batches to come, made in a thread while a step runs. They are functions of position, so nothing else changes."""

from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor

from llamagen_dist.data.batch import TokenBatch
from llamagen_dist.data.tokens import TokenStream


class Prefetcher:
    """A TokenStream that is ``ahead`` global batches ahead, and no more; a context manager that ends its thread.

    step: images from one call's position to the next one's; another position drops what was made ahead.
    pin: batches lie in page-locked memory, from where they reach a GPU while it computes.
    What goes wrong with a batch is raised by the call that asks for that batch.
    """

    def __init__(self, stream: TokenStream, step: int, ahead: int = 2, pin: bool = False) -> None:
        self._stream, self._step, self._ahead, self._pin = stream, step, ahead, pin
        # One thread: batches are made in order, and reading releases the interpreter's lock while the step computes.
        self._thread = ThreadPoolExecutor(1, "batches")
        self._waiting: deque[tuple[int, Future[TokenBatch]]] = deque()

    def batch(self, images_seen: int) -> TokenBatch:
        """This rank's share of the global batch at ``images_seen``, as TokenStream.batch gives it."""
        if not self._waiting or self._waiting[0][0] != images_seen:
            self._drop()
            self._ask(images_seen)
        _, batch = self._waiting.popleft()
        while len(self._waiting) < self._ahead:
            self._ask(images_seen + self._step * (len(self._waiting) + 1))
        return batch.result()

    def _ask(self, position: int) -> None:
        self._waiting.append((position, self._thread.submit(self._make, position)))

    def _make(self, position: int) -> TokenBatch:
        batch = self._stream.batch(position)
        return batch.pinned() if self._pin else batch

    def _drop(self) -> None:
        while self._waiting:
            self._waiting.pop()[1].cancel()

    def where(self, sample: int) -> str:
        """The shard and record of a sample, for messages."""
        return self._stream.where(sample)

    def close(self) -> None:
        """Wait for the batch that is being made, make no more."""
        self._drop()
        self._thread.shutdown()

    def __enter__(self) -> "Prefetcher":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
