"""Reports of a whole scaling study: the left-out size beside its forecast, each budget's best size, and the advice."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llamagen_dist.cli import main
from llamagen_dist.config import load
from llamagen_dist.config.launch import PipelineConfig
from llamagen_dist.errors import UserError
from llamagen_dist.report.collect import collect
from llamagen_dist.report.quantities import count, loss, power
from llamagen_dist.report.results import results
from tests.unit import study_folder
from tests.unit.report_pages import html, inside, section, series, table, text_of, titles

ROOT = Path(__file__).parents[2]
FILES = {"scaling": "scaling.json", "left_out": "held-out.json", "isoflop": "isoflop.json", "advice": "advice.json"}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return study_folder.make(tmp_path_factory.mktemp("study") / "OUT")


@pytest.fixture
def out(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "OUT"))


def written(out: Path, name: str) -> Any:
    return json.loads((out / FILES[name]).read_text())


def change(out: Path, name: str, how: Callable[[Any], object]) -> None:
    value = written(out, name)
    how(value)
    (out / FILES[name]).write_text(json.dumps(value))


def plain(text: str) -> str:
    return text.replace("\N{NO-BREAK SPACE}", " ")


def test_every_stage_of_the_study_has_its_section(out: Path) -> None:
    main(["report", str(out)])
    page = (out / "report.html").read_text()
    assert titles(out) == ["The scaling law", "The best size of each budget", "What to train", "Next steps"]
    assert page.count("<img") == 3, "the forecast, the frontier and the parabolas"


def test_the_left_out_size_is_forecast_beside_what_was_measured(out: Path) -> None:
    forecasts = written(out, "left_out")["predictions"]
    rows = table(section(out, "The scaling law"))[1:]
    assert [(row[1], row[3]) for row in rows] == [(loss(p["predicted"]), loss(p["measured"])) for p in forecasts]
    assert "For everything else the law was fitted again" in html(out)
    parameters = {row[0]: row[1] for row in table(section(out, "The scaling law"), 1)[1:]}
    assert parameters["E"] == f"{written(out, 'scaling')['params']['E']:.5g}", "of the fit to all runs"
    change(out, "left_out", lambda fit: fit["predictions"][-1].update(measured=9.0))
    assert table(section(out, "The scaling law"))[-1][3] == "9.0000", "the twin"
    (out / "scaling.json").unlink()  # the stage that follows has not finished
    parameters = {row[0]: row[1] for row in table(section(out, "The scaling law"), 1)[1:]}
    assert parameters["E"] == f"{written(out, 'left_out')['params']['E']:.5g}"
    assert "fitted again" not in html(out)


def test_the_parabolas_go_through_the_measured_losses_down_to_each_budgets_best_size(out: Path) -> None:
    iso, points = written(out, "isoflop"), written(out, "scaling")["points"]
    (figure,) = inside(section(out, "The best size of each budget"), "figure")
    drawn = series(figure)
    for budget in iso["budgets"]:
        name = f"{power(budget['flops'])} FLOPs"
        assert drawn[f"{name}, best"]["x"] == pytest.approx([budget["params"]])
        assert drawn[f"{name}, best"]["y"] == pytest.approx([budget["loss"]])
        here = [p["loss"] for p in points if abs(p["flops"] / budget["flops"] - 1) < 0.01]
        assert sorted(drawn[f"{name}, measured"]["y"]) == sorted(here)
        assert min(drawn[f"{name}, parabola"]["y"]) == pytest.approx(budget["loss"], rel=1e-4)
    rows = table(section(out, "The best size of each budget"))[1:]
    shown = [plain(count(budget["params"])) for budget in [*iso["budgets"], *iso["at"]]]
    assert [row[2] for row in rows] == shown
    assert "a parabola is symmetric" in text_of(section(out, "The best size of each budget"))


def test_a_parabola_of_other_runs_is_not_drawn(out: Path) -> None:
    first = written(out, "isoflop")["budgets"][0]["flops"]

    def other_runs(fit: Any) -> None:
        for p in fit["points"]:
            if abs(p["flops"] / first - 1) < 0.01:
                p["loss"] += p["params"] / 1e9

    change(out, "scaling", other_runs)
    (figure,) = inside(section(out, "The best size of each budget"), "figure")
    assert len(figure["panels"][0]["series"]) == 3 * 2, "of two budgets; the third's points give another parabola"
    (out / "scaling.json").unlink()
    (out / "held-out.json").unlink()
    assert inside(section(out, "The best size of each budget"), "figure") == []
    assert len(table(section(out, "The best size of each budget"))) == 1 + 3 + 1


def test_the_advice_is_a_table_of_sizes_with_bands_and_all_that_is_not_known(out: Path) -> None:
    advice = written(out, "advice")
    rows = table(section(out, "What to train"))
    names = ["layers", "width", "heads", "parameters", "tokens", "epochs", "loss", "95% band", "time", "layout"]
    assert rows[0] == names, "after that of the rank, which has none"
    for row, one in zip(rows[1:], advice["configs"], strict=True):
        assert row[:4] == [str(one[key]) for key in ("rank", "n_layer", "dim", "n_head")]
        assert row[7:9] == [loss(one["loss"]), "{:.4f} to {:.4f}".format(*one["ci95"])]
    text = plain(text_of(section(out, "What to train")))
    low, high = advice["optimum"]["ci95"]["params_fit"]
    assert f"N = **{plain(count(advice['optimum']['params_fit']))}** ({plain(count(low))} to " in text
    assert plain(count(high)) in text
    assert text.count("Note: ") == len(advice["warnings"]) > 0
    assert text.count("narrower by") == len(advice["next_runs"]) > 0

    def less_is_known(advice: Any) -> None:
        for one in advice["configs"]:
            del one["ci95"], one["epochs"]
        del advice["optimum"]["ci95"]
        advice["warnings"] = ["no <b>bands</b>"]
        advice["next_runs"] = []
        advice["target"] = {"loss": 2.5, "flops": 1e21, "gpu_hours": 700.0, "ci95": [2e20, None]}
        advice["does_not_fit"] = [{"n_layer": 77, "n_head": 1, "dim": 99}]

    change(out, "advice", less_is_known)
    rows = table(section(out, "What to train"))
    assert "95% band" not in rows[0]
    assert "epochs" not in rows[0]
    assert len(rows[1]) == 9
    page = html(out)
    assert "no &lt;b&gt;bands&lt;/b&gt;" in page
    assert "77 layers of width 99" in page
    assert "narrower by" not in page
    assert "A loss of 2.5 takes 1.0 × 10²¹ training FLOPs (95% interval 2.0 × 10²⁰ to no end)." in page


def test_each_result_has_a_page_of_its_own_and_anything_else_is_refused(out: Path) -> None:
    known = {
        "scaling": "The scaling law",
        "left_out": "The scaling law",
        "isoflop": "The best size of each budget",
        "advice": "What to train",
    }
    for name, title in known.items():
        assert titles(out / FILES[name])[0] == title
    (out / "advice.json").write_text('{"configs": 1')
    with pytest.raises(UserError, match=r"advice\.json"):
        main(["report", str(out)])
    (out / "advice.json").write_text('{"configs": []}')
    with pytest.raises(UserError, match="nor of llamagen scaling fit"):
        main(["report", str(out / "advice.json")])


def test_the_pipeline_writes_what_is_read_and_ends_with_its_report(out: Path) -> None:
    file = ROOT / "configs/pipeline/scaling.yaml"
    config: PipelineConfig = load(file, kind="pipeline")
    produced = {Path(path).name for stage in config.stages for path in stage.produces}
    assert set(FILES.values()) < produced
    assert config.stages[-1].name == "report"
    shutil.copy(file, out / "config.yaml")
    assert titles(out)[:2] == ["What was run", "The scaling law"]
    found = collect(out)
    assert results(found)["scaling"]["measured"] == written(out, "left_out")["prediction"]["measured"]
    page = html(out)
    assert "A scaling law fitted to the smaller models predicted" in page
    assert "quickstart" not in page, "its commands are another pipeline's"
