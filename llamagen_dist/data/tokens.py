"""Token shards as batches by position: what a GPT step is fed with is a function of (seed, images_seen) and nothing
else.
"""

from collections.abc import Iterator
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from llamagen_dist import prng
from llamagen_dist.data import npy
from llamagen_dist.data.batch import TokenBatch, left_padded
from llamagen_dist.data.cache import ShardPrefetcher
from llamagen_dist.data.captions import CAPTION_FEATURES_MEMBER, SHORT_FEATURES_MEMBER
from llamagen_dist.data.manifest import CaptionEncoding
from llamagen_dist.data.order import Order, PositionCache
from llamagen_dist.data.shards import Shards
from llamagen_dist.errors import UserError
from llamagen_dist.models.gpt import Condition
from llamagen_dist.parallel.topology import Topology

CODES_MEMBER = ".codes.npy"


class TokenReader:
    """Codes, labels and caption features of any samples of token shards, read where they lie.

    num_classes: None where the samples have no labels; captions: None where they have no caption features. Raises
    UserError where shards are not token shards.
    """

    def __init__(self, shards: Shards) -> None:
        manifest = shards.manifest
        if manifest.kind != "tokens" or manifest.grid is None or manifest.crops is None or not manifest.vocab_size:
            raise UserError(f"{shards.location}: holds no tokens; make them with tokenizer_training.extract")
        self.shards, self.crops, self.vocab_size = shards, manifest.crops, manifest.vocab_size
        self.tokens = manifest.grid[0] * manifest.grid[1]
        self.num_classes = manifest.class_count
        self.captions: CaptionEncoding | None = manifest.captions

    def codes(self, samples: NDArray[np.int64], crop: NDArray[np.int64]) -> NDArray[np.int64]:
        """int64 [n, tokens]: one crop of each sample.

        samples, crop: int64 [n].
        Raises UserError, naming shard and sample: a code outside the vocabulary, a part that is missing, is not of the
        manifest's shape, or lies outside its file.
        """
        codes = self.shards.read_rows(samples, CODES_MEMBER, crop, (self.crops, self.tokens)).astype(np.int64)
        bad = codes.max(axis=1, initial=0) >= self.vocab_size
        if bad.any():
            first = int(samples[int(np.argmax(bad))])
            raise UserError(f"{self.shards.where(first)}: a code lies outside the manifest's {self.vocab_size} codes")
        return codes

    def labels(self, samples: NDArray[np.int64]) -> NDArray[np.int64]:
        """int64 [n]. Raises UserError, naming shard and sample, for a label that is missing or outside the classes."""
        return self.shards.labels(samples)

    def caption_features(self, samples: NDArray[np.int64], short: NDArray[np.bool_]) -> list[Tensor]:
        """bfloat16 [L, dim] each, 1 <= L <= max_tokens: the short caption's where ``short``, else the caption's.

        Raises UserError, naming shard and sample: no such features, or of another type or shape than the manifest's.
        """
        features: list[Tensor] = [torch.empty(0)] * len(samples)
        for member, chosen in ((CAPTION_FEATURES_MEMBER, ~short), (SHORT_FEATURES_MEMBER, short)):
            rows = np.nonzero(chosen)[0]
            for row, data in zip(rows.tolist(), self.shards.read_many(samples[rows], member), strict=True):
                features[row] = self._features(int(samples[row]), member, data)
        return features

    def _features(self, sample: int, member: str, data: bytearray) -> Tensor:
        assert self.captions is not None
        start = npy.header_size(data)
        # bfloat16 has no .npy type: shards hold the bit patterns as uint16, which every reader knows
        shape = npy.shape_of(bytes(data[:start]), "<u2")
        length, dim = shape if shape is not None and len(shape) == 2 else (0, 0)
        if (
            dim != self.captions.dim
            or not 1 <= length <= self.captions.max_tokens
            or len(data) != start + 2 * length * dim
        ):
            raise UserError(
                f"{self.shards.where(sample)}: {member} does not hold uint16 [1 to {self.captions.max_tokens}, "
                f"{self.captions.dim}]; run llamagen shards verify"
            )
        return torch.frombuffer(data, dtype=torch.bfloat16, offset=start).view(length, dim)


def codes_bytes(codes: NDArray[np.uint16]) -> bytes:
    """codes uint16 [crops, tokens] as the bytes of an .npy file."""
    text = repr({"descr": "<u2", "fortran_order": False, "shape": codes.shape})
    text += " " * (-(len(text) + 11) % 64) + "\n"
    header = npy.MAGIC + len(text).to_bytes(2, "little") + text.encode()
    return header + np.ascontiguousarray(codes, "<u2").tobytes()


class TokenStream:
    """Training batches by position, and validation batches in sample order.

    The global batch at ``images_seen`` is positions images_seen … images_seen + global_batch - 1;
    data-parallel rank r takes the r-th of ``dp`` equal consecutive pieces, and the tensor-parallel ranks of
    one rank read the same. Crop choice, dropout of the condition and, for captions, the choice between the long and
    the short one are hashes of (seed, position).

    dropout_p: share of samples whose condition is marked as dropped.
    caption_shape: (positions, features) of the model's caption prefix; None: the condition is the class.
    short_share: share of samples that get their short caption.
    window_shards: 0 takes samples from everywhere, else see ``order.Windows``.
    Raises UserError where the shards have no labels or captions, or captions that do not fit.
    """

    def __init__(
        self,
        shards: Shards,
        topology: Topology,
        global_batch: int,
        seed: int,
        dropout_p: float,
        caption_shape: tuple[int, int] | None = None,
        short_share: float = 0.0,
        window_shards: int = 0,
    ) -> None:
        self._reader = TokenReader(shards)
        self._order = Order(len(shards), seed, sizes=shards.sizes, window_shards=window_shards)
        self._prefetcher = ShardPrefetcher(shards.cache, shards.manifest.shards, self._order.windows, topology.rank)
        self._topology, self._share = topology, topology.per_rank_batch(global_batch)
        self._crop = PositionCache(partial(prng.integers, seed, "token-crop", high=self._reader.crops))
        self._drop = PositionCache(partial(prng.uniform, seed, "label-dropout"))
        self._short = PositionCache(partial(prng.uniform, seed, "short-caption"))
        self._dropout, self._short_share = dropout_p, short_share
        self._caption_shape = caption_shape
        if caption_shape is None:
            _ = shards.manifest.num_classes  # refused where there are no labels
        else:
            check_captions(shards, *caption_shape, short_share)

    def batch(self, images_seen: int) -> TokenBatch:
        """This rank's share of the global batch: tokens int64 [share, N], the condition, positions and samples int64
        [share]. A caption's features are bfloat16."""
        start = images_seen + self._topology.dp_rank * self._share
        positions = torch.arange(start, start + self._share)
        self._prefetcher.at(start)
        samples = self._order.samples(start, self._share)
        dropped = self._drop.at(start, self._share) < self._dropout
        crop, numbers = self._crop.at(start, self._share).numpy(), samples.numpy()
        short = np.zeros(0, np.bool_)
        if self._caption_shape is not None:
            short = (self._short.at(start, self._share) < self._short_share).numpy()
        condition = self._condition(numbers, short)
        tokens = torch.from_numpy(self._reader.codes(numbers, crop))
        return TokenBatch(tokens, condition, positions, samples, dropped)

    def _condition(self, samples: NDArray[np.int64], short: NDArray[np.bool_]) -> Condition:
        if self._caption_shape is None:
            return torch.from_numpy(self._reader.labels(samples))
        return left_padded(self._reader.caption_features(samples, short), self._caption_shape[0])

    def where(self, sample: int) -> str:
        """The shard and record of a sample, for messages."""
        return self._reader.shards.where(sample)

    def validation_batches(self, limit: int | None, batch: int) -> Iterator[TokenBatch]:
        """This rank's share of the first ``limit`` samples (None: all), each once over all ranks, crop 0, the long
        caption, no dropout.

        ``positions`` are global sample numbers. The batches are cut by sample number and dealt to the ranks
        in turn: their contents are the same for any number of ranks, only who sees which differs. Ranks may
        get different numbers of samples (or none), so an exact mean sums over samples and divides by the
        total count.
        """
        count = len(self._reader.shards) if limit is None else min(limit, len(self._reader.shards))
        for start in range(self._topology.dp_rank * batch, count, self._topology.dp * batch):
            samples = np.arange(start, min(start + batch, count))
            tokens = torch.from_numpy(self._reader.codes(samples, np.zeros_like(samples)))
            condition = self._condition(samples, np.zeros(len(samples), np.bool_))
            yield TokenBatch(tokens, condition, torch.from_numpy(samples))


def check_captions(shards: Shards, prefix_tokens: int, dim: int, short_share: float) -> None:
    """Raises UserError unless a model of so many caption positions, that wide, can be trained on the captions."""
    captions = shards.manifest.captions
    if captions is None:
        raise UserError(
            f"{shards.location}: holds no caption features, and a text-conditional model needs them; extract again "
            "with text_encoder=PATH"
        )
    if captions.dim != dim:
        raise UserError(
            f"model.caption_dim: is {dim}, but the captions in {shards.location} have {captions.dim} features; set it "
            f"to {captions.dim}"
        )
    if captions.max_tokens > prefix_tokens:
        raise UserError(
            f"model.prefix_tokens: is {prefix_tokens}, but the captions in {shards.location} have up to "
            f"{captions.max_tokens} tokens; set it to {captions.max_tokens}"
        )
    if short_share > 0 and not captions.short:
        raise UserError(f"data.short_captions: {shards.location} holds no short captions; set it to 0")
