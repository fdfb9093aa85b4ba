"""Background saves on real ranks: bit for bit the state at the save, whatever training, the disk or a kill do."""

import errno
import json
import os
import resource
import signal
import time
from pathlib import Path

import pytest
import torch

from llamagen_dist.checkpoint import folder as folders
from llamagen_dist.checkpoint import plan, staging, store
from llamagen_dist.checkpoint.entries import Entry, replicated
from llamagen_dist.checkpoint.saver import Saver
from llamagen_dist.config import UserError
from llamagen_dist.parallel.topology import Topology, start
from tests.ranks.forked import run_ranks


def tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(7)
    shapes = {"tok.weight": (64, 16), "wide.weight": (16, 200), "norm.weight": (16,), "step": ()}
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def entries(live: dict[str, torch.Tensor]) -> list[Entry]:
    found = [replicated("weights", name, tensor) for name, tensor in live.items()]
    found += [replicated("ema", name, tensor) for name, tensor in live.items()]
    found.append(replicated("weights", "count", torch.arange(5)))
    found.append(replicated("weights", "flag", torch.tensor([True])))
    return found


def train_one_step(live: dict[str, torch.Tensor], topology: Topology) -> None:
    """Changes every tensor in place and talks to the other ranks, as training does."""
    for tensor in live.values():
        tensor.add_(topology.sum(torch.ones(())) / topology.world)


def save(saver: Saver, number: int, live: dict[str, torch.Tensor]) -> Path:
    return saver.save(number, number * 10, entries(live), {}, "kind: gpt\n")


class Gate:
    """A writer that waits at its first block until it is let through."""

    def __init__(self, gate: Path) -> None:
        self.gate, self.waited = gate, 0

    def __call__(self, written: int) -> None:
        while not self.gate.exists():
            self.waited += 1
            time.sleep(0.002)


def steps_beside_a_slow_writer(run: Path, gate: Path) -> tuple[dict[str, torch.Tensor], int, list[str], int]:
    topology = start()
    live = tensors()
    pace = Gate(gate)
    with Saver(run, topology, pace=pace) as saver:
        save(saver, 1, live)
        steps = 0
        while steps < 20 or (topology.rank == 0 and pace.waited < 5):
            if steps >= 20:
                time.sleep(0.002)
                continue
            train_one_step(live, topology)
            steps += 1
        topology.barrier()
        committed = [f.name for f in store.complete(run)]
        if topology.rank == 0:
            gate.touch()
        saver.wait()
    return live, steps, committed, pace.waited


def saved_as_it_was(run: Path, ranks: int) -> bool:
    saved, want = store.read_weights(run), tensors()
    ema = store.read_weights(run, "ema")
    assert len(list((run / "checkpoints" / "step_00000001").glob("weights-*"))) == min(ranks, 4)
    assert saved["count"].tolist() == [0, 1, 2, 3, 4]
    assert saved["flag"].dtype == torch.bool
    return all(torch.equal(saved[name], t) and torch.equal(ema[name], t) for name, t in want.items())


@pytest.mark.parametrize("ranks", [1, 3])
def test_steps_complete_while_a_throttled_writer_runs(tmp_path, ranks):
    for live, steps, committed, waited in run_ranks(
        steps_beside_a_slow_writer, ranks, tmp_path / "run", tmp_path / "gate"
    ):
        assert steps == 20
        assert committed == [], "nothing was committed while the writer was held"
        assert waited > 0
        assert not torch.equal(live["norm.weight"], tensors()["norm.weight"]), "training went on"
    assert saved_as_it_was(tmp_path / "run", ranks)


def test_without_the_copy_the_checkpoint_would_be_another(tmp_path, monkeypatch):
    """Sabotage twin: what read() returned is written itself, as training goes on."""

    def stage_late(found, layout, part, rank, buffer):
        kept.append((found, layout, part, rank, buffer))

    kept: list = []
    real_stage, real_write = staging.stage, staging.write_file

    def write_late(folder, file, buffer, pace=None):
        if pace is not None:
            pace(0)
        for arguments in kept:
            real_stage(*arguments)
        return real_write(folder, file, buffer, pace)

    monkeypatch.setattr("llamagen_dist.checkpoint.saver.stage", stage_late)
    monkeypatch.setattr("llamagen_dist.checkpoint.saver.write_file", write_late)
    run_ranks(steps_beside_a_slow_writer, 1, tmp_path / "run", tmp_path / "gate")
    assert not saved_as_it_was(tmp_path / "run", 1)


def save_twice(run: Path, ranks_folder: Path) -> list[list[str]]:
    topology = start()
    live, seen = tensors(), []
    with Saver(run, topology, keep_last=1, pace=lambda written: time.sleep(0.02)) as saver:
        for number in (1, 2, 3):
            save(saver, number, live)  # waits for the one before
            if topology.rank == 0:
                seen.append([f.name for f in store.complete(run)])
            train_one_step(live, topology)
        saver.wait()
    return seen


def test_a_save_waits_for_the_one_before_which_stays_until_it_is_replaced(tmp_path):
    seen = run_ranks(save_twice, 2, tmp_path, tmp_path)[0]
    assert seen == [[], ["step_00000001"], ["step_00000002"]]
    assert [f.name for f in store.complete(tmp_path)] == ["step_00000003"]
    assert torch.equal(store.read_weights(tmp_path)["norm.weight"], tensors()["norm.weight"] + 1 + 1)


def load_on(run: Path) -> bool:
    live = {name: torch.zeros_like(t) for name, t in tensors().items()}
    found = entries(live)
    store.restore(store.newest(run), found)
    return all(torch.equal(live[name], t) for name, t in tensors().items()) and found[-1].read(0).item()


def save_once(run: Path, background: bool) -> int:
    saver = Saver(run, start(), background=background)
    save(saver, 1, tensors())
    saver.wait()
    return saver._staging.held


@pytest.mark.parametrize("background", [True, False])
@pytest.mark.parametrize(("writers", "readers"), [(1, 3), (3, 2), (2, 1)])
def test_saved_by_some_ranks_loaded_by_others(tmp_path, background, writers, readers, monkeypatch):
    monkeypatch.setattr(plan, "SHARD_BYTES", 5000)  # several rounds
    held = run_ranks(save_once, writers, tmp_path, background)
    assert run_ranks(load_on, readers, tmp_path) == [True] * readers
    if background:
        state = 2 * sum(t.nbytes for t in tensors().values())
        assert state / writers < max(held) < 1.6 * state / writers + 5000, "each rank copies its share, not all"


def test_files_are_those_of_the_plan_and_the_format_is_safetensors_own(tmp_path):
    from safetensors.torch import load_file

    run_ranks(save_once, 2, tmp_path, True)
    folder = store.newest(tmp_path)
    index = json.loads((folder / "index.json").read_text())
    assert sorted(index["files"]) == sorted(
        f.name for f in folder.iterdir() if f.name not in ("index.json", "COMPLETE")
    )
    loaded = load_file(folder / index["tensors"]["weights:wide.weight"])
    assert torch.equal(loaded["wide.weight"], tensors()["wide.weight"])


# --- the disk is full ---


def save_on_a_disk_that_fills_up(run: Path, background: bool, how: str) -> tuple[str, bool, list[str], bool]:
    topology = start()
    live = tensors()
    saver = Saver(run, topology, background=background)
    save(saver, 1, live)
    saver.wait()
    found = entries(live)
    if topology.rank == 1 and how == "device":
        real = found[0].read

        def plant(writer: int) -> torch.Tensor | None:
            for name in plan.make_plan(found, topology.world).file_names(1)[:1]:
                (run / "checkpoints" / "step_00000002" / name).symlink_to("/dev/full")
            return real(writer)

        found[0] = Entry(found[0].group, found[0].key, found[0].shape, plant, found[0].write)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    if topology.rank == 1 and how == "limit":
        resource.setrlimit(resource.RLIMIT_FSIZE, (3000, limits[1]))
    failed, message = False, "no error"
    try:
        saver.save(2, 20, found, {}, "kind: gpt\n")
        deadline = time.monotonic() + 20
        while background and topology.rank == 1 and not saver.failed and time.monotonic() < deadline:
            time.sleep(0.005)
        failed = topology.any(saver.failed)  # what fit() asks at every step
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
    saver._pace = pace if topology.rank == 1 else None
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
    saver = Saver(tmp_path, Topology(), pace=Gate(gate))
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
