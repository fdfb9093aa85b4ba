"""Chunk after chunk: tokens from the GPT, then pictures from the tokenizer; on a GPU the two run beside each other.

Sampling waits for the launch of many small kernels, decoding is a few large ones. So a chunk is decoded in a stream of
its own while the next one is sampled, and its pixels leave through pinned memory; the host waits for them only when the
next chunk's tokens are on their way. The numbers are the same either way, since a stream changes no kernel.
"""

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from llamagen_dist.console import LOG
from llamagen_dist.errors import UserError
from llamagen_dist.sampling.chunks import Arrays, Chunk
from llamagen_dist.sampling.pictures import checked_pixels


@dataclass
class Spent:
    """Of one set: pictures that were made, and seconds of either stage (on a GPU while the other ran beside it)."""

    images: int = 0
    sampling: float = 0.0
    decoding: float = 0.0


class Stages:
    """Two stages over chunks, and the time they took.

    sample: chunk -> codes (B, N) int64.
    decode: codes -> (pixels uint8 (B, S, S, 3), all finite: 0-d bool), without waiting for the device.
    device: of both.
    beside: decode a chunk while the next one is sampled; None: on a GPU.
    """

    def __init__(
        self,
        sample: Callable[[Chunk], Tensor],
        decode: Callable[[Tensor], tuple[Tensor, Tensor]],
        device: torch.device,
        beside: bool | None = None,
    ) -> None:
        self._sample, self._decode, self._gpu = sample, decode, device.type == "cuda"
        self._beside = self._gpu if beside is None else beside
        self._stream = torch.cuda.Stream(device) if self._gpu and self._beside else None
        self.spent: dict[str, Spent] = {}

    def run(self, chunks: Iterable[Chunk]) -> Iterator[tuple[Chunk, Arrays]]:
        """Each chunk with its ``images``, uint8 [n, S, S, 3], in order.

        Where a chunk fails, those before it are given first. What decoding raises names the chunk.
        """
        waiting: _Decoding | None = None
        for chunk in chunks:
            before = waiting
            try:
                waiting = self._begin(chunk)
            except Exception:
                if before is not None:
                    yield before.result()
                raise
            if before is not None:
                yield before.result()
            if not self._beside:
                yield waiting.result()
                waiting = None
        if waiting is not None:
            yield waiting.result()

    def _begin(self, chunk: Chunk) -> "_Decoding":
        times = [self._now()]
        codes = self._sample(chunk)
        times.append(self._now())
        lane: AbstractContextManager[Any] = nullcontext()
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.current_stream(self._stream.device))
            lane = torch.cuda.stream(self._stream)
        with lane, _named(chunk):
            times.append(self._now())  # after the wait for the codes, which is no time of the decoder's
            pixels, finite = (self._to_host(part) for part in self._decode(codes))
            times.append(self._now())
        return _Decoding(chunk, codes, pixels, finite, times, self.spent.setdefault(chunk.set, Spent()))

    def _to_host(self, x: Tensor) -> Tensor:
        if not self._gpu:
            return x
        return torch.empty(x.shape, dtype=x.dtype, pin_memory=True).copy_(x, non_blocking=True)

    def _now(self) -> Any:
        """A point in the current stream's time; on a CPU, seconds."""
        if not self._gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


@dataclass
class _Decoding:
    """A chunk whose pixels may still be on their way to the host.

    codes: referred to until then, as their memory is in use.
    times: when sampling and decoding began and ended.
    """

    chunk: Chunk
    codes: Tensor
    pixels: Tensor
    finite: Tensor
    times: list[Any]
    spent: Spent

    def result(self) -> tuple[Chunk, Arrays]:
        with _named(self.chunk):
            if isinstance(self.times[-1], torch.cuda.Event):
                self.times[-1].synchronize()
            images = checked_pixels(self.pixels, self.finite)[: len(self.chunk.samples)]
        self.spent.images += len(images)
        self.spent.sampling += _seconds(*self.times[:2])
        self.spent.decoding += _seconds(*self.times[2:])
        return self.chunk, {"images": images}


def _seconds(start: Any, end: Any) -> float:
    return float(end - start if isinstance(start, float) else start.elapsed_time(end) / 1000)


@contextmanager
def _named(chunk: Chunk) -> Iterator[None]:
    """What is raised inside names the chunk that was decoded."""
    name = f"{chunk.set}, samples {chunk.samples.start} to {chunk.samples.stop - 1}"
    try:
        yield
    except UserError as error:
        raise UserError(f"{name}: {error}") from None
    except Exception:
        LOG.error(f"{name}: could not be decoded")
        raise
