"""Background saves on real ranks: bit for bit the state at the save, whatever training, the disk or a kill do."""

import json
import time
from pathlib import Path

import pytest
import torch

from llamagen_dist.checkpoint import checkpoint, plan, staging
from llamagen_dist.checkpoint.saver import Saver
from llamagen_dist.parallel.entries import TensorEntry, replicated
from llamagen_dist.parallel.topology import Topology, start
from tests import checkpoints as store
from tests.ranks.forked import run_ranks
from tests.ranks.pacing import paced


def tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(7)
    shapes = {"tok.weight": (64, 16), "wide.weight": (16, 200), "norm.weight": (16,), "step": ()}
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def entries(live: dict[str, torch.Tensor]) -> list[TensorEntry]:
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
    with paced(pace), Saver(run, topology) as saver:
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
    monkeypatch.setattr(staging.LocalCopy, "_copy_to", lambda self, buffer: None)
    run_ranks(steps_beside_a_slow_writer, 1, tmp_path / "run", tmp_path / "gate")
    assert not saved_as_it_was(tmp_path / "run", 1)


def save_twice(run: Path, ranks_folder: Path) -> list[list[str]]:
    topology = start()
    live, seen = tensors(), []
    with paced(lambda written: time.sleep(0.02)), Saver(run, topology, keep_last=1) as saver:
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
    return saver._buffer.size


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


# --- reading back ---


def resident_file_bytes() -> int:
    line = next(row for row in Path("/proc/self/status").read_text().splitlines() if row.startswith("RssFile"))
    return int(line.split()[1]) * 1024


def restore_a_part(run: Path, rows: int) -> int:
    """Bytes of the file that became resident while an entry took the first ``rows`` rows of its tensor."""
    part = torch.zeros(rows, 1024)
    most = 0

    def write(full: torch.Tensor) -> None:
        nonlocal most
        part.copy_(full[:rows])
        most = resident_file_bytes()

    entry = TensorEntry("weights", "big", (8192, 1024), lambda: None, write)
    store.restore(store.newest(run), [entry])  # the code that runs becomes resident too
    before = resident_file_bytes()
    store.restore(store.newest(run), [entry])
    assert part.sum() == rows * 1024
    assert resident_file_bytes() - before < 4 << 20, "nothing stays mapped"
    return most - before


def test_a_rank_reads_only_the_part_that_it_keeps(tmp_path):
    store.save(
        tmp_path,
        1,
        [replicated("weights", "big", torch.ones(8192, 1024))],
        {},
        Topology(),
        config_text="kind: gpt\n",
    )
    whole = 8192 * 1024 * 4
    assert run_ranks(restore_a_part, 1, tmp_path, 512)[0] < whole / 4
    assert run_ranks(restore_a_part, 1, tmp_path, 8192)[0] > whole * 0.9, "the twin that keeps all reads all"


def test_each_file_is_opened_once(tmp_path, monkeypatch):
    run_ranks(save_once, 2, tmp_path, True)
    opened: list[Path] = []
    real = checkpoint.opened
    folder = store.newest(tmp_path)
    monkeypatch.setattr(checkpoint, "opened", lambda path: opened.append(path) or real(path))
    store.restore(folder, entries(tensors()))
    assert sorted(opened) == sorted(folder.glob("*.safetensors"))
