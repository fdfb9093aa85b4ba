"""The clock on real gloo ranks: a second is counted once, and what waits for others is told from what works."""

import time

import torch
import torch.distributed as dist
from torch import nn

from llamagen_dist.config.training import OptimSection
from llamagen_dist.parallel.clock import PARTS, Clock
from llamagen_dist.parallel.engine import TorchEngine
from llamagen_dist.parallel.topology import start
from tests.ranks.forked import run_ranks

NAP = 0.1


def test_nested_parts_are_not_counted_twice():
    clock = Clock()
    began = time.perf_counter()
    with clock.part("compute"):
        time.sleep(NAP)
        with clock.part("communication"):
            time.sleep(2 * NAP)
            with clock.part("communication"):
                time.sleep(NAP)
        with clock.part("optimizer"):
            pass
    whole = time.perf_counter() - began
    found = clock.take()
    assert set(found) == set(PARTS)
    assert found["data"] == 0
    assert NAP <= found["compute"] < 3 * NAP <= found["communication"]
    assert abs(sum(found.values()) - whole) < 0.01
    assert set(clock.take().values()) == {0.0}


def wait_for_the_last_rank(call) -> dict[str, float]:
    """Every rank computes; the last one longer. Seconds by part on this rank."""
    clock = Clock()
    tensor = torch.ones(4)
    dist.barrier()
    with clock.collectives(), clock.part("compute"):
        if dist.get_rank() == dist.get_world_size() - 1:
            time.sleep(3 * NAP)
        call(tensor)
    dist.barrier()  # outside: not counted
    return clock.take()


CALLS = {
    "all_reduce": dist.all_reduce,
    "work": lambda t: dist.all_reduce(t, async_op=True).wait(),
    "all_gather": lambda t: dist.all_gather([torch.empty(4) for _ in range(dist.get_world_size())], t),
    "all_gather_into": lambda t: dist.all_gather_into_tensor(torch.empty(4 * dist.get_world_size()), t),
    "broadcast": lambda t: dist.broadcast(t, dist.get_world_size() - 1),
    "objects": lambda t: dist.broadcast_object_list([1], dist.get_world_size() - 1),
    "barrier": lambda t: dist.barrier(),
}


def every_call() -> dict[str, dict[str, float]]:
    return {name: wait_for_the_last_rank(call) for name, call in CALLS.items()}


def test_waiting_in_any_collective_is_communication_of_the_ranks_that_wait():
    fast, slow = run_ranks(every_call, 2)
    for name in CALLS:
        assert fast[name]["communication"] > 2 * NAP > fast[name]["compute"], name
        assert slow[name]["compute"] > 2 * NAP > slow[name]["communication"], name


class Slow(torch.autograd.Function):
    """The identity; its backward pass takes a while on rank 1."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        if dist.get_rank() == 1:
            time.sleep(3 * NAP)
        return gradient


def backward_under_ddp(measured: bool) -> dict[str, float]:
    clock = Clock()
    engine = TorchEngine(nn.Linear(4, 4), OptimSection(), start(), clock=clock if measured else None)
    dist.barrier()
    with clock.collectives(), clock.part("compute"):
        engine.backward(Slow.apply(engine.module(torch.ones(2, 4))).sum())
    dist.barrier()
    return clock.take()


def test_what_ddp_waits_for_in_cpp_is_communication_too():
    fast, slow = run_ranks(backward_under_ddp, 2, True)
    assert fast["communication"] > 2 * NAP > fast["compute"]
    assert slow["compute"] > 2 * NAP > slow["communication"]
    # sabotage twin: without the mark the rank that waits seems to compute
    fast, slow = run_ranks(backward_under_ddp, 2, False)
    assert fast["compute"] > 2 * NAP
