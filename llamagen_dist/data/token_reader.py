"""Codes, labels and caption features of any samples of token shards, read where they lie: one pread for each part.

Not through a memory map: a shard that is cut short or taken away while a run reads it would then kill the process
with a bus error, where a short read is something that can be said.
"""

import ast
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from llamagen_dist.data.captions import CAPTION_FEATURES_MEMBER, SHORT_FEATURES_MEMBER
from llamagen_dist.data.manifest import CaptionEncoding
from llamagen_dist.data.shards import LABEL_MEMBER, Shards
from llamagen_dist.errors import UserError

CODES_MEMBER = ".codes.npy"


class TokenReader:
    """The parts of token shards, for many samples at once.

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
        self._checked: dict[int, int] = {}

    def gather(
        self, samples: NDArray[np.int64], crop: NDArray[np.int64]
    ) -> tuple[NDArray[np.int64], NDArray[np.int64] | None]:
        """(tokens int64 [n, tokens], labels int64 [n], or None where there are no classes) of the samples' crops.
        samples, crop: int64 [n].

        Raises UserError, naming shard and sample: a code outside the vocabulary, a label outside the classes, a part
        that is missing, is not of the manifest's shape, or lies outside its file.
        """
        return self.codes(samples, crop), None if self.num_classes is None else self.labels(samples)

    def codes(self, samples: NDArray[np.int64], crop: NDArray[np.int64]) -> NDArray[np.int64]:
        """int64 [n, tokens]. Raises UserError as ``gather`` does."""
        shard_of, offsets, sizes = self.shards.spans(samples, CODES_MEMBER)
        width = 2 * self.tokens
        found = np.empty((len(samples), self.tokens), "<u2")
        into = found.reshape(-1).view(np.uint8).data
        starts = offsets + sizes - (self.crops - crop) * width
        for row, (shard, start) in enumerate(zip(shard_of.tolist(), starts.tolist(), strict=True)):
            if self._checked.get(shard) != sizes[row]:
                self._check(int(samples[row]), shard, int(offsets[row]), int(sizes[row]))
            self.shards.read_into(shard, into[row * width : (row + 1) * width], start)
        tokens = found.astype(np.int64)
        self._refuse(samples, tokens.max(axis=1, initial=0) >= self.vocab_size)
        return tokens

    def labels(self, samples: NDArray[np.int64]) -> NDArray[np.int64]:
        """int64 [n]. Raises UserError as ``gather`` does."""
        classes = self.shards.manifest.num_classes
        labels = np.empty(len(samples), np.int64)
        for row, text in enumerate(self._parts(samples, LABEL_MEMBER)):
            labels[row] = int(text) if text.isdigit() else -1
        self._refuse(samples, (labels < 0) | (labels >= classes))
        return labels

    def caption_features(self, samples: NDArray[np.int64], short: NDArray[np.bool_]) -> list[Tensor]:
        """bfloat16 [L, dim] each, 1 <= L <= max_tokens: the short caption's where ``short``, else the caption's.

        Raises UserError, naming shard and sample: no such features, or of another type or shape than the manifest's.
        """
        assert self.captions is not None
        found: list[Tensor | None] = [None] * len(samples)
        for member, rows in ((CAPTION_FEATURES_MEMBER, ~short), (SHORT_FEATURES_MEMBER, short)):
            places = np.nonzero(rows)[0]
            for place, data in zip(places.tolist(), self._parts(samples[places], member), strict=True):
                found[place] = self._features(int(samples[place]), member, data)
        return [one for one in found if one is not None]

    def _features(self, sample: int, member: str, data: bytearray) -> Tensor:
        assert self.captions is not None
        start = _header_size(data)
        shape = uint16_shape(bytes(data[:start]))
        length, dim = shape if shape is not None and len(shape) == 2 else (0, 0)
        if (
            dim != self.captions.dim
            or not 1 <= length <= self.captions.max_tokens
            or len(data) != start + 2 * length * dim
        ):
            raise UserError(
                f"{self.shards.where(sample)}: {member} does not hold uint16 [1 to {self.captions.max_tokens}, "
                f"{self.captions.dim}], as the manifest says; check llamagen shards verify {self.shards.location}"
            )
        return torch.frombuffer(data, dtype=torch.bfloat16, offset=start).view(length, dim)

    def _parts(self, samples: NDArray[np.int64], member: str) -> list[bytearray]:
        """The bytes of one member of each sample."""
        shard_of, offsets, sizes = self.shards.spans(samples, member)
        found = []
        for shard, offset, size in zip(shard_of.tolist(), offsets.tolist(), sizes.tolist(), strict=True):
            found.append(data := bytearray(size))
            self.shards.read_into(shard, memoryview(data), offset)
        return found

    def _check(self, sample: int, shard: int, offset: int, size: int) -> None:
        """The codes of this record are what the manifest says. Once a shard: equal sizes mean equal shapes."""
        header = bytearray(max(size - 2 * self.crops * self.tokens, 0))
        self.shards.read_into(shard, memoryview(header), offset)
        if uint16_shape(bytes(header)) != (self.crops, self.tokens):
            raise UserError(
                f"{self.shards.where(sample)}: its codes are not uint16 {[self.crops, self.tokens]}, as the manifest "
                "says; extract them again, with one tokenizer at one image size"
            )
        self._checked[shard] = size

    def _refuse(self, samples: NDArray[np.int64], bad: NDArray[np.bool_]) -> None:
        if bad.any():
            first = int(samples[int(np.argmax(bad))])
            classes = "" if self.num_classes is None else f" and {self.num_classes} classes"
            raise UserError(
                f"{self.shards.where(first)}: a code or label lies outside the manifest's {self.vocab_size} "
                f"codes{classes}; check llamagen shards verify {self.shards.location}"
            )


def codes_bytes(codes: NDArray[np.uint16]) -> bytes:
    """codes uint16 [crops, tokens] as the bytes of an .npy file."""
    text = repr({"descr": "<u2", "fortran_order": False, "shape": codes.shape})
    text += " " * (-(len(text) + 11) % 64) + "\n"
    header = b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text.encode()
    return header + np.ascontiguousarray(codes, "<u2").tobytes()


def _header_size(data: bytes | bytearray) -> int:
    return 10 + int.from_bytes(data[8:10], "little")


@lru_cache(maxsize=4096)
def uint16_shape(header: bytes) -> tuple[int, ...] | None:
    """The shape in the header of an .npy file; None where it is none of a plain uint16 array."""
    if header[:8] != b"\x93NUMPY\x01\x00" or len(header) != _header_size(header) or len(header) > 1024:
        return None
    try:
        found = ast.literal_eval(header[10:].decode("latin-1"))
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return None
    if not isinstance(found, dict) or found.keys() != {"descr", "fortran_order", "shape"}:
        return None
    shape = found["shape"]
    if not isinstance(shape, tuple) or not all(type(side) is int and side >= 0 for side in shape):
        return None
    return shape if found["descr"] == "<u2" and found["fortran_order"] is False else None
