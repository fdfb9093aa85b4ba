"""A run that starts from another one's weights, through the program: its first loss is the source's last."""

import json
import shutil
from pathlib import Path

import deepspeed  # noqa: F401 - before the fork, so that ranks start at once
import pytest
import yaml

from llamagen_dist.checkpoint import checkpoint as checkpoints
from llamagen_dist.training import initial
from llamagen_dist.training.run import Run
from tests import checkpoints as store
from tests.ranks.forked import run_ranks
from tests.runs.test_train_gpt import BATCH, call, lines
from tests.runs.token_shards import write_tokens

UNCHANGED = ("optim.lr=1e-14", f"train.images={BATCH}")  # one step too small to change any weight


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("init")
    write_tokens(folder / "train", 200, 0)
    write_tokens(folder / "validation", 40, 1)
    settings = {
        "kind": "gpt",
        "run_dir": str(folder / "source"),
        "data": {"train": str(folder / "train"), "validation": str(folder / "validation")},
        "model": {"n_layer": 2, "n_head": 2, "dim": 32, "multiple_of": 16},
        "train": {"images": 960, "global_batch": BATCH},
        "optim": {"lr": 0.003},
        "log": {"every_steps": 20},
    }
    (folder / "gpt.yaml").write_text(yaml.safe_dump(settings))
    [(code, out, err)] = run_ranks(call, 1, folder / "gpt.yaml", ())
    assert code == 0, out + err
    return folder / "gpt.yaml"


def started(config: Path, name: str, *settings: str, ranks: int = 1) -> tuple[Path, str]:
    run = config.parent / name
    code, out, err = run_ranks(call, ranks, config, (f"run_dir={run}", *UNCHANGED, *settings))[0]
    assert code == 0, out + err
    return run, out


def held_out(run: Path) -> tuple[float, float]:
    last = lines(run)[-1]
    return last["val_loss"], last["val_loss_null"]


def worst(run: Path, other: Path) -> float:
    return max(abs(a - b) for a, b in zip(held_out(run), held_out(other), strict=True))


@pytest.mark.parametrize(
    ("name", "layout"),
    [("same", ()), pytest.param("split", ("parallel.tensor=2", "parallel.zero=1"), marks=pytest.mark.long)],
)
def test_its_first_loss_is_the_sources_last(config, name, layout):
    source = config.parent / "source"
    run, out = started(config, name, f"init_from={source}", *layout, ranks=2 if layout else 1)
    assert worst(run, source) < 1e-5
    assert "the same 4 classes" in out
    assert "from 4x4 to 4x4 tokens" in out
    assert "resumed" not in out
    state = store.read_state(store.newest(run))
    assert (state["step"], state["images_seen"]) == (1, BATCH)
    assert state["task"]["optimizer.step"] == 1
    assert state["init_from"]["weights_sha256"] == store.identity(source)
    assert json.loads((run / "record.json").read_text())["init_from"] == state["init_from"]
    assert state["tokenizer"]["sha256"] == "0" * 64


def test_without_it_or_with_rows_one_off_the_loss_is_another(config, monkeypatch):
    """Sabotage twins: fresh weights, and a class map that is off by one row."""
    source = config.parent / "source"
    assert worst(started(config, "fresh")[0], source) > 0.1
    real = initial.class_rows

    def shifted(*arguments):
        rows, told = real(*arguments)
        return (*rows[1:-1], rows[0], rows[-1]), told

    monkeypatch.setattr(initial, "class_rows", shifted)
    run, _ = started(config, "shifted", f"init_from={source}")
    assert abs(held_out(run)[0] - held_out(source)[0]) > 0.01
    assert abs(held_out(run)[1] - held_out(source)[1]) < 1e-5, "the null row has stayed where it was"


def test_other_classes_keep_their_rows_and_new_ones_start_unconditional(config):
    source, folder = config.parent / "source", config.parent
    for part in ("train", "validation"):  # label k is now another class's name
        shutil.copytree(folder / part, folder / "renamed" / part)
        path = folder / "renamed" / part / "manifest.json"
        manifest = json.loads(path.read_text())
        manifest["classes"] = ["new 0", "new 1", "new 2", "new 3"]
        path.write_text(json.dumps(manifest))
    data = (f"data.train={folder / 'renamed' / 'train'}", f"data.validation={folder / 'renamed' / 'validation'}")
    run, out = started(config, "renamed-run", f"init_from={source}", *data)
    assert "0 kept by name, 4 new (they start as the null class), 4 of the source left out" in out
    loss, null = held_out(run)
    assert abs(loss - null) < 1e-5
    assert abs(null - held_out(source)[1]) < 1e-5
    assert abs(null - held_out(source)[0]) > 0.01


def test_a_resume_wins_and_needs_the_source_no_more(config):
    copy = config.parent / "copy"
    shutil.copytree(config.parent / "source", copy)
    settings = (f"init_from={copy}", "checkpoint.every_images=16")
    run, _ = started(config, "resumed", *settings)
    (run / "summary.json").unlink()
    shutil.rmtree(copy)
    code, out, err = run_ranks(call, 1, config, (f"run_dir={run}", *UNCHANGED, *settings))[0]
    assert code == 0, err
    assert "resumed from" in out
    assert "weights of" not in out


@pytest.mark.parametrize("kept", [True, False])
def test_a_resume_hashes_its_checkpoint_once(config, tmp_path, monkeypatch, kept):
    """More often in the sabotage twin, which does not keep the checkpoint that was opened."""
    source, log = config.parent / "source", tmp_path / "hashed"
    run, _ = started(config, f"hashed-{kept}", f"init_from={source}")
    (run / "summary.json").unlink()
    real = checkpoints.sha256_file

    def noted(path: Path) -> str:
        with open(log, "a", encoding="utf-8") as file:
            file.write(f"{path}\n")
        return real(path)

    monkeypatch.setattr(checkpoints, "sha256_file", noted)
    if not kept:
        again = property(lambda self: checkpoints.Checkpoint.newest(self.directory, self.topology))
        monkeypatch.setattr(Run, "newest", again)
    started(config, run.name, f"init_from={source}")
    hashed = log.read_text().splitlines()
    files = {str(file) for file in store.newest(run).iterdir() if file.name != "COMPLETE"}
    assert set(hashed) == files
    assert all((hashed.count(file) == 1) is kept for file in files)


def test_a_run_whose_checkpoints_are_all_damaged_begins_again_from_its_source(config):
    source = config.parent / "source"
    run, _ = started(config, "damaged", f"init_from={source}")
    (run / "summary.json").unlink()
    victim = next(store.newest(run).glob("weights-*"))
    victim.write_bytes(victim.read_bytes()[:-1])
    _, out = started(config, "damaged", f"init_from={source}")
    assert "checkpoint skipped" in out
    assert "weights of" in out
    assert worst(run, source) < 1e-5


def test_what_does_not_fit_stops_every_rank_before_the_run_begins(config):
    source = config.parent / "source"
    results = run_ranks(call, 2, config, (f"run_dir={config.parent / 'no'}", f"init_from={source}", "model.dim=48"))
    for code, _, err in results:
        assert code == 2
        assert err.startswith("init_from: ")
        assert "embedding_table.weight has shape [5, 32], and this run's model has [5, 48]" in err
        assert len(err.splitlines()) == 1
    assert not (config.parent / "no").exists()
