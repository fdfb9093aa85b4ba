"""The global order: bijections, epochs, and global batches that do not know how many ranks cut them up."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llamagen_dist.data.order import Order, Windows, position_to_sample
from llamagen_dist.prng import mix


def once_each(samples: torch.Tensor, count: int) -> bool:
    return torch.equal(samples.sort().values, torch.arange(count))


@settings(max_examples=30, deadline=None)
@given(count=st.integers(1, 3000), seed=st.integers(0, 2**40), epoch=st.integers(0, 2**20))
def test_every_epoch_visits_each_sample_once(count, seed, epoch):
    positions = torch.arange(epoch * count, (epoch + 1) * count)
    epochs, samples = position_to_sample(positions, count, seed)
    assert bool((epochs == epoch).all())
    assert once_each(samples, count)


def test_one_position_too_far_is_not_a_permutation():
    _, samples = position_to_sample(torch.arange(1, 501), 500, 0)
    assert not once_each(samples, 500)


@settings(max_examples=30, deadline=None)
@given(count=st.integers(2**30, 2**62), seed=st.integers(0, 2**31), start=st.integers(0, 2**55))
def test_huge_sets_cost_nothing_and_stay_in_range(count, seed, start):
    _, samples = position_to_sample(torch.arange(start, start + 100), count, seed)
    assert bool(((samples >= 0) & (samples < count)).all())
    assert len(samples.unique()) >= 99  # two epochs may meet in the middle


@settings(max_examples=25, deadline=None)
@given(count=st.integers(1, 40_000), seed=st.integers(0, 99), batch=st.sampled_from([12, 24, 120]),
       step=st.integers(0, 5000))  # fmt: skip
def test_global_batches_are_the_same_for_1_2_3_and_4_ranks(count, seed, batch, step):
    whole = position_to_sample(torch.arange(step * batch, (step + 1) * batch), count, seed)[1]
    for ranks in (1, 2, 3, 4):
        share = batch // ranks
        parts = [Order(count, seed, block=50).samples(step * batch + rank * share, share) for rank in range(ranks)]
        assert torch.equal(torch.cat(parts), whole)


def test_blocks_computed_ahead_change_nothing():
    """Order keeps blocks; jumping back and forth, and across a block's edge, gives the stateless answer."""
    order = Order(9000, 5, block=1000)
    for start in (990, 0, 990, 10**9, 4999):
        assert torch.equal(order.samples(start, 20), position_to_sample(torch.arange(start, start + 20), 9000, 5)[1])


def test_a_resume_at_a_shifted_position_is_detected():
    order = Order(9000, 5)
    assert torch.equal(order.samples(4096, 64), Order(9000, 5).samples(4096, 64))
    assert not torch.equal(order.samples(4096, 64), order.samples(4097, 64))


def test_epochs_and_seeds_differ_and_the_order_looks_random():
    count = 4096
    first = position_to_sample(np.arange(2 * count), count, 0)[1].reshape(2, count)
    other = position_to_sample(np.arange(count), count, 1)[1]
    for a, b in ((first[0], first[1]), (first[0], other), (first[0], np.arange(count))):
        assert (a == b).sum() < 12  # a random pair agrees once on average
        assert abs(np.corrcoef(a, b)[0, 1]) < 0.06
    steps = np.diff(first[0])
    assert abs(np.corrcoef(first[0][:-1], first[0][1:])[0, 1]) < 0.06
    assert (steps == 1).sum() < 10


def test_small_sets_reach_many_permutations():
    seen = {tuple(position_to_sample(np.arange(4), 4, seed)[1].tolist()) for seed in range(120)}
    assert len(seen) >= 22  # of 24


def test_golden_values():
    """The order is fixed for ever: a change here would silently reorder the data of every old run."""
    assert position_to_sample(np.arange(6), 10, 0)[1].tolist() == GOLDEN_10
    assert position_to_sample(np.arange(9_000_000, 9_000_004), 9000, 1)[1].tolist() == GOLDEN_9000
    assert position_to_sample(np.arange(3), 10**9, 7)[1].tolist() == GOLDEN_BILLION


GOLDEN_10 = [4, 3, 7, 9, 8, 0]
GOLDEN_9000 = [5913, 5713, 8685, 1675]
GOLDEN_BILLION = [275901735, 568474918, 127775016]
GOLDEN_WINDOWS = [75, 77, 72]


@pytest.mark.parametrize(("positions", "count"), [([-1], 5), ([0], 0), ([0], 2**62 + 1)])
def test_nonsense_is_refused(positions, count):
    with pytest.raises(ValueError, match=r"must lie|count from 0"):
        position_to_sample(torch.tensor(positions), count, 0)


def test_the_mixing_function_is_a_bijection_on_a_sample():
    values = torch.arange(-50_000, 50_000, dtype=torch.int32)
    assert len(mix(values).unique()) == len(values)


SIZES = st.lists(st.integers(0, 90), min_size=1, max_size=12).filter(any).map(lambda sizes: np.array(sizes, np.int64))


@settings(max_examples=60, deadline=None)
@given(sizes=SIZES, window=st.integers(1, 14), seed=st.integers(0, 2**40), epoch=st.integers(0, 2**20))
def test_windows_visit_each_sample_once_and_few_shards_at_a_time(sizes, window, seed, epoch):
    count = int(sizes.sum())
    samples = Windows(sizes, window, seed).samples(torch.arange(epoch * count, (epoch + 1) * count))
    assert once_each(samples, count)
    assert widest(sizes, samples) <= window


def widest(sizes: np.ndarray, samples: torch.Tensor) -> int:
    """The most shards that occur between the first and the last sample of any shard."""
    shards = np.searchsorted(sizes.cumsum(), samples.numpy(), side="right").tolist()
    assert len(set(shards)) == (sizes > 0).sum()
    spans = (shards[shards.index(one) : len(shards) - shards[::-1].index(one)] for one in set(shards))
    return max(len(set(span)) for span in spans)


def test_the_order_over_the_whole_set_stays_in_no_window():
    sizes = np.full(8, 50, np.int64)
    assert widest(sizes, Windows(sizes, 2, 0).samples(torch.arange(400))) == 2
    assert widest(sizes, position_to_sample(torch.arange(400), 400, 0)[1]) == 8


@settings(max_examples=25, deadline=None)
@given(sizes=SIZES, window=st.integers(1, 5), start=st.integers(0, 10**12), cut=st.integers(1, 199))
def test_windows_are_a_function_of_position_alone(sizes, window, start, cut):
    whole = Order(int(sizes.sum()), 5, 64, sizes, window).at(torch.arange(start, start + 200))
    order = Order(int(sizes.sum()), 5, 64, sizes, window)
    order.samples(start + 3 * int(sizes.sum()), 10)  # elsewhere first
    assert torch.equal(torch.cat([order.samples(start, cut), order.samples(start + cut, 200 - cut)]), whole)


def test_windows_differ_from_epoch_to_epoch_and_by_seed():
    sizes = np.full(20, 50, np.int64)

    def shards(seed, epoch):
        samples = Windows(sizes, 2, seed).samples(torch.arange(1000 * epoch, 1000 * epoch + 1000))
        return (samples // 50)[::100].tolist()

    assert len({tuple(shards(seed, epoch)) for seed in range(3) for epoch in range(3)}) == 9
    assert Windows(sizes, 2, 0).samples(torch.arange(3)).tolist() == GOLDEN_WINDOWS
