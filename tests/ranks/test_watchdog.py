"""Ranks that hang, die or crash: all end in time, and the one at fault is named. Real forked ranks through fit()."""

import ctypes
import os
import signal
import time
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from llamagen_dist.parallel.topology import start
from llamagen_dist.process import Identity
from llamagen_dist.training import heartbeat
from llamagen_dist.training.gpt_task import GPTTask
from tests import checkpoints as store
from tests.ranks.fit_run import Fault, lines, run
from tests.ranks.forked import end_ranks, run_ranks
from tests.ranks.layouts import BATCH, Layout

HANG_S = 2.0  # far above a step (milliseconds), also beside a busy process
GUARD = (f"guard.hang_minutes={HANG_S / 60}", "guard.start_minutes=1")  # the first step also pays for starting up
WORLD = 3


def on_rank_one(step: int, fault) -> Fault:
    def check(task: GPTTask, number: int) -> None:
        if task.topology.rank == 1 and number == step:
            fault()

    return check


def stuck_in_c() -> None:
    ctypes.PyDLL(None).sleep(600)  # holds the interpreter's lock all the while


def crash() -> None:
    raise ValueError("a bug in the program")


def start_run(folder: Path, fault, where: str, *settings: str) -> None:
    run(Layout(WORLD), folder, *(settings or GUARD), **{where: on_rank_one(4, fault)})


def texts(folder: Path, pattern: str) -> dict[int, str]:
    return {int(p.stem.rpartition("-")[2]): p.read_text() for p in sorted((folder / "log").glob(pattern))}


@pytest.mark.parametrize("where", ["read", "compute"])
def test_a_rank_that_sleeps_for_ever_is_named_and_everybody_ends(tmp_path, where):
    began = time.monotonic()
    ends = end_ranks(start_run, WORLD, tmp_path, lambda: time.sleep(600), where)
    assert time.monotonic() - began < 20
    assert [code for code, _ in ends] == [75] * WORLD
    part = {"read": "data", "compute": "compute"}[where]
    for rank, text in texts(tmp_path, "hang-rank-*.txt").items():
        assert "after step 3" in text, rank
        assert f"rank 1 (process {text.split('process ')[1].split()[0]}" in text
        assert f"is in step 4, {part} for" in text
        assert "rank 0 (" not in text
        assert "rank 2 (" not in text
    stacks = texts(tmp_path, "stacks-rank-*.txt")
    assert sorted(stacks) == [0, 1, 2]
    assert all("in fit" in text for text in stacks.values())
    assert "in on_rank_one" in stacks[1] or "in check" in stacks[1]
    assert "in all_reduce" in stacks[0] or "backward" in stacks[0]


def test_a_rank_stuck_in_c_code_writes_its_stack_and_ends_too(tmp_path):
    ends = end_ranks(start_run, WORLD, tmp_path, stuck_in_c, "compute")
    assert [code for code, _ in ends] == [75, 1, 75]
    assert "stuck_in_c" in texts(tmp_path, "stacks-rank-1.txt")[1]
    for rank, text in texts(tmp_path, "hang-rank-*.txt").items():
        assert "rank 1" in text, rank
        assert "gives no sign of life" in text
        assert "rank 0 (" not in text
    assert sorted(texts(tmp_path, "hang-rank-*.txt")) == [0, 2]


def stopped_by_a_signal(folder: Path) -> None:
    """Until the others have ended; then it is woken, as SLURM does with a stopped process before it kills it."""
    me = os.getpid()
    beats = heartbeat.read(folder / "log", WORLD)
    others = [Identity(beat.pid, beat.started) for beat in beats if beat.pid != me]
    assert len(others) == WORLD - 1
    if os.fork() == 0:
        while any(other.alive() for other in others):
            time.sleep(0.02)
        os.kill(me, signal.SIGCONT)
        os._exit(0)
    os.kill(me, signal.SIGSTOP)


def test_a_stopped_rank_is_named_and_once_it_is_woken_it_ends_without_a_step_or_a_save(tmp_path):
    settings = (*GUARD, "log.every_steps=1", f"checkpoint.every_images={BATCH}")
    ends = end_ranks(start_run, WORLD, tmp_path, partial(stopped_by_a_signal, tmp_path), "compute", *settings)
    codes = [code for code, _ in ends]
    assert codes[0] == codes[2] == 75
    assert codes[1] in (75, 1), "its own watchdog was overdue, or the broken connection was quicker"
    for rank in (0, 2):
        text = texts(tmp_path, "hang-rank-*.txt")[rank]
        assert "after step 3" in text
        assert "rank 1 (process" in text
        assert "gives no sign of life" in text
    assert lines(tmp_path)[-1]["step"] == 3
    kept = store.complete(tmp_path)  # that of step 3 was under way
    assert [f.name for f in kept] in (["step_00000001", "step_00000002"], ["step_00000002", "step_00000003"])
    for folder in kept:
        store.verify(folder)


SLOW_S = 0.5


def slow_but_alive(folder: Path) -> None:
    limits = (f"guard.hang_minutes={8 * SLOW_S / 60}", "guard.start_minutes=1")
    run(Layout(WORLD), folder, *limits, read=lambda task, number: time.sleep(SLOW_S * (task.topology.rank == 1)))


def test_a_slow_run_is_left_alone(tmp_path):
    """Sabotage twin of the hangs: the ten steps together take longer than the limit, each alone is far below it."""
    (tmp_path / "log").mkdir()
    for left in ("heartbeat-rank-7.json", "heartbeat-rank-0.tmp", ".timing.n1.7.tmp.json"):  # a killed, larger start's
        (tmp_path / "log" / left).touch()
    (tmp_path / ".config.n1.7.tmp.yaml").touch()
    began = time.monotonic()
    run_ranks(slow_but_alive, WORLD, tmp_path)
    assert time.monotonic() - began > 9 * SLOW_S, "longer than the limit"
    assert (tmp_path / "summary.json").exists()
    left = [p.name for p in (tmp_path / "log").iterdir()]
    assert left == ["timing.json"], "a run that ends well leaves nothing to look at"
    assert list(tmp_path.glob(".*")) == []


def kill_myself() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize(
    ("fault", "code", "said"),
    [
        (kill_myself, -9, "was killed, last seen in step"),
        (crash, 1, "ended in step 4: ValueError: a bug in the"),
    ],
    ids=["killed", "crashed"],
)
def test_a_rank_that_is_gone_is_named_by_the_others(tmp_path, fault, code, said):
    """Long limits: the broken connection is what tells them, at once."""
    began = time.monotonic()
    ends = end_ranks(start_run, WORLD, tmp_path, fault, "read", "guard.hang_minutes=0.5")
    assert time.monotonic() - began < 20
    assert [c for c, _ in ends] == [1, code, 1]
    for trace in (ends[0][1], ends[2][1]):
        assert "LostRankError: rank 1 (process" in trace
        assert said in trace
        assert "resumes from the last checkpoint" in trace


@pytest.mark.long
def test_after_the_first_step_a_missing_rank_is_noticed_after_the_short_time_out(tmp_path):
    """In step 1 the same sleep is within the long one."""
    began = time.monotonic()
    settings = ("guard.hang_minutes=1", f"guard.collective_minutes={1 / 60}")
    ends = end_ranks(late_twice, 2, tmp_path, settings, timeout_s=40)
    assert time.monotonic() - began < 30
    assert ends[0][0] == 1
    # gloo says the one in the wait that ran out of time, the other in one beside it
    assert "Timed out waiting 1000ms" in ends[0][1] or "Application timeout caused pair closure" in ends[0][1]
    assert "rank 1" in ends[0][1]
    assert "is in step 4, data for" in ends[0][1]


def late_twice(folder: Path, settings: tuple[str, ...]) -> None:
    def sleep(task: GPTTask, number: int) -> None:
        if task.topology.rank == 1 and number in (1, 4):
            time.sleep({1: 1.5, 4: 8}[number])

    run(Layout(2), folder, *settings, read=sleep)


def time_out_in_a_group_of_megatron() -> str:
    topology = start(2, timeout_s=60)
    tensor = torch.ones(2)
    dist.all_reduce(tensor, group=topology.tp_group)
    topology.set_timeouts(0.7)
    began = time.monotonic()
    if topology.rank == 1:
        time.sleep(2)
        return ""
    try:
        dist.all_reduce(tensor, group=topology.tp_group)
    except RuntimeError as error:
        assert time.monotonic() - began < 2
        return str(error)
    return "no error"


def test_every_group_gets_the_time_out():
    assert "Timed out waiting 700ms" in run_ranks(time_out_in_a_group_of_megatron, 2)[0]
