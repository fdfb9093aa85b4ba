"""Keys and values of the positions that were computed already: generation then costs one position per token.

A caption whose prefix is rotated by zero takes one slot, whatever its length: its keys are all zero, so its n tokens
act as one key of weight n with the mean of their values.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

CPU_CHUNK_BYTES = 6 << 20  # keys and values of a few samples in fp32: what stays in a core's share of its cache


def attend_in_fp32(queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None) -> Tensor:
    """Attention of one new position on a CPU, computed in fp32, a few samples at a time: (B, heads, 1, head_dim).

    The fused bf16 kernel packs keys and values for matrix products that one query cannot repay: this takes 0.4 of its
    time at 255 positions, and rounds less.

    queries: (B, heads, 1, head_dim).
    keys: (B, key heads, S, head_dim).
    values: (B, key heads, S, head_dim).
    mask: what SDPA takes, (B, 1, 1, S), or None.
    """
    rows = max(1, CPU_CHUNK_BYTES // (2 * keys[0].numel() * 4))
    out = torch.empty_like(queries)
    for i in range(0, len(queries), rows):
        some = slice(i, i + rows)
        q, k, v = (part[some].float() for part in (queries, keys, values))
        hidden = None if mask is None else mask[some]
        out[some] = F.scaled_dot_product_attention(q, k, v, attn_mask=hidden, enable_gqa=q.shape[1] != k.shape[1])
    return out


class LayerCache:
    """One layer's keys and values, (B, heads, capacity, head_dim), of which the first ``filled`` positions are set.

    The memory is allocated once, at the first ``extend``, in the type that the layer computes in; the number of heads
    is read off there too (a tensor-parallel rank has its own share of them). An earlier cache's is taken if it fits.

    capacity: positions in all.
    slots: (B, S) int64, where each sample's next S positions are written, all below ``filled``; None: behind what is
        filled, for all samples alike.
    share: (B, T) fp32 or None; with it the first T positions, which come in one ``extend``, are kept as one: their
        mean weighted by ``share``.
    memory: of an earlier cache.
    """

    def __init__(self, capacity: int, share: Tensor | None = None, memory: tuple[Tensor, Tensor] | None = None) -> None:
        self.capacity, self.filled = capacity, 0
        self.slots: Tensor | None = None
        self._share = share
        self.memory = memory
        self._keys: Tensor | None = None
        self._values: Tensor | None = None

    def extend(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Add the keys and values of S more positions, (B, heads, S, head_dim) each.

        Returns those of all positions so far, as views of the cache. Raises ValueError beyond the capacity.
        """
        if self._share is not None:
            share, self._share = self._share[:, None, None, :], None
            # the prefix attends to itself as it is; only what comes later sees the one position it is folded into
            self.extend(*((share @ part.float()).type_as(part) for part in (keys, values)))
            return keys, values
        if self.slots is not None and self._keys is not None and self._values is not None:
            rows = torch.arange(len(keys), device=keys.device)[:, None]
            self._keys[rows, :, self.slots] = keys.transpose(1, 2)
            self._values[rows, :, self.slots] = values.transpose(1, 2)
            return self._keys[:, :, : self.filled], self._values[:, :, : self.filled]
        end = self.filled + keys.shape[2]
        if end > self.capacity:
            raise ValueError(f"position {end} of a cache for {self.capacity}")
        if self._keys is None or self._values is None:
            shape = (*keys.shape[:2], self.capacity, keys.shape[3])
            if self.memory is None or (self.memory[0].shape, self.memory[0].dtype) != (shape, keys.dtype):
                # zeros, since a hidden slot weighs 0 in a window's attention, and 0 x NaN would be NaN
                self.memory = keys.new_zeros(shape), values.new_zeros(shape)
            self._keys, self._values = self.memory
        self._keys[:, :, self.filled : end] = keys
        self._values[:, :, self.filled : end] = values
        self.filled = end
        return self._keys[:, :, :end], self._values[:, :, :end]

    def held(self) -> tuple[Tensor, ...]:
        """Keys and values of all slots, once there are any."""
        return () if self._keys is None or self._values is None else (self._keys, self._values)

    def keep(self, rows: int) -> None:
        """Forget all but the first ``rows`` samples."""
        if self._keys is not None and self._values is not None:
            self._keys, self._values = self._keys[:rows], self._values[:rows]


class Cache:
    """The caches of all layers.

    prefix: T, positions of the condition.
    tokens: image positions to come.
    present: (B, T) bool, which prefix positions hold a caption token; None: all.
    fold: keep the prefix as one slot (see the module's text).
    earlier: a cache that is not needed any more, whose memory is taken where it fits.
    """

    def __init__(
        self,
        layers: int,
        prefix: int,
        tokens: int,
        present: Tensor | None = None,
        fold: bool = False,
        earlier: "Cache | None" = None,
    ) -> None:
        self._hidden: Tensor | None = None  # what the prefix slots add to a logit: (B, slots) fp32 or bool
        share = None
        if present is not None:
            count = present.sum(dim=1, keepdim=True)
            # exp(log n) = n: one key whose logit is raised by log n weighs in the softmax as n equal ones do
            self._hidden = count.log() if fold else present
            share = present / count if fold else None
        self._folded = prefix - 1 if share is not None else 0
        self.layers: list[LayerCache]
        memories = [None] * layers if earlier is None else [layer.memory for layer in earlier.layers]
        self.layers = [LayerCache(prefix - self._folded + tokens, share, memory) for memory in memories]

    @property
    def position(self) -> int:
        """The position of what comes next, in the sequence of prefix and image tokens."""
        filled = self.layers[0].filled
        return filled + self._folded if filled else 0

    def mask(self) -> Tensor | None:
        """What the next position may attend to: all that is cached and itself, except padding; as a bool mask or a
        term added to the logits, (B, 1, 1, S). None: everything alike."""
        if self._hidden is None:
            return None
        further = self.layers[0].filled + 1 - self._hidden.shape[1]  # image tokens, which nothing hides: True or + 0
        return F.pad(self._hidden, (0, further), value=self._hidden.dtype == torch.bool)[:, None, None, :]

    def window(self, first: Tensor, width: int, filled: int) -> tuple[Tensor, Tensor]:
        """Let each sample's next ``width`` positions be written where its own window begins, over what was there.

        first: (B,) int64, the position (prefix and image) at which each window begins.
        filled: the end of the last window, in positions.
        Returns the positions (B, width) int64, and what each may attend to: as ``mask``, (B, 1, width, S).
        """
        positions = first[:, None] + torch.arange(width, device=first.device)
        slots = positions - self._folded
        for layer in self.layers:
            layer.slots, layer.filled = slots, filled - self._folded
        seen = torch.arange(filled - self._folded, device=first.device) <= slots[..., None]
        if self._hidden is None:
            return positions, seen[:, None]
        allowed = self._hidden.dtype == torch.bool
        hidden = F.pad(self._hidden, (0, seen.shape[2] - self._hidden.shape[1]), value=allowed)[:, None]
        return positions, (hidden & seen if allowed else hidden.masked_fill(~seen, -torch.inf))[:, None]

    def keep(self, rows: int) -> None:
        """Continue with the first ``rows`` samples only."""
        for layer in self.layers:
            layer.keep(rows)
        if self._hidden is not None:
            self._hidden = self._hidden[:rows]
