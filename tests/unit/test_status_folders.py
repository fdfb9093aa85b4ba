"""``llamagen status`` of folders of runs: pipelines, sweeps, ladders, and which folder is which."""

import json
from pathlib import Path

import pytest
import yaml

from llamagen_dist.errors import UserError
from llamagen_dist.launch.status import survey
from llamagen_dist.launch.status.survey import look
from llamagen_dist.process import identify
from tests.unit import run_folders as made
from tests.unit.run_folders import answers, job, only


def test_a_pipeline_shows_its_stages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    names = ("pack", "gpt", "sample")
    stages = [{"name": name, "why": "w", "module": "tokenizer_training.toy"} for name in names]
    (out / "stages").mkdir(parents=True)
    (out / "config.yaml").write_text(yaml.safe_dump({"kind": "pipeline", "title": "t", "stages": stages}))
    (out / "stages/pack").mkdir()
    (out / "stages/pack/DONE.json").write_text("{}")
    gpt = out / "stages/gpt"
    run = made.training(out / "gpt-run")
    gpt.mkdir()
    (gpt / "config.yaml").write_text((run / "config.yaml").read_text())
    made.lock(gpt, "7")
    answers(monkeypatch, job("7"))
    found = {row.name: row for row in look([out]).rows}
    assert [row.depth for row in found.values()] == [0, 1, 1, 1]
    assert {name: row.state.name for name, row in found.items()} == {
        "out": "running",
        "pack": "finished",
        "gpt": "running",
        "sample": "waiting",
    }
    assert (found["gpt"].progress.done, found["gpt"].progress.total) == (640, 2560)
    assert found["out"].state.reason == "1 of 3 stages are done"


def test_a_stage_that_is_a_sweep_shows_its_points(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stages = [{"name": "ladder", "why": "w", "module": "m", "out": "{out}/{where}"}, {"name": "b", "module": "m"}]
    data = {"kind": "pipeline", "variables": {"where": "points"}, "stages": stages}
    (tmp_path / "stages/ladder").mkdir(parents=True)
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(data))
    for number in range(2):
        made.lock(made.training(tmp_path / f"points/d{number}"), f"9_{number}")
    (tmp_path / "points/config.yaml").write_text("kind: sweep\n")
    answers(monkeypatch, job("9_0"), job("9_1", "PENDING", "Resources", ""))
    rows = look([tmp_path]).rows
    assert [(row.name, row.depth, row.state.name) for row in rows[1:]] == [
        ("ladder", 1, "running"),
        ("d0", 2, "running"),
        ("d1", 2, "waiting"),
        ("b", 1, "waiting"),
    ]
    assert rows[0].state.name == "running"
    (tmp_path / "stages/ladder/DONE.json").write_text("{}")
    assert look([tmp_path]).rows[1].state.name == "finished"


def test_a_pipeline_between_two_stages_runs_while_its_launcher_does(tmp_path: Path) -> None:
    stages = [{"name": name, "why": "w", "module": "m"} for name in ("a", "b")]
    (tmp_path / "stages/a").mkdir(parents=True)
    (tmp_path / "stages/a/DONE.json").write_text("{}")
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({"kind": "pipeline", "stages": stages}))
    me = identify()
    (tmp_path / "lock").write_text(json.dumps({"pid": me.pid, "started": me.started}))
    assert look([tmp_path]).rows[0].state.name == "running"
    (tmp_path / "lock").write_text(json.dumps({"pid": me.pid, "started": "1"}))
    assert (look([tmp_path]).rows[0].state.name, look([tmp_path]).rows[2].state.name) == ("stopped", "waiting")


def test_a_ladder_shows_its_rungs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = tmp_path / "ladder"
    small, large = made.training(whole / "1small", lines=40), made.training(whole / "2large")
    made.summarise(small)
    made.lock(whole, "7")
    answers(monkeypatch, job("7"))
    rows = look([tmp_path]).rows
    assert [(row.name, row.depth, row.state.name) for row in rows] == [
        ("ladder", 0, "running"),
        ("1small", 1, "finished"),
        ("2large", 1, "running"),
    ]
    assert rows[2].folder == large


def test_a_sweep_shows_its_points(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "lr"
    for number in range(4):
        made.lock(made.training(out / f"lr={number}"), f"9_{number}")
    (out / "config.yaml").write_text("kind: sweep\nmodule: llamagen_dist.train_gpt\n")
    made.history(out / "lr=0", ("submitted", {"job": "9_0"}), ("done", {"job": "9_0"}))
    made.history(out / "lr=1", ("submitted", {"job": "9_1"}), ("failed", {"job": "9_1"}))
    made.end(out / "lr=1", "rank 0: the loss is not finite")
    asked = answers(monkeypatch, job("9_2"), job("9_3", "PENDING", "JobArrayTaskLimit", ""))
    rows = look([tmp_path]).rows
    assert asked == [1]
    assert [(row.name, row.depth, row.state.name) for row in rows] == [
        ("lr", 0, "running"),
        ("lr=0", 1, "finished"),
        ("lr=1", 1, "failed"),
        ("lr=2", 1, "running"),
        ("lr=3", 1, "waiting"),
    ]
    assert rows[0].state.reason == "4 points: 1 failed, 1 running, 1 waiting, 1 finished"
    assert rows[2].state.reason == "rank 0: the loss is not finite"


def test_a_point_run_on_this_machine(tmp_path: Path) -> None:
    run = made.training(tmp_path / "a")
    made.note(run / "launch/log", 0, outcome="crashed", message="OSError: disk", ended=1.0)
    assert (only(run).state.name, only(run).state.reason) == ("failed", "OSError: disk")
    (run / "launch/DONE.json").write_text("{}")
    made.note(run / "launch/log", 0, outcome="done", ended=1.0)
    assert only(run).state.name == "finished"


def test_runs_are_found_below_and_nothing_inside_of_them(tmp_path: Path) -> None:
    made.training(tmp_path / "sweep/a")
    made.training(tmp_path / "sweep/b/code/c")
    made.training(tmp_path / "other")
    assert [row.name for row in look([tmp_path]).rows] == ["other", "sweep/a"]
    assert [row.name for row in look([tmp_path / "sweep", tmp_path / "other"]).rows] == ["a", "other"]


def test_a_folder_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="there is no such folder"):
        look([tmp_path / "absent"])


def test_a_folder_of_runs_with_one_called_launch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made.training(tmp_path / "runs/a")
    launch = made.training(tmp_path / "runs/launch")
    assert [row.name for row in look([tmp_path / "runs"]).rows] == ["a", "launch"]
    made.history(launch, ("started", {"job": ""}))
    assert [row.name for row in look([tmp_path / "runs"]).rows] == ["a", "launch"], "launched itself"
    (tmp_path / "lr").mkdir()
    (tmp_path / "lr/config.yaml").write_text("kind: sweep\n")
    made.training(tmp_path / "lr/launch")
    assert [(row.name, row.depth) for row in look([tmp_path / "lr"]).rows] == [("lr", 0), ("launch", 1)]
    monkeypatch.setattr(survey, "_LAUNCH_MARKS", {"config.yaml"})  # sabotage: any config would make it a launcher's
    assert [row.name for row in look([tmp_path / "runs"]).rows] == ["runs"]


def test_a_program_that_does_not_train_tells_how_far_it_is(tmp_path: Path) -> None:
    launch = tmp_path / "shards.launch/launch"
    launch.mkdir(parents=True)
    (launch / "job.json").write_text("{}")
    (launch / "config.yaml").write_text("kind: extract\n")
    (launch / "progress.json").write_text(json.dumps({"done": 3, "total": 12}))
    progress = only(launch.parent).progress
    assert (progress.kind, progress.done, progress.total) == ("extract", 3, 12)
    (launch / "progress.json").write_text(json.dumps({"done": "3", "total": 0}))
    progress = only(launch.parent).progress
    assert (progress.done, progress.total) == (None, None), "damaged: unknown, and no number is made of it"
