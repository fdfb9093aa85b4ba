"""The digest of shown samples: the same for any number of ranks, after any resume; one wrong sample changes it."""

import numpy as np
import torch

from llamagen_dist.data import digest
from llamagen_dist.data.order import Order
from llamagen_dist.data.shards import open_shards
from llamagen_dist.data.tokens import TokenStream
from llamagen_dist.parallel.topology import Topology
from tests.expected_digest import expected
from tests.runs.token_shards import write_tokens

COUNT, BATCH, SEED = 50, 12, 5
ORDER = Order(COUNT, SEED)


def shown(shards, ranks: int, first: int, last: int, shift: int = 0) -> int:
    """Summed over the ranks' batches of the steps from image ``first`` to ``last``; ``shift`` moves one sample."""
    total = 0
    for rank in range(ranks):
        stream = TokenStream(shards, Topology(rank=rank, world=ranks), BATCH, SEED, 0.1)
        for start in range(first, last, BATCH):
            samples = stream.batch(start).samples.clone()
            if shift and start == first and rank == ranks - 1:
                samples[0] = (samples[0] + shift) % COUNT
            total += int(digest.digest(samples))
    return total


def test_ranks_resumes_and_epochs_do_not_change_what_was_shown(tmp_path):
    shards = open_shards(write_tokens(tmp_path / "train", COUNT, 0))
    images = 180  # three epochs and a bit
    right = digest.text(expected(ORDER, images))
    for ranks in (1, 2, 3):
        assert digest.text(shown(shards, ranks, 0, images)) == right
        assert digest.text(shown(shards, ranks, 0, images, shift=1)) != right  # sabotage twin
    resumed = shown(shards, 2, 0, 60) + shown(shards, 3, 60, images)
    assert digest.text(resumed) == right
    twice = shown(shards, 2, 0, 60) + shown(shards, 3, 48, images)  # sabotage twin: a step again
    assert digest.text(twice) != right


def test_a_whole_epoch_is_the_data_set():
    whole = digest.digest(torch.arange(COUNT))
    for epochs in (1, 2):
        assert digest.text(expected(ORDER, epochs * COUNT)) == digest.text(epochs * int(whole))
    assert digest.text(expected(ORDER, COUNT - 1)) != digest.text(whole)
    parts = int(expected(ORDER, 30)) + int(expected(ORDER, 77, first=30))
    assert digest.text(parts) == digest.text(expected(ORDER, 77))


def test_the_hash_is_wide_and_its_text_reads_back():
    values = [int(digest.digest(torch.tensor([n]))) for n in range(2000)]
    assert len(set(values)) == len(values)
    bits = np.array(values, np.int64).view(np.uint64)[:, None] >> np.arange(64, dtype=np.uint64) & np.uint64(1)
    assert abs(bits.mean(0) - 0.5).max() < 0.05
    for value in (0, 1, -1, -(1 << 63), (1 << 63) - 1, values[7]):
        assert digest.number(digest.text(value)) == value
    assert digest.text(-1) == "f" * 16


def test_windows_of_shards_show_the_same_set_in_every_epoch():
    sizes = np.array([7, 20, 0, 23])
    windows = Order(COUNT, SEED, sizes=sizes, window_shards=2)
    for epochs in (1, 3):
        assert digest.text(expected(windows, epochs * COUNT)) == digest.text(expected(ORDER, epochs * COUNT))
    assert digest.text(expected(windows, 40)) != digest.text(expected(ORDER, 40))
