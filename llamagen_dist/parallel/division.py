"""The rules by which ranks share a batch and a model: a run refuses by them, a plan lists by them. No torch here."""

from dataclasses import dataclass

from llamagen_dist.config import GPTConfigFile, Section, TokenizerConfigFile, TrainSection, rungs
from llamagen_dist.errors import UserError
from llamagen_dist.models.sizes import GPTConfig


def divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]


def data_ranks(ranks: int, tensor: int) -> int:
    """How many data-parallel ranks there are when ``tensor`` neighbours share a model. Raises UserError."""
    if ranks % tensor:
        raise UserError(
            f"parallel.tensor: {tensor} does not divide {ranks} ranks; use a multiple of {tensor} ranks or one of "
            f"parallel.tensor={', '.join(map(str, divisors(ranks)))}"
        )
    return ranks // tensor


@dataclass(frozen=True)
class BatchDivision:
    """A global batch as one data-parallel rank sees it, in images.

    per_rank: in a step. micro: in a forward pass.
    """

    per_rank: int
    micro: int

    @property
    def accumulation(self) -> int:
        """Forward passes in a step."""
        return self.per_rank // self.micro


def per_rank_batch(global_batch: int, data: int) -> int:
    """Images of a global batch per data-parallel rank. Raises UserError where they cannot be shared equally."""
    if global_batch % data:
        # equal shares, so that the mean over ranks of their mean losses is the mean over the batch
        nearest = max(n for n in divisors(global_batch) if n <= data)
        raise UserError(
            f"train.global_batch: {global_batch} images cannot be shared equally by {data} data-parallel ranks; "
            f"use {nearest} data-parallel ranks or a global batch that is a multiple of {data}"
        )
    return global_batch // data


def divide_batch(train: TrainSection, data: int) -> BatchDivision:
    """Over ``data`` data-parallel ranks. Raises UserError where batch or micro-batch do not divide."""
    per_rank = per_rank_batch(train.global_batch, data)
    micro = train.micro_batch or per_rank
    if per_rank % micro:
        largest = max(n for n in divisors(per_rank) if n <= micro)
        raise UserError(
            f"train.micro_batch: {micro} does not divide a rank's share of {per_rank} images; use {largest}"
        )
    return BatchDivision(per_rank, micro)


def check_ranks(config: Section, ranks: int) -> None:
    """Refuse beforehand what so many ranks of this config would refuse at their start. Raises UserError."""
    if isinstance(config, GPTConfigFile):
        for _, rung in rungs(config):
            divide_batch(rung.train, data_ranks(ranks, rung.parallel.tensor))
    elif isinstance(config, TokenizerConfigFile):
        # its micro-batch need not divide: the losses of its pieces are weighted by their sizes
        per_rank_batch(config.train.global_batch, ranks)


def check_split(config: GPTConfig, tensor: int) -> None:
    """Raise UserError if ``tensor`` ranks cannot share the model, with the sizes that would work."""
    if (why := config.unsplittable(tensor)) is not None:
        raise UserError(f"parallel.tensor: {why}")
