"""The program itself: resumed runs are bit-equal, other configs and data are refused.

What is interrupted runs as real processes; the rest runs ``main`` on forked ranks, which start at once.
"""

import contextlib
import io
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import deepspeed  # noqa: F401 - before the fork, so that ranks start at once
import pytest
import yaml

from llamagen_dist.checkpoint.checkpoint import Checkpoint
from llamagen_dist.data import digest
from llamagen_dist.data.order import Order
from llamagen_dist.errors import UserError
from llamagen_dist.train_gpt import main
from llamagen_dist.training import run as run_directory
from tests import checkpoints as store
from tests.expected_digest import expected
from tests.ranks.forked import run_ranks
from tests.runs.token_shards import write_tokens

ROOT = Path(__file__).parent.parent.parent
IMAGES, BATCH = 640, 16
WSD = ("optim.schedule=wsd", "optim.cooldown_images=160", "train.images=320")


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tokens")
    write_tokens(folder / "train", 200, 0)
    write_tokens(folder / "validation", 40, 1)
    write_tokens(folder / "other", 200, 2)
    return folder


@pytest.fixture(scope="module")
def config(data) -> Path:
    path = data / "gpt.yaml"
    path.write_text(
        yaml.safe_dump(
            {
                "kind": "gpt",
                "run_dir": str(data / "unused"),
                "data": {"train": str(data / "train"), "validation": str(data / "validation")},
                "model": {"n_layer": 2, "n_head": 2, "dim": 32, "multiple_of": 16},
                "train": {"images": IMAGES, "global_batch": BATCH},
                "optim": {"lr": 0.001},
                "parallel": {"zero": 1},
                "validation": {"at_images": [320]},
                "checkpoint": {"every_images": 160},
                "log": {"every_steps": 1},
            }
        )
    )
    return path


def start(ranks: int, config: Path, *settings: str) -> list[subprocess.Popen[str]]:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    common = {
        **os.environ,
        "WORLD_SIZE": str(ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, "-m", "llamagen_dist.train_gpt", str(config), *settings]
    return [
        subprocess.Popen(
            command,
            env={**common, "RANK": str(r), "LOCAL_RANK": str(r)},
            cwd=ROOT,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        for r in range(ranks)
    ]


def call(config: Path, settings: tuple[str, ...]) -> tuple[int, str, str]:
    """(exit code, stdout, error sentence) of the program on this rank."""
    said = io.StringIO()
    try:
        with contextlib.redirect_stdout(said):
            main([str(config), *settings])
    except UserError as error:
        return 2, said.getvalue(), str(error)
    return 0, said.getvalue(), ""


def run_all(ranks: int, config: Path, *settings: str) -> list[tuple[int, str, str]]:
    return run_ranks(call, ranks, config, settings)


def finish(processes: list[subprocess.Popen[str]]) -> tuple[int, str, str]:
    """(exit code, stdout, stderr) of rank 0, after all ranks have ended."""
    outputs = [p.communicate(timeout=120) for p in processes]
    return processes[0].returncode, *outputs[0]


def lines(
    run: Path,
    keys: tuple[str, ...] = ("step", "images_seen", "loss", "grad_norm", "samples", "val_loss", "val_loss_null"),
) -> list[dict]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: row[k] for k in keys if k in row} for row in rows]


@pytest.fixture(scope="module")
def uninterrupted(data, config) -> Path:
    run = data / "whole"
    code, out, err = run_all(2, config, f"run_dir={run}")[0]
    assert code == 0, out + err
    return run


def test_it_learns_and_says_what_it_did(uninterrupted):
    rows = lines(uninterrupted)
    steps = [row["step"] for row in rows if "loss" in row]
    assert steps == list(range(1, IMAGES // BATCH + 1))
    held_out = [row for row in rows if "val_loss" in row]
    assert [row["images_seen"] for row in held_out] == [320, 640]
    assert held_out[1]["val_loss"] < held_out[0]["val_loss"] < 4.2, "ln 64 = 4.16 at the start"
    summary = json.loads((uninterrupted / "summary.json").read_text())
    assert summary["layout"] == {"ranks": 2, "tensor": 1, "data": 2, "zero": 1}
    assert summary["samples"] == digest.text(expected(Order(200, 0), IMAGES)), (
        "three epochs and a bit, each image as due"
    )
    assert summary["params"] == 64 * 32 * 2 + 5 * 32 + 2 * (4 * 32 * 32 + 3 * 32 * 96) + 5 * 32
    assert json.loads((store.newest(uninterrupted) / "classes.json").read_text()) == [f"class {c}" for c in range(4)]
    assert len(store.complete(uninterrupted)) == 2, "keep_last is 2"


def wait_for_step(run: Path, step: int) -> None:
    deadline = time.monotonic() + 180
    while time.monotonic() < deadline:
        if (run / "metrics.jsonl").exists() and len((run / "metrics.jsonl").read_text().splitlines()) >= step:
            return
        time.sleep(0.02)
    raise AssertionError("the run did not get that far")


@pytest.mark.long
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_an_interrupted_run_goes_on_bit_for_bit(data, config, uninterrupted, number):
    run = data / f"interrupted-{number.name}"
    processes = start(2, config, f"run_dir={run}")
    wait_for_step(run, 14)
    processes[1].send_signal(number)
    if number == signal.SIGKILL:
        processes[0].kill()
    code, _, err = finish(processes)
    assert len(lines(run)) < len(lines(uninterrupted)), "it was to be interrupted half-way"
    reached = store.read_state(store.newest(run))["images_seen"]
    if number == signal.SIGTERM:
        assert code == 75
        assert "the same command resumes" in err
        assert reached == lines(run)[-1]["images_seen"], "a signal loses no step"
    else:
        assert reached >= 160, "a kill loses at most the save interval"
    code, out, err = run_all(2, config, f"run_dir={run}")[0]
    assert code == 0, out + err
    assert f"resumed from {Path(run)}" in out
    assert lines(run) == lines(uninterrupted)
    a, b = (store.read_weights(r) for r in (run, uninterrupted))
    assert all((a[name] == b[name]).all() for name in b)
    # sabotage twin: a run that starts over with other samples first does not reproduce the lines
    assert lines(run)[20:] != lines(run)[:-20]


def call_after(seconds: float | None, config: Path, settings: tuple[str, ...]) -> tuple[int, str, str]:
    """``call`` where the checkpoint says how many seconds were spent so far (None: an older one does not)."""
    original = Checkpoint.state.func

    def state(checkpoint: Checkpoint) -> dict:
        found = dict(original(checkpoint))
        assert found.pop("seconds") > 0
        return found if seconds is None else found | {"seconds": seconds}

    Checkpoint.state = property(state)
    return call(config, settings)


@pytest.mark.parametrize("seconds", [1000.0, None])
def test_the_seconds_of_a_run_are_those_of_all_its_starts(config, uninterrupted, tmp_path, seconds):
    run = tmp_path / "run"
    shutil.copytree(uninterrupted, run)
    (run / "summary.json").unlink()
    shutil.rmtree(store.complete(run)[-1])
    assert run_ranks(call_after, 1, seconds, config, (f"run_dir={run}",))[0][0] == 0
    summary = json.loads((run / "summary.json").read_text())
    if seconds is None:
        assert "seconds" not in summary, "unknown is absent"
    else:
        assert 1000 < summary["seconds"] < 1100


def test_another_seed_gives_other_losses(data, config, uninterrupted):
    """Sabotage twin of every 'equal losses' above: they are not equal by construction."""
    run = data / "seed"
    assert run_all(1, config, f"run_dir={run}", "train.seed=1", "train.images=160")[0][0] == 0
    assert lines(run)[3]["loss"] != lines(uninterrupted)[3]["loss"]


def test_a_finished_run_is_left_alone_and_resumes_elastically(data, config, uninterrupted):
    before = (uninterrupted / "metrics.jsonl").read_bytes()
    code, out, _ = run_all(1, config, f"run_dir={uninterrupted}", "parallel.zero=0")[0]
    assert code == 0
    assert "already finished" in out
    assert "changed since the last start, which is allowed: parallel.zero: 1 -> 0" in out
    assert (uninterrupted / "metrics.jsonl").read_bytes() == before


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (["ema.decay=0.9", "parallel.zero=2"], ["ema.decay: 0.0 -> 0.9"]),
        (["compute.precision=bf16"], ["compute.precision: fp32 -> bf16"]),
        (["train.seed=4", "model.n_layer=3"], ["model.n_layer: 2 -> 3; train.seed: 0 -> 4"]),
        (["init_from=IT"], ["init_from: None -> "]),
    ],
)
def test_what_changes_the_result_is_refused_on_resume_and_the_rest_is_said(config, uninterrupted, settings, expected):
    settings = [s.replace("IT", str(uninterrupted)) for s in settings]
    code, _, err = run_all(1, config, f"run_dir={uninterrupted}", *settings)[0]
    assert code == 2
    assert all(text in err for text in expected)
    assert "parallel.zero" not in err, "what may change is not listed as a difference"


def test_a_run_goes_on_with_another_layout_and_other_guards(data, config, uninterrupted):
    run = data / "elastic"
    shutil.copytree(uninterrupted, run)
    (run / "summary.json").unlink()
    shutil.rmtree(store.complete(run)[-1])
    changes = ("parallel.zero=2", "guard.hang_minutes=5", "compute.recompute_every=1", "log.every_steps=2")
    code, out, err = run_all(3, config, f"run_dir={run}", "train.micro_batch=null", *changes)[0]
    assert code == 2, "16 images over 3 ranks"
    code, out, err = run_all(1, config, f"run_dir={run}", *changes)[0]
    assert code == 0, out + err
    for text in ("parallel.zero: ", "guard.hang_minutes: 30.0 -> 5.0", "compute.recompute_every: 0 -> 1"):
        assert text in out
    assert "another layout than that checkpoint's: ranks 2 -> 1, data 2 -> 1, zero 1 -> 2" in out
    assert lines(run)[-1]["val_loss"] == pytest.approx(lines(uninterrupted)[-1]["val_loss"], abs=1e-5)
    assert json.loads((run / "summary.json").read_text())["samples"] == lines(uninterrupted)[-2]["samples"]


# --- a run that grows, and one that moves ---


def trained(run: Path) -> list[dict]:
    return lines(run, ("step", "images_seen", "loss", "grad_norm", "samples", "lr"))


def without_validation(run: Path) -> list[dict]:
    return [row for row in trained(run) if "loss" in row]


def same_weights(one: Path, other: Path) -> bool:
    a, b = (store.read_weights(r) for r in (one, other))
    return all((a[name] == b[name]).all() for name in b)


@pytest.mark.long
def test_a_finished_run_grows_into_the_run_that_was_longer_from_the_start(data, config, uninterrupted, tmp_path):
    run, longer = tmp_path / "run", tmp_path / "longer"
    shutil.copytree(uninterrupted, run)
    code, out, err = run_all(2, config, f"run_dir={run}", "train.images=800")[0]
    assert code == 0, out + err
    (said,) = (line for line in out.splitlines() if "changed since the last start, which is allowed: " in line)
    assert "train.images: 640 -> 800" in said
    assert run_all(2, config, f"run_dir={longer}", "train.images=800")[0][0] == 0
    assert without_validation(run) == without_validation(longer)
    assert same_weights(run, longer)
    assert not same_weights(run, uninterrupted), "twin: it trained on"
    assert "images: 800" in (run / "config.yaml").read_text()
    assert json.loads((run / "summary.json").read_text())["images_seen"] == 800
    before = contents(run)
    code, _, err = run_all(1, config, f"run_dir={run}", "train.images=320")[0]
    assert code == 2
    assert "train.images: 800 -> 320" in err
    assert contents(run) == before


@pytest.mark.long
def test_a_cooled_down_run_continues_from_before_its_cooldown(config, tmp_path, monkeypatch):
    run, longer, sabotaged = tmp_path / "run", tmp_path / "longer", tmp_path / "sabotaged"
    keep = "checkpoint.keep_last=9"
    assert run_all(1, config, f"run_dir={run}", *WSD, "optim.cooldown_from=160", keep)[0][0] == 0
    cooled = store.newest(run).name
    shutil.copytree(run, sabotaged)
    grown = (*WSD[:2], "train.images=480", "optim.cooldown_from=320", keep)
    code, out, err = run_all(1, config, f"run_dir={run}", *grown)[0]
    assert code == 0, out + err
    (said,) = (line for line in out.splitlines() if "which is allowed" in line)
    assert "differ from image 160 on, so training continues from the checkpoint at image 160" in said
    assert run_all(1, config, f"run_dir={longer}", *grown)[0][0] == 0
    assert without_validation(run) == without_validation(longer)
    assert same_weights(run, longer)
    (aside,) = (run / "checkpoints").glob("set_aside_*")
    assert [folder.name for folder in aside.iterdir()] == [cooled]
    assert (aside / cooled / "COMPLETE").exists(), "the cooled-down model is kept"
    monkeypatch.setattr(run_directory, "_rewind", lambda directory, change: "")  # sabotage twin: on from the cooled one
    assert run_all(1, config, f"run_dir={sabotaged}", *grown)[0][0] == 0
    assert not same_weights(sabotaged, longer)


def test_a_cooldown_that_no_checkpoint_is_from_before_is_not_continued(config, tmp_path):
    run = tmp_path / "run"
    assert run_all(1, config, f"run_dir={run}", *WSD, "optim.cooldown_from=0")[0][0] == 0
    before = contents(run)
    code, _, err = run_all(1, config, f"run_dir={run}", *WSD[:2], "train.images=480", "optim.cooldown_from=160")[0]
    assert code == 2
    assert "no checkpoint from before is kept (the first is at image 160)" in err
    assert contents(run) == before
    # the schedule left as it is, more images are exact, and useless: that is said
    code, out, _ = run_all(1, config, f"run_dir={run}", *WSD[:2], "train.images=480", "optim.cooldown_from=0")[0]
    assert code == 0
    assert "from image 160 on the learning rate stays at optim.final_lr 0.0" in out


def test_data_may_lie_elsewhere_but_not_be_others(data, config, uninterrupted, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(uninterrupted, run)
    (run / "summary.json").unlink()
    shutil.rmtree(store.complete(run)[-1])
    moved = tmp_path / "moved"
    for name in ("train", "validation"):
        shutil.copytree(data / name, moved / name)
    there = (f"data.train={moved / 'train'}", f"data.validation={moved / 'validation'}")
    before = contents(run)
    for key, where in (("data.validation", data / "other"), ("data.train", data / "other")):
        code, _, err = run_all(1, config, f"run_dir={run}", f"{key}={where}")[0]
        assert code == 2
        assert f"{key}: {run} was begun with other data" in err
        assert contents(run) == before
    code, out, err = run_all(2, config, f"run_dir={run}", *there)[0]
    assert code == 0, out + err
    assert f"data.train: {data / 'train'} -> {moved / 'train'}; data.validation: " in out
    assert lines(run) == lines(uninterrupted)
    assert same_weights(run, uninterrupted)
    assert str(moved / "train") in (run / "config.yaml").read_text()


def test_an_old_run_moves_its_training_data_and_says_what_it_does_not_know(data, config, uninterrupted, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(uninterrupted, run)
    record = json.loads((run / "record.json").read_text())
    del record["data"]
    (run / "record.json").write_text(json.dumps(record))
    shutil.copytree(data / "validation", tmp_path / "moved")
    code, _, err = run_all(1, config, f"run_dir={run}", f"data.validation={tmp_path / 'moved'}")[0]
    assert code == 2
    assert "does not record which data it was begun with; start it once from the old path" in err
    shutil.copytree(data / "train", tmp_path / "train")
    there = (f"run_dir={run}", f"data.train={tmp_path / 'train'}")
    assert run_all(1, config, *there)[0][0] == 0


def contents(folder: Path) -> list[tuple[Path, bytes]]:
    return sorted((p, p.read_bytes()) for p in folder.rglob("*") if p.is_file() and p.name != "lock")


def test_another_config_or_other_data_is_refused_and_nothing_lost(data, config, uninterrupted):
    before = contents(uninterrupted)
    [(code, _, err), (other_code, _, other_err)] = run_all(2, config, f"run_dir={uninterrupted}", "optim.lr=2e-3")
    assert (code, err) == (other_code, other_err) == (2, err)
    assert "optim.lr: 0.001 -> 0.002" in err
    code, _, err = run_all(1, config, f"run_dir={uninterrupted}", f"data.train={data / 'other'}")[0]
    assert code == 2
    assert "data.train" in err
    assert contents(uninterrupted) == before


def test_a_damaged_newest_checkpoint_is_named_and_the_one_before_used(data, config, uninterrupted):
    run = data / "damaged"
    shutil.copytree(uninterrupted, run)
    (run / "summary.json").unlink()
    newest = store.complete(run)[-1]
    victim = next(newest.glob("optimizer-*.safetensors"))
    content = bytearray(victim.read_bytes())
    content[-1] ^= 1
    victim.write_bytes(content)
    code, out, err = run_all(2, config, f"run_dir={run}")[0]
    assert code == 0, err
    assert f"{victim}: damaged" in out
    assert "step_00000030" in out
    assert lines(run) == lines(uninterrupted)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (["train.global_batch=15", "train.images=600"], "15 images cannot be shared equally by 2"),
        (["data.train=nowhere"], "nowhere"),
        (["run_dir=/proc/version/x"], "cannot be made"),
        (["model.dim=36"], "multiple of 4"),
        (
            ["model.size=GPT-Q", "model.n_layer=null", "model.n_head=null", "model.dim=null"],
            "did you mean GPT-",
        ),
        (["train.micro_batch=3"], "does not divide a rank's share of 8"),
        (["parallel.tensor=2", "model.n_head=3", "model.dim=36"], "does not divide this model's heads 3"),
    ],
)
def test_bad_input_is_one_sentence_on_every_rank(data, config, settings, expected):
    for code, _, err in run_all(2, config, f"run_dir={data / 'refused'}", *settings):
        assert code == 2
        assert len(err.splitlines()) == 1
        assert expected in err
    assert not (data / "refused").exists(), "nothing may be begun"


def test_a_shard_cut_by_one_byte_is_named_with_its_sha256(data, config, tmp_path):
    shutil.copytree(data / "train", tmp_path / "cut")
    shard = tmp_path / "cut" / "shard-000001.tar"
    recorded = json.loads((tmp_path / "cut" / "manifest.json").read_text())["shards"][1]["sha256"]
    os.truncate(shard, shard.stat().st_size - 1)
    code, _, err = run_all(1, config, f"run_dir={tmp_path / 'run'}", f"data.train={tmp_path / 'cut'}")[0]
    assert code == 2
    assert "shard-000001.tar" in err
    assert recorded in err


def test_a_ladder_trains_each_rung_in_its_own_run_directory(data, config):
    run = data / "ladder"
    ladder = "ladder={small: {model.dim: 16}, wide: {model.dim: 48, train.images: 160}}"
    code, out, err = run_all(2, config, f"run_dir={run}", "train.images=320", ladder)[0]
    assert code == 0, out + err
    params = {name: json.loads((run / name / "summary.json").read_text())["params"] for name in ("small", "wide")}
    assert params["small"] < params["wide"]
    assert json.loads((run / "wide" / "summary.json").read_text())["images_seen"] == 160
    code, _, err = run_all(1, config, f"run_dir={run}", "ladder={small: {model.dmi: 16}}")[0]
    assert code == 2
    assert "ladder.small: model.dmi: unknown key; did you mean model.dim?" in err
