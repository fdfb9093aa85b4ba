"""One description, three renderings: the page (test_report_page.py), files, a W&B Report. Nothing is sent."""

import json
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from llamagen_dist.cli import main
from llamagen_dist.errors import UserError
from llamagen_dist.report import files, wandb_spec
from llamagen_dist.report.blocks import Report, Section
from llamagen_dist.report.collect import collect
from llamagen_dist.report.sections import build
from tests.unit.scored_folder import finished_folder


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return finished_folder(tmp_path_factory.mktemp("quickstart"))


@pytest.fixture(scope="module")
def report(out: Path) -> Report:
    return build(collect(out))


def test_the_files_are_the_report(out: Path, report: Report, tmp_path: Path) -> None:
    main(["report", str(out), "--out", str(tmp_path / "page.html"), "--files", str(tmp_path / "files")])
    text = (tmp_path / "files" / "report.md").read_text()
    for block in report.blocks:
        if isinstance(block, Section):
            assert f"## {block.title}" in text
    shown = re.findall(r"!\[.*\]\((.+\.png)\)", text)
    assert len(shown) == len(list(files.pictures(report))) == len(set(shown))
    for name in shown:
        assert np.asarray(Image.open(tmp_path / "files" / name).convert("L")).std() > 1, f"{name} is blank"
    vectors = sorted((tmp_path / "files").glob("*.svg"))
    assert len(vectors) == sum(name.startswith("figure") for name in shown)
    assert all(b"<svg" in path.read_bytes()[:200] for path in vectors)
    assert "| FID of the samples | 98.2 |" in text


def whole(value: Any) -> str:
    return value.model_dump_json(by_alias=True, exclude_none=True)


@pytest.fixture
def spec(report: Report, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What would be sent, made without any network."""
    monkeypatch.setattr("socket.socket.connect", lambda *_: pytest.fail("the network was asked"))
    made = wandb_spec.spec(report, "lab", "pictures", ["abc123", "def456"], "media9")
    return json.loads(whole(made._to_model().spec))


def test_the_wandb_report_has_every_section_and_every_picture(report: Report, spec: dict[str, Any]) -> None:
    kinds = [block["type"] for block in spec["blocks"]]
    titles = [b["children"][0]["text"] for b in spec["blocks"] if b["type"] == "heading" and b["level"] == 1]
    assert titles == [block.title for block in report.blocks if isinstance(block, Section)]
    assert "table-of-contents" in kinds
    text = json.dumps(spec)
    pictures = list(files.pictures(report))
    names = set(re.findall(r"report/(?:figure|imagegrid)-\d\d", text))
    assert len(names) == len(pictures) > 5
    assert "98.2" in text
    assert "376 k tokens".replace(" ", "\\u00a0", 1) in text


def test_the_live_curves_are_of_the_runs_in_the_folder(spec: dict[str, Any]) -> None:
    grids = [json.dumps(b) for b in spec["blocks"] if b["type"] == "panel-grid"]
    assert "abc123" in grids[0]
    assert "def456" in grids[0]
    assert "images_seen" in grids[0]
    assert all("media9" in grid and "abc123" not in grid for grid in grids[1:])


def test_runs_that_were_not_tracked_have_no_live_curves(report: Report) -> None:
    spec = json.loads(whole(wandb_spec.spec(report, "lab", "pictures", [], "media9")._to_model().spec))
    grids = [json.dumps(b) for b in spec["blocks"] if b["type"] == "panel-grid"]
    assert len(grids) == len(list(files.pictures(report)))
    assert all("media9" in grid for grid in grids)


def test_the_ids_are_those_in_the_run_directories(out: Path) -> None:
    assert wandb_spec.run_ids(collect(out)) == []
    path = out / "ladder" / "g30k" / "wandb_id"
    path.write_text("id30\n")
    assert wandb_spec.run_ids(collect(out)) == ["id30"]
    path.unlink()


def test_without_a_key_nothing_is_sent_and_one_sentence_says_so(
    out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setattr("socket.socket.connect", lambda *_: pytest.fail("the network was asked"))
    with pytest.raises(UserError, match=r"--wandb: this machine has no W&B key; run wandb login") as error:
        main(["report", str(out), "--out", str(tmp_path / "page.html"), "--wandb"])
    assert "\n" not in str(error.value)
    assert (tmp_path / "page.html").exists()


@pytest.mark.parametrize(("option", "module"), [("--wandb", "wandb_workspaces"), ("--interactive", "plotly")])
def test_a_missing_extra_is_named(
    out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, option: str, module: str
) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == module]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(UserError, match=r"pip install 'llamagen-dist\["):
        main(["report", str(out), option, "--out", str(tmp_path / "page.html")])
