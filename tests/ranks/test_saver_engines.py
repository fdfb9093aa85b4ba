"""Background saves of real engines: pieces are copied, then gathered and written while training goes on."""

import json
import os
import resource
import signal
import time
from pathlib import Path

import pytest
import torch

from llamagen_dist.checkpoint import plan, staging
from llamagen_dist.checkpoint.saver import Saver
from llamagen_dist.errors import UserError
from tests import checkpoints as store
from tests.ranks.forked import run_ranks
from tests.ranks.layouts import Layout, make_task, mostly_long, steps
from tests.ranks.pacing import paced

LAYOUTS = [Layout(2, 1, 1), Layout(3, 1, 3), Layout(2, 2, 0), Layout(4, 2, 2), Layout(4, 2, 3)]


def save_both_ways(run: Path, layout: Layout, copied: bool) -> bool:
    """A foreground save, then a background one of the same state while steps go on; whether a thread was needed."""
    task = make_task(layout, "ema.decay=0.9")
    steps(task, 0, 2)
    t = task.topology
    # small rounds, so that the exchange goes on while files are written
    plan.SHARD_BYTES = 1 << 14
    if not copied:
        # sabotage: what is to be written is looked at later, not copied now
        staging.LocalCopy._copy_to = lambda self, buffer: None
    with Saver(run / "foreground", t, background=False) as saver:
        saver.save(2, 24, task.entries(), {}, "kind: gpt\n")
    gate = run / "gate"

    def pace(written: int) -> None:
        while not gate.exists():
            time.sleep(0.002)

    with paced(pace), Saver(run / "background", t) as saver:
        saver.save(2, 24, task.entries(), {}, "kind: gpt\n")
        steps(task, 2, 6)  # collectives of training beside those of the save
        t.barrier()
        unfinished = not store.complete(run / "background")
        t.barrier()
        gate.touch()
        saver.wait()
    return unfinished


def same(run: Path) -> bool:
    found = [
        {
            f"{group}:{name}": t
            for group in ("weights", "ema", "optimizer")
            for name, t in store.read_weights(f, group).items()
        }
        for f in (run / "foreground", run / "background")
    ]
    assert found[0].keys() == found[1].keys()
    return all(torch.equal(found[0][name], found[1][name]) for name in found[0])


@pytest.mark.parametrize("layout", mostly_long(*LAYOUTS, quick=LAYOUTS[1:3]))
def test_pieces_gathered_beside_training_are_the_state_at_the_save(tmp_path, layout):
    assert all(run_ranks(save_both_ways, layout.ranks, tmp_path, layout, True)), "steps were done before it was written"
    store.verify(store.complete(tmp_path / "background")[0])
    assert same(tmp_path)


def test_pieces_that_are_not_copied_are_another_state(tmp_path):
    """Sabotage twin."""
    run_ranks(save_both_ways, 2, tmp_path, Layout(2, 1, 1), False)
    assert not same(tmp_path)


def fill_the_disk_of_one_rank(run: Path, gives_up: bool) -> tuple[str, list[str]]:
    task = make_task(Layout(3, 1, 1))
    plan.SHARD_BYTES = 1 << 14  # many rounds: the disk is full long before the last pieces are sent
    if gives_up:
        real = Saver._exchange
        Saver._exchange = lambda self, save, copy, part: {} if save.error else real(self, save, copy, part)
    saver = Saver(run, task.topology, patience_s=20)
    saver.save(1, 12, task.entries(), {}, "kind: gpt\n")
    saver.wait()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    if task.topology.rank == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (3000, limits[1]))
    message = "no error"
    try:
        saver.save(2, 24, task.entries(), {}, "kind: gpt\n")
        saver.wait()
    except UserError as error:
        message = str(error)
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    task.topology.barrier()
    return message, sorted(f.name for f in (run / "checkpoints").iterdir())


def test_a_rank_that_cannot_write_still_sends_what_the_others_write(tmp_path):
    """Otherwise they would wait for its pieces until the time-out."""
    for message, left in run_ranks(fill_the_disk_of_one_rank, 3, tmp_path, False):
        assert "File too large (rank 1" in message
        assert left == ["step_00000001"]
    ended = r"still running|Connection closed|Connection reset"  # by whoever was killed first
    with pytest.raises(AssertionError, match=ended):  # sabotage twin: until they are killed
        run_ranks(fill_the_disk_of_one_rank, 3, tmp_path / "twin", True, timeout_s=6)


def lose_a_rank(run: Path) -> tuple[list[str], float]:
    task = make_task(Layout(3, 1, 1))
    plan.SHARD_BYTES = 1 << 14
    steps(task, 0, 1)
    t = task.topology
    saver = Saver(run, t, patience_s=20)
    saver.save(1, 12, task.entries(), {}, "kind: gpt\n")
    saver.wait()
    steps(task, 1, 2)
    if t.rank == 2:
        real, calls = staging.LocalCopy.gather, []

        def die(self, *arguments):
            calls.append(len(calls))
            if len(calls) == 2:  # the first round has travelled, and more than one is to come
                os.kill(os.getpid(), signal.SIGKILL)
            return real(self, *arguments)

        staging.LocalCopy.gather = die
    saver.save(2, 24, task.entries(), {}, "kind: gpt\n")
    began = time.monotonic()
    saver.close()  # as a run does that ends by an exception: no help from the others
    return sorted(f.name for f in store.complete(run)), time.monotonic() - began


def survivors(run: Path) -> None:
    (run / f"said-{os.environ['RANK']}").write_text(json.dumps(lose_a_rank(run)))


def test_a_rank_killed_while_pieces_travel_keeps_nobody_waiting(tmp_path):
    with pytest.raises(AssertionError, match="without a result"):
        run_ranks(survivors, 3, tmp_path, timeout_s=100)
    for rank in (0, 1):
        complete, waited = json.loads((tmp_path / f"said-{rank}").read_text())
        assert complete == ["step_00000001"], "the checkpoint before stays, the half-written one never counts"
        assert waited < 70
