"""W&B is sent a run's steps once each, whatever died in between, and nothing of a secret: read back from its files."""

import json
import math
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from llamagen_dist.cli import main
from llamagen_dist.config import GPTConfigFile, load
from llamagen_dist.config.resume import compare
from llamagen_dist.errors import UserError
from llamagen_dist.launch.points import sweep
from llamagen_dist.process import identify
from llamagen_dist.tracking import wandb_file, wandb_sink
from llamagen_dist.tracking.follow import Followers
from llamagen_dist.tracking.provenance import masked_values
from llamagen_dist.tracking.sinks import Rows, runs_in, sending
from llamagen_dist.tracking.wandb_file import Written
from tests.unit.tracked_run import BATCH, CONFIGS, cut, draw, finish, records, rows, save, steps, tracked_run, train

WANDB, OFFLINE = "tracking.wandb.project=tests", "tracking.wandb.mode=offline"


@pytest.fixture(autouse=True, scope="module")
def no_service_is_left():
    yield
    import wandb

    wandb.teardown()


@pytest.fixture(autouse=True)
def offline(monkeypatch, tmp_path):
    """Nobody's key and nobody's settings."""
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("NETRC", str(tmp_path / "home/netrc"))


def sync(*words: str | Path) -> None:
    main(["wandb-sync", *map(str, words)])


# --- what is written ---


@pytest.fixture(scope="module")
def sent(tmp_path_factory) -> Path:
    """A finished run after one replay."""
    folder = tracked_run(tmp_path_factory.mktemp("sent") / "base", WANDB, "tracking.wandb.tags=[a, b]")
    train(folder, 1, 12)
    draw(folder, 12)
    save(folder, 12)
    finish(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WANDB_MODE", "offline")
        sync(folder)
    return folder


def test_every_step_is_one_row_with_the_values_of_metrics_jsonl(sent):
    expected: dict[int, dict[str, float]] = {}
    for line in map(json.loads, (sent / "metrics.jsonl").read_text().splitlines()):
        expected.setdefault(line["step"], {}).update({k: v for k, v in line.items() if k not in ("step", "samples")})
    found = {row["_step"]: {k: row[k] for k in expected[row["_step"]]} for row in rows(sent)}
    assert found == expected
    assert steps(sent) == list(range(1, 13))
    assert "val_loss" in rows(sent)[-1]


def test_images_seen_is_the_step_metric(sent):
    metrics = records(sent, "metric")
    assert any(metric.name == "images_seen" for metric in metrics)
    names = {metric.name or metric.glob_name: metric for metric in metrics}
    by_index = [metric.name for metric in metrics]
    step_of_all = names["*"].step_metric or by_index[names["*"].step_metric_index - 1]
    assert step_of_all == "images_seen"


def test_config_record_tags_and_summary_are_there(sent):
    (run,) = records(sent, "run")[:1]
    config = {item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in run.config.update}
    assert config["train"]["images"] == 2560
    assert config["record"] == {"torch": "2.14.1", "host": "node-7", "commit": "abc"}
    assert (run.project, run.display_name, [*run.tags]) == ("tests", "base", ["a", "b"])
    assert run.run_id == (sent / "wandb_id").read_text().strip()
    assert {"params", "layout", "seconds"} <= wandb_file.written(sent, run.run_id, offline=True).summary.keys()


def test_a_checkpoint_is_a_reference_and_a_picture_a_file(sent):
    (artifact,) = records(sent, "artifact")
    (state, weights) = sorted(entry.ref for entry in artifact.manifest.contents if "COMPLETE" not in entry.ref)
    assert weights == (sent / "checkpoints/step_00000012/weights-00001.safetensors").resolve().as_uri()
    assert state.endswith("/step_00000012/state.json")
    assert json.loads(artifact.metadata)["images_seen"] == 12 * BATCH
    assert "step_00000012" in artifact.aliases
    picture = rows(sent)[-1]["reconstructions.path"]
    (file,) = sent.glob(f"wandb/*/files/{picture}")
    assert file.read_bytes() == (sent / "pictures/step_00000012/reconstructions.png").read_bytes()


# --- again, and after a death ---


def test_a_second_replay_adds_nothing(tmp_path, capsys, monkeypatch):
    folder = tracked_run(tmp_path / "base", WANDB)
    train(folder, 1, 4)
    save(folder, 4)
    finish(folder)
    sync(folder)
    assert "4 steps and 1 checkpoints sent" in capsys.readouterr().out
    before = [file.read_bytes() for file in sorted(folder.glob("wandb/*/*.wandb"))]
    sync(folder)
    assert "nothing new" in capsys.readouterr().out
    assert [file.read_bytes() for file in sorted(folder.glob("wandb/*/*.wandb"))] == before
    monkeypatch.setattr(wandb_sink, "written", lambda *_: Written())
    sync(folder)  # sabotage twin: without a look at what is there, all of it is sent again
    assert steps(folder) == [1, 2, 3, 4] * 2


@pytest.mark.parametrize("rule", [True, False])
def test_a_run_that_died_and_resumed_has_each_step_once(tmp_path, monkeypatch, rule):
    """Dead at step 12, resumed at step 8; without the rule, the twin, four steps appear twice."""
    folder = tracked_run(tmp_path / "base", WANDB)
    train(folder, 1, 8)
    save(folder, 8)
    train(folder, 9, 12)
    sync(folder)
    cut(folder, 8)
    train(folder, 9, 20)
    finish(folder)
    if not rule:
        monkeypatch.setattr(wandb_sink, "written", lambda *_: Written(last_step=8))
    sync(folder)
    twice = [] if rule else [9, 10, 11, 12]
    assert sorted(steps(folder)) == sorted([*range(1, 21), *twice])
    assert len({file.stem for file in folder.glob("wandb/*/*.wandb")}) == 1, "one W&B run"
    assert len(records(folder, "artifact")) == (1 if rule else 2)


def test_a_torn_last_line_waits_for_its_end(tmp_path):
    folder = tracked_run(tmp_path / "base", WANDB)
    train(folder, 1, 3)
    whole = (folder / "metrics.jsonl").read_bytes()
    (folder / "metrics.jsonl").write_bytes(whole + b'{"step": 4, "images_s')
    sync(folder)
    assert steps(folder) == [1, 2, 3]
    (folder / "metrics.jsonl").write_bytes(whole + b'{"step": 4, "images_seen": 256, "loss": 1.0}\n')
    sync(folder)
    assert steps(folder) == [1, 2, 3, 4]


def test_a_row_is_sent_once_no_line_of_its_step_can_follow(tmp_path):
    folder = tracked_run(tmp_path / "base")
    reader = Rows(folder / "metrics.jsonl")
    assert list(reader.new(-1)) == []
    train(folder, 1, 3)
    assert [row.step for row in reader.new(-1)] == [1, 2]
    assert [row.step for row in reader.new(2)] == []
    (row,) = reader.new(3)
    assert row.values.keys() == {"images_seen", "loss", "val_loss"}
    assert list(reader.new(math.inf)) == []
    cut(folder, 1)
    with pytest.raises(RuntimeError, match="cut back"):
        list(reader.new(-1))


def test_a_wandb_file_is_read_across_its_blocks_and_up_to_a_torn_record(tmp_path):
    folder = tracked_run(tmp_path / "base", WANDB)
    train(folder, 1, 400)
    sync(folder)
    (file,) = folder.glob("wandb/*/*.wandb")
    assert file.stat().st_size > 2 * 32768
    assert steps(folder) == list(range(1, 401))
    whole = file.read_bytes()
    for size in (0, 7, 32768, 32770, 50_000, len(whole) - 5):
        file.write_bytes(whole[:size])
        found = steps(folder)
        assert found == list(range(1, len(found) + 1))
        assert len(found) < 401


# --- secrets ---


def test_nothing_of_a_secret_is_written(tmp_path, monkeypatch):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "s3cr3tenvironment")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_API_KEY", "5ec2e7" * 7)
    folder = tracked_run(
        tmp_path / "base",
        WANDB,
        "data.train=https://me:s3cr3tlogin@host/plainplace/?X-Amz-Signature=s3cr3tsignature",
        "data.validation=pipe:curl -u me:s3cr3thost https://host/{}",
        "data.allow_pipe=true",
    )
    (folder / "record.json").write_text(json.dumps({"host": "node-7", "diff": "+KEY=s3cr3tdiff"}))
    train(folder, 1, 2)
    sync(folder)
    written = b"".join(path.read_bytes() for path in folder.rglob("wandb/**/*") if path.is_file())
    assert b"s3cr3t" not in written
    assert b"5ec2e7" not in written
    assert b"node-7" in written, "the twin: what is no secret is found"
    assert b"plainplace" in written


@pytest.mark.parametrize(
    ("given", "shown"),
    [
        ({"api_key": "abc", "n": 3}, {"api_key": "***", "n": 3}),
        ({"a": [{"password": "x"}]}, {"a": [{"password": "***"}]}),
        ({"train": "s3://bucket/a"}, {"train": "s3://bucket/a"}),
        ({"train": "https://u:p@h/a?sig=1#x"}, {"train": "https://h/a"}),
        ({"train": "pipe:cat x"}, {"train": "pipe:***"}),
        ({"tokens": 256, "tokenizer": "runs/vq"}, {"tokens": 256, "tokenizer": "runs/vq"}),
        ({"note": "WANDB_API_KEY=abc run"}, {"note": "WANDB_API_KEY=*** run"}),
    ],
)
def test_values_are_masked_by_name_and_by_what_they_are(given, shown):
    assert masked_values(given) == shown


# --- where it is sent ---


def test_a_sweep_s_points_and_a_ladder_s_rungs_are_a_group(tmp_path):
    (tmp_path / "sweep.yaml").write_text(
        f"kind: sweep\ntitle: rates\nmodule: llamagen_dist.train_gpt\nconfig: {CONFIGS}/gpt/GPT-B.yaml\n"
        "set: {data.train: t, data.validation: v}\ngrid: {optim.lr: [1.0e-4, 2.0e-4]}\n"
    )
    graph = sweep(tmp_path / "sweep.yaml", tmp_path / "rates-1", [WANDB])
    assert [point.config.tracking.wandb.group for point in graph.nodes] == ["rates-1"] * 2
    named = sweep(tmp_path / "sweep.yaml", tmp_path / "rates-1", [WANDB, "tracking.wandb.group=mine"])
    assert [point.config.tracking.wandb.group for point in named.nodes] == ["mine"] * 2
    ladder: GPTConfigFile = load(
        CONFIGS / "gpt/ladder.yaml", ["run_dir=runs/steps", "data.train=t", "data.validation=v", WANDB]
    )
    assert {ladder.rung(name).tracking.wandb.group for name in ladder.ladder} == {"steps"}


def test_a_folder_of_runs_is_a_group_and_needs_a_project(tmp_path):
    for name in ("one", "two"):
        train(tracked_run(tmp_path / "sweep" / name), 1, 2)
    with pytest.raises(UserError, match=r"sets no tracking.wandb; say where to send it: --project"):
        sync(tmp_path / "sweep")
    sync(tmp_path / "sweep", "--project", "mine")
    for name in ("one", "two"):
        (run,) = records(tmp_path / "sweep" / name, "run")[:1]
        assert (run.project, run.run_group, run.display_name) == ("mine", "sweep", name)
    with pytest.raises(UserError, match="holds no run"):
        sync(tmp_path / "nothing")
    assert runs_in(tmp_path) == [tmp_path / "sweep" / name for name in ("one", "two")]


def test_one_process_sends_at_a_time(tmp_path):
    folder = tracked_run(tmp_path / "base", WANDB)
    train(folder, 1, 2)
    with sending(folder, "wandb"), pytest.raises(UserError, match="another process is sending it to wandb"):
        sync(folder)
    sync(folder)
    assert steps(folder) == [1, 2]


def test_the_mode_is_what_is_set_and_else_what_there_is_a_key_for(monkeypatch):
    def mode(**section):
        return wandb_sink.mode_of(wandb_sink.WandbSection(project="p", **section))

    assert mode() == "offline"
    assert mode(mode="online") == "online"
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    assert mode() == "online"
    assert mode(mode="offline") == "offline"
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert mode() == "offline"
    monkeypatch.setenv("WANDB_MODE", "disabled")
    with pytest.raises(UserError, match="WANDB_MODE=disabled: set online or offline"):
        mode()


def test_no_network_is_one_sentence(tmp_path, monkeypatch):
    monkeypatch.setattr(wandb_sink, "INIT_S", 3.0)
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    folder = tracked_run(tmp_path / "base", WANDB, "tracking.wandb.mode=online")
    train(folder, 1, 2)
    with pytest.raises(UserError, match=r"base: wandb: .*; the same command sends the rest"):
        sync(folder)


def test_a_run_may_be_tracked_from_another_start_on(tmp_path):
    folder = tracked_run(tmp_path / "base")
    before: GPTConfigFile = load(folder / "config.yaml")
    change = compare(folder, load(folder / "config.yaml", [WANDB]))
    assert not change.refused
    assert before.tracking.named() == {}
    assert any("tracking.wandb" in line for line in change.allowed)
    with pytest.raises(UserError, match="another config"):  # sabotage twin: what is computed may not change
        compare(folder, load(folder / "config.yaml", [WANDB, "optim.lr=0.5"]))


# --- scores ---


def evaluate(folder: Path, drawn_by: Path, fid: float = 12.125) -> Path:
    """evaluation.json in ``folder`` of samples that ``drawn_by`` drew, and of a baseline's beside them."""
    (folder / "samples").mkdir(exist_ok=True)
    record = {"checkpoint": str(drawn_by), "checkpoint_sha256": "feed"}
    (folder / "samples/record.json").write_text(json.dumps(record))
    sets = {"model": {"n": 500, "fid": fid, "kid_mean": 0.25}, "untrained": {"n": 500, "fid": 300.0}}
    about = {
        name: {"images": {"path": str(folder / f"samples/{name}.npz")}, "reference": {"sha256": "c0ffee"}}
        for name in sets
    }
    file = folder / "evaluation.json"
    file.write_text(json.dumps({"n": 500, "sets": sets, "record": {"format": 1, "metrics": {}, "sets": about}}))
    return file


def summary(folder: Path) -> list[dict[str, object]]:
    """What was written of scores, oldest first."""
    sent = [
        {item.key: json.loads(item.value_json) for item in record.update if item.key.startswith("evaluation/")}
        for record in records(folder, "summary")
    ]
    return [one for one in sent if one]


def test_the_scores_of_a_run_s_checkpoint_are_sent_once(tmp_path, capsys):
    """Twins: another run beside it gets none, and another measurement is sent again."""
    runs = [tracked_run(tmp_path / "ladder" / name, WANDB, OFFLINE) for name in ("base", "other")]
    for run in runs:
        train(run, 1, 2)
    evaluate(tmp_path, runs[0] / "checkpoints/step_00000002")
    sync(tmp_path)
    assert "base: 2 steps and 0 checkpoints, 4 scores sent" in capsys.readouterr().out
    measured = {"fid": 12.125, "kid_mean": 0.25, "n": 500, "weights_sha256": "feed"}
    expected = {f"evaluation/model/{key}": value for key, value in measured.items()}
    assert summary(runs[0]) == [expected]
    assert summary(runs[1]) == []
    sync(tmp_path)
    assert capsys.readouterr().out.count("nothing new") == 2
    assert summary(runs[0]) == [expected]
    evaluate(tmp_path, runs[0], fid=9.5)
    sync(tmp_path)
    assert "base: 0 steps and 0 checkpoints, 1 scores sent" in capsys.readouterr().out
    assert summary(runs[0])[1:] == [{"evaluation/model/fid": 9.5}]
    assert steps(runs[0]) == [1, 2]


def test_a_file_of_scores_that_is_not_the_run_s_is_refused(tmp_path):
    run = tracked_run(tmp_path / "sweep/base", WANDB, OFFLINE)
    train(run, 1, 2)
    (tmp_path / "scores").mkdir()
    file = evaluate(tmp_path / "scores", tmp_path / "sweep/base2")
    with pytest.raises(UserError, match=r"no score of this run \(.*set model: drawn with .*base2; .*untrained: not"):
        sync(run, "--evaluation", file)
    with pytest.raises(UserError, match=r"--evaluation: .*none\.json: no such file"):
        sync(run, "--evaluation", tmp_path / "none.json")
    with pytest.raises(UserError, match="--evaluation is W&B's"):
        sync(run, "--evaluation", file, "--to", "trackio")
    with pytest.raises(UserError, match="--evaluation is of one run"):
        sync(run, run, "--evaluation", file)
    assert not (run / "wandb").exists(), "nothing was sent"
    evaluate(tmp_path / "scores", run)
    sync(run, "--evaluation", file)
    assert summary(run)[0]["evaluation/model/fid"] == 12.125


# --- what is left behind ---


@pytest.mark.parametrize("wandb", ["works", "raises", "blocks"])
def test_a_follower_leaves_nothing_in_the_temporary_folder(tmp_path, monkeypatch, wandb):
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setenv("TMPDIR", str(temporary))
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    if wandb != "works":
        (tmp_path / "fake/wandb").mkdir(parents=True)
        leaves = "import tempfile, time\ntempfile.mkdtemp('left')\n"
        end = "raise RuntimeError" if wandb == "raises" else "time.sleep(60)"
        (tmp_path / "fake/wandb/__init__.py").write_text(leaves + end)
        monkeypatch.setenv("PYTHONPATH", str(tmp_path / "fake"))
    finish_s = 2.0 if wandb == "blocks" else 60.0
    folder = tracked_run(tmp_path / "base", WANDB, OFFLINE, f"tracking.finish_s={finish_s}")
    train(folder, 1, 4)
    finish(folder)
    said: list[str] = []
    Followers(folder, load(folder / "config.yaml").tracking, said.append).close(finished=True)
    assert [*temporary.iterdir()] == []
    assert len(said) == (wandb != "works"), said
    assert steps(folder) == ([1, 2, 3, 4] if wandb == "works" else [])


def test_the_sabotage_twin_a_follower_that_removes_another_folder_leaves_wandb_s(tmp_path):
    """What W&B makes when it is imported is removed by nobody else where a process ends by os._exit."""
    folder = tracked_run(tmp_path / "base", WANDB, OFFLINE)
    (tmp_path / "temporary").mkdir()
    train(folder, 1, 2)
    me = identify()
    words = [str(folder), "wandb", str(me.pid), me.started, "60", str(tmp_path / "another")]
    environment = os.environ | {"TMPDIR": str(tmp_path / "temporary")}
    follower = [sys.executable, "-m", "llamagen_dist.tracking.follow", *words]
    subprocess.run(follower, input=b"0", env=environment, check=True, capture_output=True)
    assert {path.name[-5:] for path in (tmp_path / "temporary").iterdir()} == {"media", "facts"}
