"""What training/fit.py asks of the thing it trains. The GPT and the tokenizer are the two tasks there are."""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from numpy.typing import NDArray
from torch import Tensor

from llamagen_dist.config import GPTConfigFile, TokenizerConfigFile
from llamagen_dist.parallel.clock import Clock
from llamagen_dist.parallel.entries import TensorEntry
from llamagen_dist.parallel.topology import Topology
from llamagen_dist.training.guards import StepGuard

TrainingConfig = GPTConfigFile | TokenizerConfigFile
"""Of either, fit() reads only the sections that both have: train, validation, checkpoint, log, tracking, guard."""


class Task(Protocol):
    """One trainable system: its modules and optimizers on this rank, already built and sharded."""

    topology: Topology
    clock: Clock
    """Made with the task; fit() reads it. A task reports the parts that fit() cannot see (``optimizer``)."""

    guard: StepGuard
    """Made with the task, which lets it watch every loss and asks it before every update."""

    @property
    def zero(self) -> int:
        """DeepSpeed ZeRO stage, 0 without."""
        ...

    def step(self, batch: Any, images_seen: int) -> Mapping[str, Tensor]:
        """One optimizer step on this rank's share of the global batch that starts at sample ``images_seen``.

        Returns 0-d tensors, each this rank's mean over its share; fit() averages them over the data-parallel
        ranks when it logs. ``loss`` must be among them. Weights and optimizer state stay as they are unless ``guard``
        lets the step pass.
        """
        ...

    def rehearse(self, batch: Any, images_seen: int) -> None:
        """The same computation as ``step`` would do, before the first of a start.

        It compiles what is compiled and runs out of memory if a step would, but weights, buffers, optimizer state and
        random numbers stay as they are.
        """
        ...

    def validate(self) -> Mapping[str, float]:
        """Held-out metrics over all ranks (collective; every rank returns the same numbers)."""
        ...

    def pictures(self, count: int) -> Mapping[str, Tensor]:
        """What can be seen of the state that was just validated, by name: uint8 (3, H, W). On rank 0 alone.

        count: images to show at most.
        """
        ...

    def arrays(self) -> Mapping[str, Mapping[str, NDArray[Any]]]:
        """What a report draws of the state that was just validated and no scalar holds: by name of the file. On rank 0
        alone."""
        ...

    def entries(self) -> Sequence[TensorEntry]:
        """Every tensor a checkpoint holds, in an order that is the same on all ranks."""
        ...

    def scalars(self) -> Mapping[str, float]:
        """Small numbers a resume needs besides the tensors (Adam's step counts)."""
        ...

    def load_scalars(self, scalars: Mapping[str, float]) -> None: ...

    def describe(self) -> Mapping[str, Any]:
        """What summary.json records of the system.

        At least ``params`` and ``precision`` (of the matrix products, as in devices.py); ``tokens_per_image`` and
        ``training_flops_per_image`` where known.
        """
        ...

    smaller: str
    """Settings with which it needs less memory, for an out-of-memory message."""

    def memory(self) -> Sequence[str]:
        """Lines for an out-of-memory message: what this rank was expected to hold, and what it really holds."""
        ...


class Batch(Protocol):
    @property
    def samples(self) -> Tensor | None:
        """int64 (n,), on the host: which images of the data set these are."""
        ...


class Stream(Protocol):
    """Batches by position: nothing to save."""

    def batch(self, images_seen: int) -> Batch:
        """This data-parallel rank's share of the global batch that starts at global sample ``images_seen``."""
        ...

    def where(self, sample: int) -> str:
        """A sample's shard and its position there, for messages."""
        ...
