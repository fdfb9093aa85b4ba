"""Reports of every kind of folder: what is there is shown, what is absent or unfinished is named."""

import json
import shutil
import tarfile
from pathlib import Path

import pytest

from llamagen_dist.cli import main
from llamagen_dist.config import dump, load
from llamagen_dist.errors import UserError
from llamagen_dist.models.cost import training_flops_per_image
from llamagen_dist.report import results as of
from llamagen_dist.report.collect import collect
from tests.unit.quickstart_folder import BATCH, SIZES, STEPS, make, train_loss, write_run
from tests.unit.report_pages import described, html, inside, section, series, table, text_of, titles
from tests.unit.run_folders import end
from tests.unit.scored_folder import add_law, add_samples, add_scores
from tests.unit.test_old_runs import old_runs

ROOT = Path(__file__).parents[2]
RATES = {"1e-3": 1e-3, "2e-3": 2e-3, "4e-3": 4e-3}


def point(folder: Path, batch: int, lr: float) -> None:
    """A finished GPT run, the better the nearer its rate is to 2e-3."""
    write_run(folder, "g130k")
    settings = {"run_dir": str(folder), "train": {"global_batch": batch}, "optim": {"lr": lr}}
    config = load(ROOT / "configs/gpt/quickstart.yaml", settings)
    (folder / "config.yaml").write_text(dump(config))
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    worse = abs(lr - 2e-3) * 100 + batch / 1000
    moved = [line | {"val_loss": line["val_loss"] + worse} if "val_loss" in line else line for line in lines]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in moved))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sweep of two batches by three rates: four finished, one failed, one under way, and one planned."""
    out = tmp_path_factory.mktemp("sweep") / "lr"
    for batch in (16, 32):
        for name, lr in RATES.items():
            point(out / f"b{batch}-{name}", batch, lr)
    shutil.copytree(out / "b16-1e-3", out / "b16-3e-3")
    (out / "b16-3e-3" / "summary.json").unlink()
    end(out / "b16-3e-3", "the loss is not <b>finite</b>")
    unfinished = out / "b32-3e-3"
    shutil.copytree(out / "b32-1e-3", unfinished)
    (unfinished / "summary.json").unlink()
    lines = (unfinished / "metrics.jsonl").read_text().splitlines(keepends=True)
    (unfinished / "metrics.jsonl").write_text("".join(lines[:61]) + '{"step": 62, "imag')
    (out / "config.yaml").write_text(
        "kind: sweep\ntitle: Rates and <i>batches</i>\nmodule: llamagen_dist.train_gpt\nconfig: x.yaml\n"
        "name: 'b{train.global_batch}-{optim.lr}'\n"
        "grid:\n  train.global_batch: [16, 32]\n  optim.lr: [0.001, 0.002, 0.003, 0.004, 0.005]\n"
    )
    return out


@pytest.fixture
def sweep(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "lr"))


def test_a_sweep_is_ranked_and_what_did_not_finish_is_counted_and_named(
    sweep: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(["report", str(sweep)])
    assert capsys.readouterr().out.split() == [str(sweep / "report.html")]
    text = (sweep / "report.html").read_text().replace("&#39;", "'")
    for words in (
        "Of 10 points <strong>6 have finished</strong>, 1 failed, 1 unfinished, 2 never started.",
        "The best is <strong>b16-2e-3</strong>",
        "b16-3e-3: the loss is not &lt;b&gt;finite&lt;/b&gt;",
        "b32-3e-3: 3,840 images seen",
        "Never started: b16-5e-3, b32-5e-3.",
        "Rates and &lt;i&gt;batches&lt;/i&gt;",
        "no curve over FLOPs: the token shards",
    ):
        assert words in text, words
    rows = table(section(sweep, "The points, best first"))
    assert rows[0] == ["point", "held-out loss", "images seen", "train.global_batch", "optim.lr", "state"]
    losses = [float(row[1].strip("*")) for row in rows[1:7]]
    assert losses == sorted(losses)
    assert [row[0] for row in rows[1:4]] == ["b16-2e-3", "b32-2e-3", "b16-1e-3"]
    assert {row[0] for row in rows[7:]} == {"b16-3e-3", "b32-3e-3"}
    assert {row[-1] for row in rows[1:7]} == {"finished"}


def test_the_sabotage_twin_another_winner_moves_the_ranking(sweep: Path) -> None:
    path = sweep / "b32-4e-3" / "metrics.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    path.write_text("".join(json.dumps(x | {"val_loss": 0.5} if "val_loss" in x else x) + "\n" for x in lines))
    assert table(section(sweep, "The points, best first"))[1][:2] == ["b32-4e-3", "**0.5000**"]


def test_two_keys_make_a_grid_with_the_best_marked(sweep: Path) -> None:
    grid = table(section(sweep, "The points, best first"), 1)
    assert grid[0] == ["train.global_batch \\ optim.lr", "0.001", "0.002", "0.004"]
    assert [row[0] for row in grid[1:]] == ["16", "32"]
    best = f"**{train_loss('g130k', STEPS) + 0.03 + 0.016:.4f}**"
    assert grid[1][2] == best
    assert sum(cell.startswith("**") for row in grid for cell in row) == 1


def test_curves_over_flops_are_the_curves_over_images_times_an_images_cost(sweep: Path, tmp_path: Path) -> None:
    with tarfile.open(ROOT / "tests/golden/old_checkpoint.tar.xz") as archive:
        archive.extractall(tmp_path, filter="data")
    for folder in sweep.glob("b*"):
        config = load(folder / "config.yaml", {"data": {"train": str(tmp_path / "tokens")}})
        (folder / "config.yaml").write_text(dump(config))
        if (summary := folder / "summary.json").exists():  # of the shards' vocabulary
            summary.write_text(json.dumps({k: v for k, v in json.loads(summary.read_text()).items() if k != "params"}))
    images, flops = map(series, inside(section(sweep, "The points, best first"), "figure"))
    run = next(run for run in collect(sweep).runs if run.name == "b16-2e-3")
    cost = run.flops_per_image
    assert isinstance(cost, int)
    assert cost > 1000
    assert training_flops_per_image.__module__ == "llamagen_dist.models.cost"
    assert flops["b16-2e-3"]["x"] == pytest.approx([x * cost for x in images["b16-2e-3"]["x"]])
    assert flops["b16-2e-3"]["y"] == images["b16-2e-3"]["y"]


def test_a_finished_run_has_a_page_of_its_own(sweep: Path) -> None:
    run = sweep / "b16-2e-3"
    assert titles(run) == ["Training", "Environment", "Next steps"]
    text = html(run)
    assert f"The run has finished after <strong>{STEPS * BATCH:,} images</strong>" in text
    figure = inside(section(run, "Training"), "figure")[0]
    assert series(figure)["b16-2e-3, as logged"]["y"][6] == train_loss("g130k", 7)
    assert dict(table(section(run, "Training"))[1:])["parameters"] == "131 k"
    assert "results.json" not in [path.name for path in run.iterdir()]


def test_an_unfinished_run_is_reported_as_unfinished(sweep: Path) -> None:
    text = html(sweep / "b32-3e-3")
    assert "The run has not finished:</strong> it has seen 3,840 images" in text
    assert "has finished after" not in text
    assert "has failed</strong> (the loss is not &lt;b&gt;" in html(sweep / "b16-3e-3")
    path = sweep / "new"
    path.mkdir()
    shutil.copy(sweep / "b16-2e-3" / "config.yaml", path)
    assert "it has logged nothing yet" in html(path)
    assert "has finished after" in html(sweep / "b16-2e-3"), "the twin"


def test_a_ladder_of_sizes_is_a_sweep_with_its_sizes(tmp_path: Path) -> None:
    make(tmp_path / "OUT")
    out = tmp_path / "OUT" / "ladder"
    assert titles(out)[:2] == ["The points, best first", "The ladder"]
    rows = table(section(out, "The points, best first"))
    assert rows[0][:3] == ["point", "held-out loss", "parameters"]
    assert [row[0] for row in rows[1:]] == ["g560k", "g130k", "g30k"]


def test_a_tokenizer_run_has_the_tokenizers_section(tmp_path: Path) -> None:
    make(tmp_path / "OUT")
    out = tmp_path / "OUT" / "tokenizer"
    assert titles(out)[0] == "The tokenizer"
    assert "Which losses were on" in html(out)
    assert dict(table(section(out, "The tokenizer"))[1:])["held-out PSNR"] == "25.50 dB"


def test_evaluations_stand_side_by_side_with_what_makes_them_incomparable(tmp_path: Path) -> None:
    add_scores(tmp_path)
    one = json.loads((tmp_path / "evaluation.json").read_text())
    one["record"] |= {"metrics": {"fid": {"resize": "a"}}, "sets": {n: {"reference": {"n": 5}} for n in one["sets"]}}
    (tmp_path / "evaluation.json").write_text(json.dumps(one))
    other = json.loads(json.dumps(one))
    other["record"]["metrics"]["fid"]["resize"] = "b"
    other["sets"]["model"]["fid"] = 12.5
    (tmp_path / "other.json").write_text(json.dumps(other))
    (tmp_path / "unrelated.json").write_text("[1, 2]")
    rows = table(section(tmp_path, "Scores"))
    assert rows[1][:2] == ["other.json: samples of the GPT", "12.5"]
    assert len(rows) == 1 + 2 * len(one["sets"])
    assert "other.json: fid.resize: a -&gt; b" in html(tmp_path)
    (tmp_path / "other.json").write_text(json.dumps(one))
    assert "Not measured alike" not in html(tmp_path), "the twin: equal protocols"
    (tmp_path / "other.json").unlink()
    assert titles(tmp_path) == ["Scores", "Next steps"]
    main(["report", str(tmp_path / "evaluation.json")])
    assert (tmp_path / "evaluation.html").exists()


def test_a_law_alone_in_the_keys_of_now_and_of_before(tmp_path: Path) -> None:
    make(tmp_path / "OUT")
    add_law(tmp_path / "OUT")
    path = tmp_path / "OUT" / "scaling.json"
    law = json.loads(path.read_text())
    today = section(path, "The scaling law")
    assert table(today, 1)[1] == ["E", "1.5", "1.25 to 1.75"]
    law["parameters"], law["parameters_ci95"] = law.pop("params"), law.pop("ci95")
    law["frontier"] = law["frontier"]["best"]
    path.write_text(json.dumps(law))
    assert section(path, "The scaling law") == today


def test_samples_alone(tmp_path: Path) -> None:
    add_samples(tmp_path)
    assert titles(tmp_path / "samples") == ["Samples", "Next steps"]


def test_pictures_of_captions_stand_under_their_captions(tmp_path: Path) -> None:
    make(tmp_path / "OUT")
    add_samples(tmp_path / "OUT")
    folder = tmp_path / "OUT" / "samples"
    record = json.loads((folder / "record.json").read_text())
    (folder / "record.json").write_text(json.dumps(record | {"conditions": "sample i has caption i modulo 3"}))
    (folder / "captions.json").write_text(json.dumps(["a <b>cat</b>", "two cats", "no cat"]))
    grid = inside(section(tmp_path / "OUT", "Samples"), "imagegrid")[0]
    assert grid["captions"] == ["a <b>cat</b>", "two cats", "no cat"]
    assert "every caption" in grid["caption"]


def test_a_pipeline_with_one_gpt_shows_its_training(tmp_path: Path) -> None:
    out = tmp_path / "OUT"
    make(out)
    shutil.rmtree(out / "tp2")
    shutil.move(out / "ladder" / "g130k", out / "gpt")
    shutil.rmtree(out / "ladder")
    assert "Training of gpt" in titles(out)
    assert of.results(collect(out))["gpt"][0]["params"] == SIZES["g130k"]


def test_a_run_directory_of_an_older_version_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with tarfile.open(ROOT / "tests/golden/old_checkpoint.tar.xz") as archive:
        archive.extractall(tmp_path, filter="data")
    monkeypatch.chdir(tmp_path)  # its config names its data from there
    assert "The run has not finished:</strong> it has seen" in html(tmp_path / "gpt")
    path = tmp_path / "gpt" / "config.yaml"
    path.write_text(path.read_text() + "removed_since: 1\n")
    text = html(tmp_path / "gpt")
    assert "is of another version of llamagen-dist" in text
    assert "removed_since" in text
    old = old_runs(tmp_path / "launcher")
    for folder in ("here/sweep", "slurm/sweep"):
        runs = {run.name: run.state for run in collect(old / folder).runs}
        assert runs == {"bad": "failed", "good": "finished"}, folder


def test_a_folder_of_no_known_kind_is_refused_in_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nothing to report on: no run") as error:
        main(["report", str(tmp_path)])
    assert "\n" not in str(error.value)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(UserError, match="no such folder"):
        main(["report", str(tmp_path / "none")])
    (tmp_path / "x.json").write_text('{"a": 1}')
    with pytest.raises(UserError, match=r"x\.json: neither a result of eval\.evaluate"):
        main(["report", str(tmp_path / "x.json")])


@pytest.mark.parametrize("name", ["summary.json", "metrics.jsonl", "record.json"])
def test_a_damaged_file_of_a_run_is_named(sweep: Path, name: str) -> None:
    (sweep / "b16-2e-3" / name).write_text('{"step": \n{}\n')
    with pytest.raises(UserError, match=name):
        main(["report", str(sweep)])
    assert not (sweep / "report.html").exists()


def test_what_a_report_says_is_json(sweep: Path) -> None:
    json.dumps(described(sweep))
    assert "point" in text_of(section(sweep, "The points, best first"))
