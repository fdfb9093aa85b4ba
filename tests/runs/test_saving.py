"""Saving inside a real run: the disk fills up beside training, and what is kept in the end."""

import json
import resource
from pathlib import Path

import deepspeed  # noqa: F401 - before the fork, so that ranks start at once
import pytest
import yaml

from llamagen_dist.checkpoint.saver import Saver
from tests import checkpoints as store
from tests.ranks.forked import run_ranks
from tests.runs.test_train_gpt import BATCH, call, lines
from tests.runs.token_shards import write_tokens


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("saving")
    write_tokens(folder / "train", 100, 0)
    write_tokens(folder / "validation", 20, 1)
    settings = {
        "kind": "gpt",
        "run_dir": str(folder / "unused"),
        "data": {"train": str(folder / "train"), "validation": str(folder / "validation")},
        "model": {"n_layer": 1, "n_head": 2, "dim": 32, "multiple_of": 16},
        "train": {"images": 20 * BATCH, "global_batch": BATCH},
        "optim": {"lr": 0.001},
        "ema": {"decay": 0.5},
        "checkpoint": {"every_images": 4 * BATCH, "keep_every_images": 6 * BATCH, "keep_last": 1},
        "log": {"every_steps": 1},
    }
    (folder / "gpt.yaml").write_text(yaml.safe_dump(settings))
    return folder / "gpt.yaml"


def call_until_the_disk_is_full(config: Path, settings: tuple[str, ...], full_from: int) -> tuple[int, str, str]:
    """From the checkpoint of step ``full_from`` on, rank 1 may write no file beyond 4 kB."""
    real = Saver.save

    def save(self: Saver, step: int, *arguments, **options):
        if step >= full_from and self._topology.rank == 1:
            resource.setrlimit(resource.RLIMIT_FSIZE, (4096, resource.RLIM_INFINITY))
        return real(self, step, *arguments, **options)

    Saver.save = save  # in this forked rank only
    return call(config, settings)


@pytest.fixture(scope="module")
def whole(config) -> Path:
    run = config.parent / "whole"
    code, out, error = run_ranks(call, 2, config, (f"run_dir={run}",))[0]
    assert code == 0, out + error
    return run


def test_a_full_disk_stops_the_run_which_goes_on_when_there_is_room(config, whole):
    run = config.parent / "full"
    results = run_ranks(call_until_the_disk_is_full, 2, config, (f"run_dir={run}",), 8)
    before = run / "checkpoints" / "step_00000004"
    for code, _, error in results:
        assert code == 2
        assert f"{run}/checkpoints/step_00000008 could not be written: File too large (rank 1, file " in error
        assert error.endswith(f"the checkpoint before it is intact at {before}")
        assert len(error.splitlines()) == 1
    assert 8 <= lines(run)[-1]["step"] < 12, "it stopped as soon as the failure was known, not at the next save"
    assert [f.name for f in (run / "checkpoints").iterdir()] == [before.name]
    code, out, error = run_ranks(call, 2, config, (f"run_dir={run}",))[0]
    assert code == 0, error
    assert f"resumed from {before}" in out
    assert lines(run) == lines(whole)
    assert store.identity(run) == store.identity(whole)
    assert store.identity(run, "ema") == store.identity(whole, "ema") != store.identity(run)


def test_what_is_kept_and_what_a_checkpoint_says(whole):
    kept = {f.name: store.read_state(f)["images_seen"] // BATCH for f in store.complete(whole)}
    assert list(kept.values()) == [8, 12, 20], "the first at or after 6, 12 and 18 batches; 20 is also the last"
    state = json.loads((whole / "checkpoints" / "step_00000008" / "state.json").read_text())
    assert state["images_seen"] == 8 * BATCH
    assert state["step"] == 8
    assert state["tokenizer"] == {"path": None, "sha256": "0" * 64}
    assert state["layout"]["ranks"] == 2
    assert "init_from" not in state
