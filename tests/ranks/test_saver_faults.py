"""Saves that go wrong on real ranks: full disks, killed writers, leftovers; the checkpoint before always stays."""

import dataclasses
import errno
import os
import resource
import signal
import time
from pathlib import Path

import pytest
import torch

from llamagen_dist.checkpoint import folder as folders
from llamagen_dist.checkpoint import plan
from llamagen_dist.checkpoint.saver import Saver
from llamagen_dist.checkpoint.staging import HostBuffer
from llamagen_dist.errors import UserError
from llamagen_dist.parallel.entries import TensorEntry
from llamagen_dist.parallel.topology import Topology, start
from tests import checkpoints as store
from tests.ranks.forked import run_ranks
from tests.ranks.pacing import paced
from tests.ranks.test_saver import Gate, entries, save, tensors, train_one_step

# --- the disk is full ---


def save_on_a_disk_that_fills_up(run: Path, background: bool, how: str) -> tuple[str, bool, list[str], bool]:
    topology = start()
    live = tensors()
    saver = Saver(run, topology, background=background)
    save(saver, 1, live)
    saver.wait()
    found = entries(live)
    if topology.rank == 1 and how == "device":
        laid = plan.make_plan(found, topology.world)
        mine = laid.owners.index(1)
        real = found[mine].local

        def plant() -> torch.Tensor:
            for name in laid.file_names(1)[:1]:
                (run / "checkpoints" / "step_00000002" / name).symlink_to("/dev/full")
            return real()

        found[mine] = dataclasses.replace(found[mine], local=plant)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    if topology.rank == 1 and how == "limit":
        resource.setrlimit(resource.RLIMIT_FSIZE, (3000, limits[1]))
    failed, message = False, "no error"
    try:
        saver.save(2, 20, found, {}, "kind: gpt\n")
        deadline = time.monotonic() + 20
        while background and topology.rank == 1 and not saver.failed and time.monotonic() < deadline:
            time.sleep(0.005)
        failed = topology.any_rank(saver.failed)  # what fit() asks at every step
        saver.wait()
    except UserError as error:
        message = str(error)
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    topology.barrier()
    left = sorted(f.name for f in (run / "checkpoints").iterdir())
    topology.barrier()
    save(saver, 3, live)  # there is room again
    saver.wait()
    return message, failed, left, store.newest(run).name == "step_00000003"


@pytest.mark.parametrize("background", [True, False])
@pytest.mark.parametrize(("how", "reason"), [("device", errno.ENOSPC), ("limit", errno.EFBIG)])
def test_a_full_disk_is_one_sentence_on_every_rank_and_the_old_one_stays(tmp_path, background, how, reason):
    """/dev/full refuses every byte as a full disk does; the limit lets a part through."""
    results = run_ranks(save_on_a_disk_that_fills_up, 3, tmp_path, background, how)
    assert len({message for message, *_ in results}) == 1
    message = results[0][0]
    assert f"step_00000002 could not be written: {os.strerror(reason)} (rank 1, file " in message
    assert message.endswith(f"the checkpoint before it is intact at {tmp_path}/checkpoints/step_00000001")
    assert len(message.splitlines()) == 1
    for _, failed, left, again in results:
        assert failed == background, "a background failure is seen before the next save"
        assert left == ["step_00000001"], "nothing half-written is left"
        assert again


# --- a rank is killed ---


def killed_while_writing(run: Path, gate: Path) -> str:
    topology = start()
    live = tensors()
    saver = Saver(run, topology, patience_s=0.5)
    save(saver, 1, live)
    saver.wait()
    train_one_step(live, topology)
    pace = Gate(gate)
    with paced(pace if topology.rank == 1 else None):
        save(saver, 2, live)
        if topology.rank == 1:
            while not pace.waited:
                time.sleep(0.002)
            os.kill(os.getpid(), signal.SIGKILL)
    try:
        with saver:
            for _ in range(1000):
                train_one_step(live, topology)
    except RuntimeError:  # the other end of the connection is gone
        left = run / "checkpoints" / "step_00000002"
        return f"{store.newest(run).name}, {left.exists()}, {(left / 'COMPLETE').exists()}"
    return "it went on"


def test_a_rank_killed_while_it_writes_costs_only_that_checkpoint(tmp_path, capfd):
    gate = tmp_path / "never"
    began = time.monotonic()
    result = _survivor(tmp_path, gate)
    assert result == "step_00000001, True, False"
    assert time.monotonic() - began < 30, "rank 0 does not wait for the dead one for ever"
    assert "rank 1 neither reported nor wrote anything" in capfd.readouterr().out
    assert sorted(f.name for f in (tmp_path / "checkpoints").iterdir()) == ["step_00000001", "step_00000002"]
    Saver(tmp_path, Topology())
    assert [f.name for f in (tmp_path / "checkpoints").iterdir()] == ["step_00000001"], "the leftover is gone"
    assert torch.equal(store.read_weights(tmp_path)["norm.weight"], tensors()["norm.weight"])


def _survivor(run: Path, gate: Path) -> str:
    """Rank 0's word, where rank 1 never answers."""
    answer = run / "answer"

    def ranks() -> None:
        result = killed_while_writing(run, gate)
        answer.write_text(result)
        raise SystemExit  # the runner would wait for rank 1's result

    with pytest.raises(AssertionError, match="SystemExit"):
        run_ranks(ranks, 2)
    return answer.read_text()


def test_leftovers_are_not_removed_while_they_are_written(tmp_path):
    """Only rank 0 of a start or a save cleans up, and the save under way is waited for first."""
    gate = tmp_path / "gate"
    saver = Saver(tmp_path, Topology())
    with paced(Gate(gate)):
        save(saver, 1, tensors())
        (tmp_path / "checkpoints" / "step_00000007").mkdir()
        gate.touch()
        save(saver, 2, tensors())
        assert not (tmp_path / "checkpoints" / "step_00000007").exists()
        saver.wait()
    assert [f.name for f in store.complete(tmp_path)] == ["step_00000001", "step_00000002"]


def test_every_nth_is_kept_for_ever(tmp_path):
    kept = {}
    for every in (0, 100):
        run = tmp_path / str(every)
        saver = Saver(run, Topology(), background=False, keep_last=2, keep_every_images=every)
        for number, images in enumerate((40, 80, 120, 160, 200, 240, 450, 490, 530, 570), 1):
            saver.save(number, images, entries(tensors()), {}, "kind: gpt\n")
        kept[every] = [store.read_state(f)["images_seen"] for f in store.complete(run)]
    assert kept == {0: [530, 570], 100: [120, 200, 450, 530, 570]}


def test_a_failing_prune_does_not_undo_the_save(tmp_path, monkeypatch, capsys):
    def refuse(*arguments):
        raise PermissionError(errno.EACCES, "Permission denied", "old")

    monkeypatch.setattr(folders, "remove", refuse)
    saver = Saver(tmp_path, Topology(), keep_last=1)
    for number in (1, 2):
        save(saver, number, tensors())
    saver.wait()
    assert store.newest(tmp_path).name == "step_00000002"
    assert "could not be removed" in capsys.readouterr().out


def test_too_little_host_memory_says_what_to_set(tmp_path):
    found = [TensorEntry("weights", "huge", (1 << 50,), lambda: None, lambda full: None)]
    laid = plan.make_plan(found, 1)
    with pytest.raises(UserError, match=r"no host memory for the .* GB .*checkpoint\.background=false"):
        HostBuffer().take(laid.rounds[0].staged(0))
