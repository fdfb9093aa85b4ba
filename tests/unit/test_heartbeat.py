"""Heartbeats of hosts whose clocks differ: how old one is says the disk that holds it."""

import os
import time
from dataclasses import replace
from types import SimpleNamespace

import pytest

from llamagen_dist.parallel.clock import Clock
from llamagen_dist.parallel.topology import Topology
from llamagen_dist.training import heartbeat, watchdog

STALE_S = 31.0


def elsewhere(rank: int, clock_off_s: float):
    """A heartbeat just made by a host whose clock is off by so much, which began its part two seconds before."""
    now = time.time() + clock_off_s
    return replace(heartbeat.first(rank), host="another", time=now, since=now - 2, part="compute", phase="train")


@pytest.mark.parametrize("clock_off_s", [-3600.0, 0.0, 3600.0])
def test_a_healthy_rank_is_not_silent_whatever_its_clock_says(tmp_path, clock_off_s):
    heartbeat.write(tmp_path, elsewhere(0, clock_off_s))
    (beat,) = heartbeat.read(tmp_path, 1)
    assert heartbeat.gone([beat], STALE_S) == []
    assert beat.time - beat.since == pytest.approx(2)
    assert "compute for 2." in heartbeat.behind([beat])[0]
    if clock_off_s < 0:  # twin: by the writer's clock it would be named
        assert heartbeat.gone([elsewhere(0, clock_off_s)], STALE_S)
    assert not list(tmp_path.glob(".now*"))


@pytest.mark.parametrize("clock_off_s", [0.0, 3600.0])
def test_a_silent_rank_is_named_although_its_clock_runs_ahead(tmp_path, clock_off_s):
    heartbeat.write(tmp_path, elsewhere(0, clock_off_s))
    past = time.time() - 60
    os.utime(heartbeat.path(tmp_path, 0), (past, past))
    (clause,) = heartbeat.gone(heartbeat.read(tmp_path, 1), STALE_S)
    assert "gives no sign of life for 60 s" in clause


@pytest.mark.parametrize(
    ("message", "named"),
    [
        ("[gloo/transport/tcp/unbound_buffer.cc:133] Timed out waiting 1000ms for recv operation", True),
        ("Application timeout caused pair closure", True),
        ("[gloo/transport/tcp/pair.cc:547] Connection closed by peer", False),  # twin: who broke it must first go stale
    ],
)
def test_after_a_time_out_the_late_rank_is_named_while_it_is_late(tmp_path, monkeypatch, message, named):
    """Rank 1 is late by 8 s and then waits like everybody: who looks only after that cannot tell whose fault it was."""
    now = 0.0

    def sleep(seconds: float) -> None:
        nonlocal now
        now += seconds
        late = replace(heartbeat.first(1), phase="train", part="data" if now < 8 else heartbeat.WAITING)
        heartbeat.write(tmp_path, late)

    monkeypatch.setattr(watchdog, "time", SimpleNamespace(monotonic=lambda: now, sleep=sleep))
    topology = Topology(world=2)
    watch = watchdog.Watchdog(tmp_path, topology, Clock(topology.device), hang_s=60, start_s=60)
    sleep(0)
    cause = watch._cause(RuntimeError(message))
    assert ("is in step 1, data for" in cause) is named
    assert ("all ranks live" in cause) is not named
