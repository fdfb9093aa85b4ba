"""Batches on their way to a device: made ahead in a thread, pinned where it is a GPU, copied beside a computation."""

import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch

from llamagen_dist.data.prefetch import Prefetcher
from llamagen_dist.data.shards import open_shards
from llamagen_dist.data.tokens import TokenStream
from llamagen_dist.parallel.topology import Topology
from tests.gpu.table import Row
from tests.runs.token_shards import write_tokens

COUNT, BATCH, STEPS = 200, 64, 40


def rows(device: torch.device) -> Iterator[Row]:
    """A copy that is read before it has arrived, or whose memory is used again too early, is another batch."""
    with tempfile.TemporaryDirectory() as scratch:
        shards = open_shards(write_tokens(Path(scratch) / "tokens", COUNT, 0))
        plain = TokenStream(shards, Topology(), BATCH, 0, 0.1)
        square = torch.ones(1024, 1024, device=device)
        found = []
        with Prefetcher(TokenStream(shards, Topology(), BATCH, 0, 0.1), BATCH, pin=device.type == "cuda") as ahead:
            for step in range(STEPS):
                square = torch.tanh(square @ square)  # something for the copies to run beside
                found.append(ahead.batch(step * BATCH).to(device))
        same = 0
        for step, batch in enumerate(found):
            wanted = plain.batch(step * BATCH)
            pairs = [
                (getattr(batch, name).cpu(), getattr(wanted, name))
                for name in ("tokens", "condition", "positions", "dropped")
            ]
            same += all(torch.equal(one, other) for one, other in pairs)
        how = "pinned, made ahead" if device.type == "cuda" else "made ahead"
        yield Row("batches", how, f"{same} of {STEPS} equal", "all", same == STEPS)
