"""``compile: true``: decoding steps of fixed shapes through torch.compile, on a GPU replayed as CUDA graphs.

Attention reads all slots of the cache under a mask, so that one program serves every step, and the cache's memory is
kept from batch to batch, since a graph may only be replayed where its memory stays.
"""

import torch
from torch import Tensor

from llamagen_dist.build import check_compiler
from llamagen_dist.models.cache import Cache
from llamagen_dist.models.gpt import GPT, Condition


class CompiledSteps:
    """``prefill``, ``decode`` and ``decode_window`` as ``GPT`` has them; a batch begins with ``prefill``.

    model: on its device. Raises UserError where there is no compiler.
    """

    def __init__(self, model: GPT) -> None:
        device = model.rotary.device
        check_compiler(device, "compile")
        self._graphs = device.type == "cuda"
        mode = "reduce-overhead" if self._graphs else None
        self._advance = torch.compile(model._advance, dynamic=False, fullgraph=True, mode=mode)
        self._model, self._end, self._number = model, 0, 0
        self._cache: Cache | None = None

    def prefill(self, condition: Condition, spare: int = 0, *, beta: Tensor | None = None) -> tuple[Tensor, Cache]:
        logits, self._cache = self._model.prefill(condition, spare, self._cache, beta)
        self._end, self._number = self._model.config.image_tokens - 1 + spare, 0
        return logits, self._cache

    def decode(self, tokens: Tensor, cache: Cache) -> Tensor:
        first = torch.full_like(tokens, self._number)
        self._number += 1
        return self.decode_window(tokens[:, None], first, 0, cache)[:, 0]

    def decode_window(self, tokens: Tensor, first: Tensor, end: int, cache: Cache) -> Tensor:
        """end: is not looked at: what is behind a window is hidden by the mask."""
        if self._graphs:
            for memory in (part for layer in cache.layers for part in layer.held()):
                torch._dynamo.mark_static_address(memory, guard=False)  # written by the graph, not copied into it
            torch.compiler.cudagraph_mark_step_begin()
        return self._model.decode_window(tokens, first, self._end, cache, self._advance)
