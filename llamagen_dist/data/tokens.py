"""Token batches by position: what a GPT step is fed with is a function of (seed, images_seen) and nothing
else.
"""

from collections.abc import Iterator
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray

from llamagen_dist import prng
from llamagen_dist.config import UserError
from llamagen_dist.data.batch import TokenBatch
from llamagen_dist.data.order import Ahead, Order
from llamagen_dist.data.shards import LABEL_MEMBER, Shards
from llamagen_dist.parallel.topology import Topology

__all__ = ["CODES_MEMBER", "TokenBatch", "TokenReader", "TokenStream"]

CODES_MEMBER = ".codes.npy"


class TokenReader:
    """Gathers codes and labels straight out of the memory-mapped tars, whole batches at a time.

    Every record of a token shard is equally long, so a shard is a strided array. Raises UserError where
    shards are not token shards, or a shard's first record does not hold what the manifest says.
    """

    def __init__(self, shards: Shards) -> None:
        manifest = shards.manifest
        if manifest.kind != "tokens" or manifest.grid is None or manifest.crops is None or not manifest.vocab_size:
            raise UserError(f"{shards.folder}: holds no tokens; make them with tokenizer_training.extract")
        self.shards, self.crops, self.vocab_size = shards, manifest.crops, manifest.vocab_size
        self.tokens = manifest.grid[0] * manifest.grid[1]
        self.num_classes = manifest.num_classes
        self._checked: set[int] = set()

    def gather(
        self, samples: NDArray[np.int64], crop: NDArray[np.int64]
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """(tokens int64 [n, tokens], labels int64 [n]) of the samples' crops. samples, crop: int64 [n].

        Raises UserError for a code outside the vocabulary or a label outside the classes.
        """
        tokens = np.empty((len(samples), self.tokens), np.int64)
        labels = np.empty(len(samples), np.int64)
        shard_of = np.searchsorted(self.shards.ends, samples, side="right")
        for shard in np.unique(shard_of):
            rows = np.nonzero(shard_of == shard)[0]
            record = self.shards.manifest.shards[shard]
            inside = samples[rows] - (self.shards.ends[shard] - record.samples)
            codes, digits = self._views(int(shard))
            tokens[rows] = codes[inside, crop[rows]]
            labels[rows] = (digits[inside].astype(np.int64) - ord("0")) @ _powers(digits.shape[1])
        bad = (tokens.max(axis=1) >= self.vocab_size) | (labels < 0) | (labels >= self.num_classes)
        if bad.any():
            first = int(samples[int(np.argmax(bad))])
            raise UserError(
                f"{self.shards.where(first)}: a code or label lies outside the manifest's {self.vocab_size} "
                f"codes and {self.num_classes} classes; check llamagen shards verify {self.shards.folder}"
            )
        return tokens, labels

    def _views(self, shard: int) -> tuple[NDArray[np.uint16], NDArray[np.uint8]]:
        """uint16 [samples, crops, tokens] and the label's digits, uint8 [samples, width], both without a
        copy.
        """
        record, members = self.shards.manifest.shards[shard], self.shards.manifest.members
        where = f"{self.shards.folder / record.name}"
        if record.layout is None or record.stride is None or {CODES_MEMBER, LABEL_MEMBER} - {*members}:
            raise UserError(f"{where}: token shards need {CODES_MEMBER} and {LABEL_MEMBER} in records of equal length")
        data = self.shards.bytes_of(shard)
        label_at, label_size = record.layout[members.index(LABEL_MEMBER)]
        codes_at, codes_size = record.layout[members.index(CODES_MEMBER)]
        header = codes_size - 2 * self.crops * self.tokens
        if shard not in self._checked:
            shape = (self.crops, self.tokens)
            if bytes(data[codes_at : codes_at + header]) != _npy_header(shape):
                raise UserError(f"{where}: its codes are not uint16 {list(shape)}, as the manifest says")
            self._checked.add(shard)
        codes = np.ndarray(
            (record.samples, self.crops, self.tokens),
            "<u2",
            data,
            codes_at + header,
            (record.stride, 2 * self.tokens, 2),
        )
        return codes, np.ndarray((record.samples, label_size), np.uint8, data, label_at, (record.stride, 1))


def _powers(digits: int) -> NDArray[np.int64]:
    return 10 ** np.arange(digits - 1, -1, -1, dtype=np.int64)


def _npy_header(shape: tuple[int, int]) -> bytes:
    """What numpy writes in front of a uint16 array of this shape."""
    text = repr({"descr": "<u2", "fortran_order": False, "shape": shape})
    text += " " * (-(len(text) + 11) % 64) + "\n"
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text.encode()


def codes_bytes(codes: NDArray[np.uint16]) -> bytes:
    """codes uint16 [crops, tokens] as the bytes of an .npy file."""
    return _npy_header((codes.shape[0], codes.shape[1])) + np.ascontiguousarray(codes, "<u2").tobytes()


class TokenStream:
    """Training batches by position, and validation batches in sample order.

    The global batch at ``images_seen`` is positions images_seen … images_seen + global_batch - 1;
    data-parallel rank r takes the r-th of ``dp`` equal consecutive pieces, and the tensor-parallel ranks of
    one rank read the same. Crop choice and label dropout (null class = number of classes) are hashes of
    (seed, position).
    """

    def __init__(
        self, shards: Shards, topology: Topology, global_batch: int, seed: int, class_dropout_p: float
    ) -> None:
        self._reader = TokenReader(shards)
        self._order = Order(len(shards), seed)
        self._topology, self._share = topology, topology.share(global_batch)
        self._null = self._reader.num_classes
        self._crop = Ahead(partial(prng.integers, seed, "token-crop", high=self._reader.crops))
        self._drop = Ahead(partial(prng.uniform, seed, "label-dropout"))
        self._dropout = class_dropout_p

    def batch(self, images_seen: int) -> TokenBatch:
        """This rank's share of the global batch: tokens int64 [share, N], labels, positions, samples int64 [share]."""
        start = images_seen + self._topology.dp_rank * self._share
        positions = torch.arange(start, start + self._share)
        samples = self._order.samples(start, self._share).numpy()
        crop = self._crop.at(start, self._share).numpy()
        tokens, labels = (torch.from_numpy(array) for array in self._reader.gather(samples, crop))
        dropped = self._drop.at(start, self._share) < self._dropout
        return TokenBatch(tokens, labels.masked_fill(dropped, self._null), positions, torch.from_numpy(samples))

    def where(self, sample: int) -> str:
        """The shard and record of a sample, for messages."""
        return self._reader.shards.where(sample)

    def validation_batches(self, limit: int | None, batch: int) -> Iterator[TokenBatch]:
        """This rank's share of the first ``limit`` samples (None: all), each once over all ranks, crop 0, no
        dropout.

        ``positions`` are global sample numbers. The batches are cut by sample number and dealt to the ranks
        in turn: their contents are the same for any number of ranks, only who sees which differs. Ranks may
        get different numbers of samples (or none), so an exact mean sums over samples and divides by the
        total count.
        """
        count = len(self._reader.shards) if limit is None else min(limit, len(self._reader.shards))
        for start in range(self._topology.dp_rank * batch, count, self._topology.dp * batch):
            samples = np.arange(start, min(start + batch, count))
            tokens, labels = self._reader.gather(samples, np.zeros_like(samples))
            yield TokenBatch(torch.from_numpy(tokens), torch.from_numpy(labels), torch.from_numpy(samples))
