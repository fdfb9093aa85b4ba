"""Keys and values of the positions that were computed already: generation then costs one position per token."""

import torch.nn.functional as F
from torch import Tensor


class LayerCache:
    """One layer's keys and values, (B, heads, capacity, head_dim), of which the first ``filled`` positions are set.

    The memory is taken once, at the first ``extend``, in the type that the layer computes in; the number of heads is
    read off there too (a tensor-parallel rank has its own share of them).
    """

    def __init__(self, capacity: int) -> None:
        self.capacity, self.filled = capacity, 0
        self._keys: Tensor | None = None
        self._values: Tensor | None = None

    def extend(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Add (B, heads, S, head_dim) each; returns those of all positions so far. ValueError beyond the capacity."""
        end = self.filled + keys.shape[2]
        if end > self.capacity:
            raise ValueError(f"position {end} of a cache for {self.capacity}")
        if self._keys is None or self._values is None:
            shape = (*keys.shape[:2], self.capacity, keys.shape[3])
            self._keys, self._values = keys.new_empty(shape), values.new_empty(shape)
        self._keys[:, :, self.filled : end] = keys
        self._values[:, :, self.filled : end] = values
        self.filled = end
        return self._keys[:, :, :end], self._values[:, :, :end]

    def keep(self, rows: int) -> None:
        """Forget all but the first ``rows`` samples."""
        if self._keys is not None and self._values is not None:
            self._keys, self._values = self._keys[:rows], self._values[:rows]


class Cache:
    """The caches of all layers, and which prefix positions hold a caption token (``present``, (B, T) bool or None)."""

    def __init__(self, layers: int, capacity: int, present: Tensor | None = None) -> None:
        self.layers = [LayerCache(capacity) for _ in range(layers)]
        self.present = present

    @property
    def filled(self) -> int:
        return self.layers[0].filled

    def mask(self) -> Tensor | None:
        """What the next position may attend to: all that is cached and itself, except padding. (B, 1, 1, S) bool."""
        if self.present is None:
            return None
        seen = F.pad(self.present, (0, self.filled + 1 - self.present.shape[1]), value=True)
        return seen[:, None, None, :]

    def keep(self, rows: int) -> None:
        """Go on with the first ``rows`` samples only."""
        for layer in self.layers:
            layer.keep(rows)
        if self.present is not None:
            self.present = self.present[:rows]
