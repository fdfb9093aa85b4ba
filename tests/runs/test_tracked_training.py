"""Training beside trackers that work, die, raise, block or have no network: the losses and the end are the same."""

import contextlib
import importlib.util
import io
import json
import os
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from llamagen_dist.cli import main as llamagen
from llamagen_dist.data.images import load_images
from llamagen_dist.data.shards import open_shards
from llamagen_dist.tracking.sinks import sending
from tests.image_shards import write_images
from tests.ranks.fit_run import lines, run
from tests.ranks.forked import end_ranks, run_ranks
from tests.ranks.layouts import BATCH, STEPS, Layout, mostly_long
from tests.unit.tracked_run import records, rows, steps
from tokenizer_training.train import main as train_tokenizer

EVERY = ("log.every_steps=1", f"checkpoint.every_images={3 * BATCH}", "checkpoint.keep_last=9")
OFFLINE = ("tracking.wandb.project=tests", "tracking.wandb.mode=offline")
FINISH_S = 3.0


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> list[float]:
    """The losses of a run that nobody tracks."""
    folder = tmp_path_factory.mktemp("plain") / "run"
    run_ranks(run, 1, Layout(), folder, *EVERY)
    assert not (folder / "wandb").exists()
    assert not (folder / "wandb_id").exists()
    return losses(folder)


def losses(folder: Path) -> list[float]:
    return [line["loss"] for line in lines(folder) if "loss" in line]


def test_rank_0_alone_sends_a_run_of_two_ranks(tmp_path, plain):
    folder = tmp_path / "run"
    run_ranks(run, 2, Layout(2), folder, *EVERY, *OFFLINE)
    assert steps(folder) == list(range(1, STEPS + 1))
    assert [row["loss"] for row in rows(folder)] == losses(folder)
    assert "val_loss" in rows(folder)[-1]
    assert len({*folder.glob("wandb/*/*.wandb")}) == 1
    assert len(records(folder, "artifact")) == 4, "of steps 3, 6, 9 and 10"
    assert [record.exit_code for record in records(folder, "exit")] == [0]


def die_once_it_is_sent(task, number: int) -> None:
    """Killed in step 9, when the follower has had time to read the lines before it; the checkpoint is step 6's."""
    if number == 9:
        time.sleep(3.0)
        os.kill(os.getpid(), signal.SIGKILL)


def test_a_killed_run_that_resumes_has_each_step_once(tmp_path, plain, monkeypatch):
    """And what the training process uses is watched meanwhile."""
    monkeypatch.setenv("WANDB_X_STATS_SAMPLING_INTERVAL", "1")
    folder = tmp_path / "run"
    end_ranks(run_dying, 1, folder)
    with sending(folder, "wandb", patience_s=60):  # the follower of the dead run has ended
        before = steps(folder)
    assert "proc.memory.rssMB" in {item.key for stats in records(folder, "stats") for item in stats.item}
    assert before[-1] > 6, "steps were sent that the resumed run computes again"
    run_ranks(run, 1, Layout(), folder, *EVERY, *OFFLINE)
    assert steps(folder) == list(range(1, STEPS + 1))
    assert losses(folder) == plain
    assert len({*folder.glob("wandb/*/*.wandb")}) == 2
    assert len({file.stem for file in folder.glob("wandb/*/*.wandb")}) == 1


def run_dying(folder: Path) -> None:
    run(Layout(), folder, *EVERY, *OFFLINE, read=die_once_it_is_sent)


BROKEN = {
    "raises": "raise RuntimeError('the tracker is broken')",
    "blocks": "import time\ntime.sleep(600)",
    "dead network": "",
}


@pytest.mark.parametrize("how", mostly_long(*BROKEN, quick=["blocks", "dead network"]))
def test_a_broken_tracker_changes_nothing_but_a_line_of_the_log(how, tmp_path, plain, monkeypatch, capfd):
    folder = tmp_path / "run"
    mode = "offline"
    with monkeypatch.context() as patch:
        if BROKEN[how]:
            (tmp_path / "fake/wandb").mkdir(parents=True)
            (tmp_path / "fake/wandb/__init__.py").write_text(BROKEN[how])
            patch.setenv("PYTHONPATH", str(tmp_path / "fake"))
        else:
            mode = "online"
            patch.setenv("WANDB_API_KEY", "0" * 40)
            patch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
        words = (*EVERY, "tracking.wandb.project=tests", f"tracking.wandb.mode={mode}", f"tracking.finish_s={FINISH_S}")
        began = time.monotonic()
        run_ranks(run, 1, Layout(), folder, *words)
        took = time.monotonic() - began
    assert losses(folder) == plain
    assert (folder / "summary.json").exists()
    said = capfd.readouterr().out
    assert said.count("llamagen wandb-sync") == 1
    why = "the tracker is broken" if how == "raises" else "it had not sent everything 3 s after the run's end"
    assert f"wandb: {why}; training is not affected (see" in said
    assert took < FINISH_S + 30, "nobody waits for a tracker that blocks for ten minutes"
    assert not list(folder.glob("wandb/offline*"))
    monkeypatch.setenv("WANDB_MODE", "offline")
    with sending(folder, "wandb", patience_s=60):
        pass
    config = yaml.safe_load((folder / "config.yaml").read_text())
    config["tracking"]["wandb"]["mode"] = "offline"
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    with contextlib.redirect_stdout(io.StringIO()):
        llamagen(["wandb-sync", str(folder)])
    assert steps(folder) == list(range(1, STEPS + 1))


# --- pictures ---


def test_a_tokenizer_s_validation_shows_its_reconstructions(tmp_path):
    write_images(tmp_path / "train", 16, 16)
    write_images(tmp_path / "validation", 9, 16, seed=1)
    (tmp_path / "tokenizer.yaml").write_text(yaml.safe_dump({
        "kind": "tokenizer", "run_dir": str(tmp_path / "run"),
        "model": {"channels": 8, "channel_multipliers": [1, 2], "res_blocks": 1, "z_channels": 8, "codebook_size": 32,
                  "codebook_dim": 4},
        "data": {"train": str(tmp_path / "train"), "validation": str(tmp_path / "validation"), "image_size": 16},
        "loss": {"perceptual": "none", "discriminator": {"kind": "none"}}, "optim": {"lr": 0.001, "weight_decay": 0.0},
        "train": {"images": 16, "global_batch": 8}, "validation": {"at_images": [8]}, "log": {"every_steps": 1},
        "tracking": {"wandb": {"project": "tests", "mode": "offline"}, "pictures": 3}}))  # fmt: skip
    run_ranks(tokenizer, 1, tmp_path / "tokenizer.yaml")
    files = sorted((tmp_path / "run/pictures").glob("*/*.png"))
    assert [str(file.relative_to(tmp_path / "run/pictures")) for file in files] == [
        "step_00000001/reconstructions.png",
        "step_00000002/reconstructions.png",
    ]
    picture = np.asarray(Image.open(files[0]))
    assert picture.shape == (32, 48, 3)
    held_out = load_images(open_shards(tmp_path / "validation", "images"), range(3), 16)
    assert np.array_equal(picture[:16], np.concatenate(held_out, axis=1))
    assert not np.array_equal(picture[16:], picture[:16])
    shown = [row["reconstructions.path"] for row in rows(tmp_path / "run")]
    assert [next((tmp_path / "run").glob(f"wandb/*/files/{path}")).read_bytes() for path in shown] == [
        file.read_bytes() for file in files
    ]


def tokenizer(config: Path) -> None:
    torch.set_num_threads(1)
    with contextlib.redirect_stdout(io.StringIO()):
        train_tokenizer([str(config)])


# --- trackio ---


def test_trackio_has_each_step_once_too(tmp_path, monkeypatch):
    if importlib.util.find_spec("trackio") is None:  # not imported here: it would take its folder from the environment
        pytest.skip("needs the extra trackio")
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    folder = tmp_path / "run"
    run_ranks(run, 1, Layout(), folder, *EVERY, "tracking.trackio.project=tests")
    assert trackio_losses(tmp_path) == losses(folder)
    run_ranks(replay, 1, folder)
    assert trackio_losses(tmp_path) == losses(folder)
    (folder / "wandb_id").unlink()  # sabotage twin: under another name all of it is sent again
    run_ranks(replay, 1, folder)
    assert sorted(trackio_losses(tmp_path)) == sorted(losses(folder) * 2)


def replay(folder: Path) -> None:
    llamagen(["wandb-sync", "--to", "trackio", str(folder)])


def trackio_losses(folder: Path) -> list[float]:
    """Straight from its SQLite file."""
    import sqlite3

    with contextlib.closing(sqlite3.connect(folder / "trackio/tests.db")) as file:
        found = file.execute("SELECT metrics FROM metrics ORDER BY id").fetchall()
    return [json.loads(text)["loss"] for (text,) in found]
