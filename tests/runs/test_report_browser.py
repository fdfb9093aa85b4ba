"""Reports in Chromium at two widths, on light and dark pages: nothing overflows, nothing is missing, nothing errs."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llamagen_dist.cli import main
from tests.runs.chromium import WIDTHS, browser, faults
from tests.unit import study_folder
from tests.unit.quickstart_folder import make
from tests.unit.scored_folder import add_law, add_samples, add_scores

LONG = "a_class_whose_name_is_longer_than_any_telephone_is_wide_and_has_no_gap_in_it_at_all_" * 3


@pytest.fixture(scope="module")
def chromium() -> Any:
    with browser() as started:
        yield started


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A page of every kind, with names that are hard to fit."""
    out = tmp_path_factory.mktemp("reports") / "OUT"
    make(out)
    add_samples(out)
    manifest = out / "images/train/manifest.json"
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"classes": [LONG, "<b>", "ü"]}))
    add_scores(out)
    add_law(out)
    np.savez(out / "reconstruction.npz", arr_0=np.zeros((5, 32, 32, 3), np.uint8))
    random = np.random.RandomState(0)
    looked = {"counts": random.poisson(3, 64), "map": random.randn(64, 2), "explained": np.array([0.5, 0.3])}
    np.savez(out / "tokenizer" / "codebook.npz", step=200, images_seen=6400, **looked)
    (out / "ladder" / "g30k" / "summary.json").unlink()
    shutil.move(out / "ladder" / "g30k", out / "ladder" / LONG[:200])
    shutil.copy(out / "evaluation.json", out / "samples" / "one.json")
    shutil.copy(out / "evaluation.json", out / "samples" / "two.json")
    made = {"study": out.parent / "study.html"}
    main(["report", str(study_folder.make(out.parent / "study")), "--out", str(made["study"])])
    for kind in ("", "ladder", "ladder/g560k", "tokenizer", "evaluation.json", "scaling.json", "samples"):
        name = kind.replace("/", "-") or "pipeline"
        made[name] = out.parent / f"{name}.html"
        main(["report", str(out / kind), "--out", str(made[name])])
    return made


@pytest.mark.parametrize(
    ("width", "scheme"),
    [
        (WIDTHS[0], "light"),
        (WIDTHS[1], "dark"),
        pytest.param(WIDTHS[0], "dark", marks=pytest.mark.long),
        pytest.param(WIDTHS[1], "light", marks=pytest.mark.long),
    ],
)
def test_every_page_is_whole(chromium: Any, pages: dict[str, Path], width: int, scheme: str) -> None:
    assert {name: faults(chromium, page, width, scheme) for name, page in pages.items()} == {name: [] for name in pages}


@pytest.mark.parametrize(
    ("sabotage", "said"),
    [
        ('<div style="width:2000px">wide</div>', "overflow: "),
        ("<script>throw 1</script>", "console: "),
        ('<img alt="gone" src="data:image/png;base64,AAAA">', "no picture: gone"),
        ('<img alt="far" src="https://example.org/a.png">', "no picture: far"),
    ],
)
def test_a_page_that_is_not_whole_is_noticed(
    chromium: Any, pages: dict[str, Path], tmp_path: Path, sabotage: str, said: str
) -> None:
    page = tmp_path / "page.html"
    page.write_text(pages["ladder"].read_text().replace("</main>", f"{sabotage}</main>"))
    assert any(fault.startswith(said) for fault in faults(chromium, page, 1280, "light"))


@pytest.mark.long
def test_a_style_without_scrolling_tables_overflows_on_a_telephone(
    chromium: Any, pages: dict[str, Path], tmp_path: Path
) -> None:
    page = tmp_path / "page.html"
    page.write_text(pages["pipeline"].read_text().replace(".scroll{overflow-x:auto", ".scroll{color:inherit"))
    assert any(fault.startswith("overflow") for fault in faults(chromium, page, 390, "light"))


@pytest.mark.long
def test_interactive_plots_draw_without_an_error(chromium: Any, pages: dict[str, Path], tmp_path: Path) -> None:
    page, folder = tmp_path / "page.html", pages["pipeline"].parent / "OUT"
    main(["report", str(folder), "--interactive", "--out", str(page)])
    assert page.stat().st_size > 3_000_000 > pages["pipeline"].stat().st_size
    for width in WIDTHS:
        assert faults(chromium, page, width, "light") == []
    tab = chromium.new_page()
    tab.goto(page.as_uri())
    drawn = tab.locator(".plotly .main-svg").count()
    tab.close()
    assert drawn >= 9
    page.write_text(page.read_text().replace("script-src &#39;unsafe-inline&#39;; ", ""))
    assert faults(chromium, page, 1280, "light"), "the twin: the policy keeps scripts out of every other page"
