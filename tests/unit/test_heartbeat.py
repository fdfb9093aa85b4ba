"""Heartbeats of hosts whose clocks differ: how old one is says the disk that holds it."""

import os
import time
from dataclasses import replace

import pytest

from llamagen_dist.training import heartbeat

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
