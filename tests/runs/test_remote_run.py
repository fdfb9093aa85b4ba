"""Training on shards that lie elsewhere: the same losses, cached or staged, and what fails is named."""

import json
import os
import time
from pathlib import Path

import pytest
import yaml

from llamagen_dist.data import fetch
from llamagen_dist.data.writer import shard_name
from llamagen_dist.errors import UserError
from llamagen_dist.program import run as run_program
from llamagen_dist.train_gpt import main
from tests.ranks.forked import run_ranks
from tests.runs.token_shards import write_tokens
from tests.shard_server import served

IMAGES, BATCH = 96, 16


@pytest.fixture
def config(tmp_path) -> Path:
    made = tmp_path / "made"
    for name, count, seed in (("train", 80, 0), ("validation", 40, 1)):
        write_tokens(made / name, count, seed)
    path = tmp_path / "gpt.yaml"
    path.write_text(
        yaml.safe_dump(
            {
                "kind": "gpt",
                "run_dir": str(tmp_path / "run"),
                "data": {"train": str(made / "train"), "validation": str(made / "validation"), "window_shards": 1},
                "model": {"n_layer": 1, "n_head": 2, "dim": 32, "multiple_of": 16},
                "train": {"images": IMAGES, "global_batch": BATCH},
                "optim": {"lr": 0.001},
                "log": {"every_steps": 1},
            }
        )
    )
    return path


def trained(config: Path, runs: dict[str, list[str]]) -> dict[str, list[float]]:
    """Losses of several runs, one after another on the same ranks."""
    losses = {}
    for name, settings in runs.items():
        run_dir = config.parent / name
        main([str(config), f"run_dir={run_dir}", *settings])
        lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
        losses[name] = [line[key] for line in lines for key in ("loss", "val_loss") if key in line]
    return losses


def test_the_losses_are_the_same_wherever_the_shards_lie(config, tmp_path, monkeypatch):
    monkeypatch.setattr(fetch, "FIRST_PAUSE_S", 0.01)
    with served(tmp_path / "made/train") as train, served(tmp_path / "made/validation") as validation:
        train.faults[shard_name(0)] = [("cut", 3000)]
        urls = [f"data.train={train.url}", f"data.validation={validation.url}"]
        runs = {
            "local": [],
            "cached": [*urls, f"data.cache={tmp_path / 'cache'}"],
            "cached again": [*urls, f"data.cache={tmp_path / 'cache'}"],
            "staged": [f"data.stage={tmp_path / 'stage'}"],
            "other": ["train.seed=1"],
        }
        losses = run_ranks(trained, 2, config, runs)[0]
        fetched = [train.times(shard_name(number)) for number in (0, 1)]
    assert len(losses["local"]) > IMAGES // BATCH
    assert losses["cached"] == losses["cached again"] == losses["staged"] == losses["local"]
    assert losses["other"] != losses["local"]
    assert fetched == [2, 1]  # by both ranks and runs together; once more where the line was cut


def test_a_shard_that_is_cut_short_during_training_ends_the_run_with_its_name(config, tmp_path, capfd):
    pid = os.fork()
    if pid == 0:
        try:
            run_program(lambda _: main([str(config), "train.images=1600000"]))
        except SystemExit as end:
            os._exit(int(end.code or 0))
        finally:
            os._exit(99)
    metrics = tmp_path / "run" / "metrics.jsonl"
    deadline = time.monotonic() + 60
    while not (metrics.exists() and metrics.read_text().count("\n") > 3) and time.monotonic() < deadline:
        time.sleep(0.01)
    for number in (0, 1):
        os.truncate(tmp_path / "made" / "train" / shard_name(number), 1024)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 2
    said = capfd.readouterr().err
    assert "cut short while it was in use" in said
    assert "made/train/shard-00000" in said
    assert "Traceback" not in said


def test_a_source_without_cache_or_permission_is_refused_before_anything_starts(config, tmp_path):
    with pytest.raises(UserError, match=r"set data\.cache"):
        main([str(config), "data.train=http://127.0.0.1:9/x"])
    with pytest.raises(UserError, match=r"allow_pipe=true"):
        main([str(config), "data.train=pipe:cat x/{name}"])
    assert not (tmp_path / "run").exists()
