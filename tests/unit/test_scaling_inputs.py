"""Runs of a law from tables, folders and a tracker: what is recognised, left out and refused."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from llamagen_dist.cli import main
from llamagen_dist.errors import UserError
from llamagen_dist.scaling.inputs import read, wandb_run
from llamagen_dist.scaling.ladder import of_runs
from llamagen_dist.scaling.points import Options, Points, parse_csv
from tests.unit.test_scaling_ladder import read_ladder, write_ladder

ROWS = "1e6,2e7,3.5,a\n2e6,4e7,3.25,b\n"


def parsed(text: str, **options: object) -> Points:
    return parse_csv(text, "t.csv", Options(**options))[0]


@pytest.mark.parametrize(
    "header", ["params,tokens,loss,run", "N,D,loss/val,name", "model_size,train_tokens,val_loss,run_id", "N,D,L,id"]
)
def test_other_peoples_headers_are_recognised_and_said(header: str) -> None:
    found, dropped, notes = parse_csv(f"{header}\n{ROWS}", "t.csv")
    assert (found.params.tolist(), found.tokens.tolist(), found.loss.tolist()) == ([1e6, 2e6], [2e7, 4e7], [3.5, 3.25])
    assert found.runs == ("a", "b")
    assert dropped == []
    assert len(notes) == (0 if header.startswith("params") else 4)


def test_a_header_that_could_be_two_things_is_asked_about() -> None:
    text = f"N,model_size,tokens,loss\n{ROWS}"
    with pytest.raises(UserError, match=r"params could be N or model_size .* --columns params=N"):
        parsed(text.replace(",a", "").replace(",b", "").replace("1e6,", "1e6,9e5,").replace("2e6,", "2e6,9e5,"))
    assert parsed("x,D,loss\n1e6,2e7,3.5\n", columns={"params": "x"}).params.tolist() == [1e6]
    with pytest.raises(UserError, match="the column params is missing"):
        parsed("x,D,loss\n1e6,2e7,3.5\n")
    with pytest.raises(UserError, match="there is no column y to read params from"):
        parsed("x,D,loss\n1e6,2e7,3.5\n", columns={"params": "y"})


def test_tokens_come_from_flops_where_they_are_not_given() -> None:
    found, _, notes = parse_csv("N,flops,loss\n1e6,1.2e14,3.5\n", "t.csv")
    assert found.tokens.tolist() == [2e7]
    assert found.flops.tolist() == [1.2e14]
    assert any("taken as flops / (6 params)" in note for note in notes)
    assert parsed("N,D,loss\n1e6,2e7,3.5\n").flops.tolist() == [1.2e14]


@pytest.mark.parametrize("bad", ["nan", "inf", "-1", "0"])
def test_bad_rows_are_named_or_dropped_and_counted(bad: str) -> None:
    text = f"params,tokens,loss\n1e6,2e7,3.5\n2e6,4e7,{bad}\n3e6,4e7,3.1\n"
    with pytest.raises(UserError, match=r"t.csv, line 3: loss is .*--drop-bad"):
        parsed(text)
    found, dropped, _ = parse_csv(text, "t.csv", Options(drop_bad=True))
    assert found.loss.tolist() == [3.5, 3.1]
    assert [(one.what, one.why) for one in dropped] == [("t.csv, line 3", f"loss is {float(bad):g}")]
    with pytest.raises(UserError, match="nothing is left of its 1 rows"):
        parsed(f"params,tokens,loss\n1e6,2e7,{bad}\n", drop_bad=True)


def test_units_that_cannot_be_meant_are_asked_about() -> None:
    with pytest.raises(UserError, match=r"loss is 11, more than ln 16384 = 9.704 nats .*--bits"):
        parsed("params,tokens,loss\n1e6,2e7,11\n")
    assert parsed("params,tokens,loss\n1e6,2e7,11\n", bits=True).loss[0] == pytest.approx(11 * np.log(2))
    assert parsed("params,tokens,loss\n1e6,2e7,11\n", as_given=True).loss[0] == 11
    assert parsed("params,tokens,loss\n1e6,2e7,11\n", vocab=100000).loss[0] == 11
    with pytest.raises(UserError, match=r"90000 tokens for 1e\+06 parameters are 0.09 each: .*--tokens-per-image"):
        parsed("params,tokens,loss\n1e6,9e4,4\n")
    assert parsed("params,tokens,loss\n1e6,9e4,4\n", tokens_per_image=256).tokens[0] == 256 * 9e4
    assert parsed("params,tokens,loss\n1e6,1e5,4\n").tokens[0] == 1e5, "a tenth is let through"


def test_a_metric_is_fitted_in_place_of_the_loss() -> None:
    text = "params,tokens,loss,fid\n1e6,2e7,3.5,80\n2e6,4e7,3.25,60\n"
    assert parsed(text, metric="fid").loss.tolist() == [80, 60], "no loss, so no check of its units"
    with pytest.raises(UserError, match="there is no column kid"):
        parsed(text, metric="kid")


def test_the_same_row_twice_is_one_and_two_losses_of_one_run_are_refused() -> None:
    text = "params,tokens,loss,run\n1e6,2e7,3.5,a\n1e6,2e7,3.5,a\n"
    found, dropped, _ = parse_csv(text, "t.csv")
    assert len(found) == 1
    assert dropped[0].why == "the same as t.csv, line 2"
    with pytest.raises(UserError, match=r"a has the loss 3.6, and 3.5 at t.csv, line 2"):
        parsed(text[:-6] + "3.6,a\n")
    assert len(parsed(text.replace(",a", "").replace(",run", ""))) == 2, "without names they may be two runs"


@pytest.mark.parametrize(("column", "word"), [("vocab_size", "vocab"), ("val_set", "validation")])
def test_tables_of_several_vocabularies_or_validation_sets_are_refused(column: str, word: str) -> None:
    text = f"params,tokens,loss,{column}\n1e6,2e7,3.5,512\n2e6,4e7,3.2,OTHER\n"
    with pytest.raises(UserError, match=rf"line 3 has another {word} \(OTHER\) than t.csv, line 2 \(512\)"):
        parsed(text)
    assert len(parsed(text.replace("OTHER", "512"))) == 2


def test_json_lines_are_a_table_too(tmp_path: Path) -> None:
    path = tmp_path / "points.jsonl"
    rows = [{"model": {"N": 1e6}, "tokens": 2e7, "loss": 3.5}, {"model": {"N": 2e6}, "tokens": 4e7}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"model": {"N": 3')  # a killed writer's
    found = read([str(path)], options=Options(columns={"params": "model.N"}))
    assert found.points.params.tolist() == [1e6]
    assert [one.why for one in found.dropped] == ["no loss"]


def test_unfinished_runs_and_runs_of_other_kinds_are_counted(tmp_path: Path) -> None:
    folder = write_ladder(tmp_path)
    assert len(read([str(folder)]).ladder.rungs) == 5  # type: ignore[union-attr]
    (folder / "b" / "summary.json").unlink()
    tokenizer = folder / "tokenizer"
    tokenizer.mkdir()
    (tokenizer / "config.yaml").write_text(
        "kind: tokenizer\nrun_dir: x\nmodel: {size: VQ-16}\ndata: {train: a, validation: b, image_size: 256}\n"
        "train: {images: 256}\nloss: {perceptual: none}\n"
    )
    (tokenizer / "summary.json").write_text("{}")
    (tokenizer / "metrics.jsonl").write_text("")
    found = read([str(folder), str(folder / "a")])
    assert [rung.name for rung in found.ladder.rungs] == ["a", "c", "d", "e"]  # type: ignore[union-attr]
    assert {(Path(one.what).name, one.why) for one in found.dropped} == {
        ("b", "not finished (12,288 images)"),
        ("tokenizer", "a run of kind tokenizer"),
        ("a", "given twice"),
    }
    with pytest.raises(UserError, match="kind is 'tokenizer'"):
        read([str(tokenizer)])


def test_one_run_is_named_by_its_folder_or_its_metrics(tmp_path: Path) -> None:
    folder = write_ladder(tmp_path)
    by_folder, by_file = read([str(folder / "c")]), read([str(folder / "c" / "metrics.jsonl")])
    assert by_folder.points.loss.tolist() == by_file.points.loss.tolist()
    assert len(by_folder.points) == 3


def test_a_torn_last_line_of_metrics_is_left_out(tmp_path: Path) -> None:
    folder = write_ladder(tmp_path)
    path = folder / "c" / "metrics.jsonl"
    path.write_text(path.read_text() + '{"step": 400, "images_seen": 20000, "val_l')
    assert len(read_ladder(folder).points) == 15
    path.write_text(path.read_text() + "\n")  # sabotage: a whole line that is no JSON is damage
    with pytest.raises(UserError, match="line 4"):
        read_ladder(folder)


def test_a_nan_of_a_run_is_named_or_dropped(tmp_path: Path) -> None:
    folder = write_ladder(tmp_path, {("c", 6144): float("nan")})
    with pytest.raises(UserError, match="after 6144 images: loss is nan"):
        read([str(folder)])
    found = read([str(folder)], options=Options(drop_bad=True))
    assert len(found.points) == 14
    assert [one.why for one in found.dropped] == ["val_loss is nan"]


def test_runs_measured_on_other_images_are_refused(tmp_path: Path) -> None:
    folder = write_ladder(tmp_path)
    config = folder / "c" / "config.yaml"
    before = config.read_text()
    config.write_text(before + "validation: {images: 100}\n")
    with pytest.raises(UserError, match=r"ladder/c has another validation set \(.*100 images\) than .*ladder/a"):
        read([str(folder)])
    config.write_text(before + "validation: {weights: ema}\nema: {decay: 0.9}\n")
    with pytest.raises(UserError, match=r"ladder/c has another validation set \(.*the moving average\)"):
        read([str(folder)])
    config.write_text(before)
    other = tmp_path / "tokens2"
    other.mkdir()
    manifest = (tmp_path / "tokens" / "manifest.json").read_text()
    (other / "manifest.json").write_text(manifest)
    config.write_text(before.replace("validation: " + str(tmp_path / "tokens"), f"validation: {other}"))
    assert len(read([str(folder)]).points) == 15, "a copy of the same images is the same set"
    (other / "manifest.json").write_text(manifest.replace("512", "256"))
    config.write_text(before.replace(str(tmp_path / "tokens"), str(other)))
    with pytest.raises(UserError, match=r"another vocabulary \(256 codes\)|another validation set"):
        read([str(folder)])


def test_runs_of_one_name_in_two_folders_stay_two(tmp_path: Path) -> None:
    first, second = write_ladder(tmp_path / "x"), write_ladder(tmp_path / "y")
    found = read([str(first), str(second)])
    assert len(set(found.points.runs)) == 10
    assert str(first / "a") in found.points.runs


def test_runs_and_tables_are_not_mixed(tmp_path: Path) -> None:
    table = tmp_path / "t.csv"
    table.write_text(f"params,tokens,loss,run\n{ROWS}")
    with pytest.raises(UserError, match="runs and tables together"):
        read([str(write_ladder(tmp_path)), str(table)])


@pytest.mark.long
def test_what_was_left_out_stands_in_the_result(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, out = write_ladder(tmp_path), tmp_path / "fit.json"
    (folder / "b" / "summary.json").unlink()
    main(["scaling", "fit", str(folder), "--out", str(out)])
    found = json.loads(out.read_text())
    assert [one["why"] for one in found["dropped"]] == ["not finished (12,288 images)"]
    assert found["record"]["count"] == "blocks"
    assert found["record"]["model"]["dim"] == 112
    assert len(found["record"]["inputs"]) == 4
    assert len(found["record"]["inputs"][0]["sha256"]) == 64
    assert "left out:" in capsys.readouterr().out
    assert found["points"][-1]["flops"] == read_ladder(folder).points.flops[-1]


def test_a_run_of_a_tracker_gives_the_points_of_its_folder(tmp_path: Path) -> None:
    """The resolved config and the rows as they are in the folder, which is what a tracker is sent."""
    import yaml

    folder = write_ladder(tmp_path)
    runs = []
    for path in sorted(folder.iterdir()):
        config = yaml.safe_load((path / "config.yaml").read_text())
        rows = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
        summary = json.loads((path / "summary.json").read_text())
        runs.append(wandb_run(f"wandb:e/p/{path.name}", path.name, {**config, "host": "n1"}, summary, rows))
    there, here = of_runs(runs, "blocks", Options()), read_ladder(folder)
    for name in ("params", "tokens", "loss"):
        assert getattr(there.points, name).tolist() == getattr(here.points, name).tolist()
    with pytest.raises(UserError, match=r"summary.json counts 7 parameters"):
        of_runs([*runs[:-1], wandb_run("wandb:e/p/x", "x", config, {"params": 7}, rows)], "blocks", Options())


def project(monkeypatch: pytest.MonkeyPatch, runs: list[Any]) -> None:
    """A project of Weights & Biases with these runs, in the place of the network."""
    monkeypatch.setattr("wandb.Api", lambda timeout: SimpleNamespace(runs=lambda path, lazy: runs))


def test_a_project_of_other_peoples_runs_is_a_table(monkeypatch: pytest.MonkeyPatch) -> None:
    config = {"model_size": 1e6, "optim": {"lr": 1e-3}}
    done = SimpleNamespace(
        id="a1", name="a", state="finished", config=config, summary={"loss/val": 3.5, "tokens_seen": 2e7}
    )
    crashed = SimpleNamespace(id="b1", name="b", state="crashed", config=config, summary={})
    project(monkeypatch, [done, crashed])
    found = read(["wandb:me/project"])
    assert (found.points.params[0], found.points.tokens[0], found.points.loss[0]) == (1e6, 2e7, 3.5)
    assert found.points.also["lr"][0] == 1e-3
    assert found.points.runs == ("a",)
    assert [(one.what, one.why) for one in found.dropped] == [("wandb:me/project/b1", "not finished (crashed)")]
    project(monkeypatch, [crashed])
    with pytest.raises(UserError, match="no finished run in it"):
        read(["wandb:me/project"])
    project(monkeypatch, [])
    with pytest.raises(UserError, match="wandb:me/project: no run in it"):
        read(["wandb:me/project"])
    with pytest.raises(UserError, match="write wandb:ENTITY/PROJECT"):
        read(["wandb:project"])


def test_a_project_that_does_not_answer_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(timeout: int) -> None:
        raise ConnectionError("connection\nrefused")

    monkeypatch.setattr("wandb.Api", refuse)
    with pytest.raises(UserError, match=r"cannot be read from Weights & Biases \(connection refused\)"):
        read(["wandb:me/project"])
