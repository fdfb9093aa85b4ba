"""Batches made ahead: the same ones, no more than asked for, and their errors come when they are due."""

import threading
import time

import numpy as np
import pytest
import torch

from llamagen_dist.data.prefetch import Prefetcher
from llamagen_dist.data.shards import open_shards
from llamagen_dist.data.tokens import TokenStream
from llamagen_dist.errors import UserError
from llamagen_dist.parallel.topology import Topology
from tests.runs.token_shards import VOCABULARY, write_tokens

COUNT, BATCH = 60, 12


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_tokens(tmp_path_factory.mktemp("prefetch") / "tokens", COUNT, 0)


class Watched(TokenStream):
    """Notes what it was asked for."""

    def __init__(self, *args) -> None:
        super().__init__(*args)
        self.asked: list[int] = []

    def batch(self, images_seen):
        self.asked.append(images_seen)
        return super().batch(images_seen)


def stream(folder, seed=0):
    return Watched(open_shards(folder), Topology(), BATCH, seed, 0.1)


def threads() -> int:
    return sum(thread.name.startswith("batches") for thread in threading.enumerate())


def equal(one, other) -> bool:
    names = ("tokens", "condition", "positions", "samples", "dropped")
    return all(torch.equal(getattr(one, name), getattr(other, name)) for name in names)


def test_the_same_batches_also_after_jumps(folder):
    plain = stream(folder)
    with Prefetcher(stream(folder), BATCH, ahead=3) as ahead:
        for position in [*range(0, 240, 12), 48, 60, 72, 5, 17, 10**12, 10**12]:
            assert equal(ahead.batch(position), plain.batch(position))
            assert not equal(ahead.batch(position), plain.batch(position + 1))  # sabotage twin
        assert ahead.where(3) == plain.where(3)


def test_it_is_so_far_ahead_and_no_further(folder):
    source = stream(folder)
    with Prefetcher(source, BATCH, ahead=2) as ahead:
        for step in range(4):
            ahead.batch(step * BATCH)
            deadline = time.monotonic() + 10
            while len(source.asked) < step + 3 and time.monotonic() < deadline:
                time.sleep(0.001)
            time.sleep(0.02)
            assert source.asked == [n * BATCH for n in range(step + 3)], "each once, in order"


def test_an_error_comes_with_its_batch_and_not_before(folder, tmp_path):
    broken = write_tokens(tmp_path / "tokens", COUNT, 0)
    shards = open_shards(broken)
    samples = stream(folder)._order.samples(0, COUNT).numpy()
    sample = int(samples[2 * BATCH + 5])  # in the third batch
    shard, offset, size = (int(array[0]) for array in shards.spans(np.array([sample]), ".codes.npy"))
    with open(broken / shards.manifest.shards[shard].name, "r+b") as file:
        for code in range(2 * 16):
            file.seek(offset + size - 2 - 2 * code)
            file.write(VOCABULARY.to_bytes(2, "little"))
    with Prefetcher(stream(broken), BATCH, ahead=3) as ahead:
        for position in (0, BATCH):
            ahead.batch(position)
            time.sleep(0.05)  # the third batch has failed by now
        with pytest.raises(UserError, match="lies outside"):
            ahead.batch(2 * BATCH)
    with Prefetcher(stream(broken), BATCH) as ahead:
        assert equal(ahead.batch(3 * BATCH), stream(folder).batch(3 * BATCH)), "the others are fine"


def test_it_ends_its_thread_whatever_happens(folder):
    before = threads()

    def fails() -> None:
        with Prefetcher(stream(folder), BATCH) as ahead:
            ahead.batch(0)
            assert threads() == before + 1
            raise KeyError

    with pytest.raises(KeyError):
        fails()
    assert threads() == before
