"""Another metric as a law of the held-out loss, from tables and folders of runs, and beside the loss in advice."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from llamagen_dist.cli import main
from llamagen_dist.errors import UserError
from llamagen_dist.scaling.inputs import read
from llamagen_dist.scaling.points import Options, parse_csv
from tests.unit.test_scaling_ladder import write_ladder

LAW = {"E": 2.0, "A": 0.5, "gamma": 0.8}


def fid_of(loss: np.ndarray) -> np.ndarray:
    return LAW["E"] + LAW["A"] * np.exp(LAW["gamma"] * loss)


def fitted(place: Path, out: Path, *words: str) -> dict[str, Any]:
    main(["scaling", "fit", str(place), "--form", "loss_to_metric", "--loss", "l2", "--out", str(out), *words])
    found: dict[str, Any] = json.loads(out.read_text())
    return found


def write_table(path: Path, fids: np.ndarray, header: str = "params,tokens,val_loss,fid") -> Path:
    losses = np.linspace(2.5, 6.0, len(fids))
    rows = [f"{i}e8,{i}e10,{losses[i - 1]:.17g},{fids[i - 1]:.17g}\n" for i in range(1, len(fids) + 1)]
    path.write_text("".join([f"{header}\n", *rows]))
    return path


def with_fids(folder: Path, shift: int = 0) -> Path:
    """FIDs appended to the metrics of a ladder's runs, as an evaluation after the training would. shift: images by
    which they miss the validations."""
    for path in sorted(folder.glob("*/metrics.jsonl")):
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        later = [{"images_seen": row["images_seen"] + shift, "fid": float(fid_of(row["val_loss"]))} for row in rows]
        path.write_text("".join(json.dumps(row) + "\n" for row in [*rows, *later]))
    return folder


def test_fid_over_the_loss_of_a_table_through_the_command(tmp_path: Path) -> None:
    exact = fid_of(np.linspace(2.5, 6.0, 12))
    found = fitted(write_table(tmp_path / "t.csv", exact), tmp_path / "fit.json", "--metric", "fid")
    assert found["params"] == pytest.approx(LAW, rel=1e-6)
    assert found["record"]["metric"] == "fid"
    assert found["points"][3]["val_loss"] == pytest.approx(2.5 + 3 * 3.5 / 11)
    assert found["ci95"]["gamma"][0] <= 0.8 * (1 + 1e-6)
    assert found["frontier"] == {"best": []}
    other = write_table(tmp_path / "o.csv", exact, "params,tokens,loss,fid")  # the loss by its other name
    assert fitted(other, tmp_path / "o.json", "--metric", "fid")["params"] == found["params"]
    mixed = write_table(tmp_path / "m.csv", exact[np.random.default_rng(0).permutation(12)])  # sabotage
    assert fitted(mixed, tmp_path / "m.json", "--metric", "fid")["objective"] > 1e6 * (found["objective"] + 1e-12)


def test_fid_over_the_loss_of_folders_of_runs_through_the_command(tmp_path: Path) -> None:
    folder = with_fids(write_ladder(tmp_path))
    found = fitted(folder, tmp_path / "fit.json", "--metric", "fid", "--hold-out", "largest")
    assert found["params"] == pytest.approx(LAW, rel=1e-6)
    assert found["n"] == 12
    assert [one["predicted"] for one in found["predictions"]] == pytest.approx(
        [one["measured"] for one in found["predictions"]]
    )
    assert found["definitions"]["loss"].startswith("fid of metrics.jsonl")
    losses = read([str(folder)]).points.loss
    assert read([str(folder)], options=Options("fid")).points.also["val_loss"].tolist() == losses.tolist()
    elsewhere = with_fids(write_ladder(tmp_path / "twin"), shift=64)  # sabotage: FIDs of weights without a loss
    with pytest.raises(UserError, match="needs the column val_loss of every point, and some have none"):
        fitted(elsewhere, tmp_path / "twin.json", "--metric", "fid")


def test_a_law_of_the_loss_asks_for_its_metric(tmp_path: Path) -> None:
    table = write_table(tmp_path / "t.csv", fid_of(np.linspace(2.5, 6.0, 12)))
    with pytest.raises(UserError, match=r"loss_to_metric is a metric as a function of the held-out loss: .*--metric"):
        fitted(table, tmp_path / "fit.json")
    with pytest.raises(UserError, match="the runs have no kid"):
        fitted(write_ladder(tmp_path), tmp_path / "fit.json", "--metric", "kid")


def test_bits_are_of_the_loss_and_not_of_the_metric_beside_it() -> None:
    text = "params,tokens,val_loss,fid\n1e6,2e7,3.5,80\n"
    found, _, _ = parse_csv(text, "t.csv", Options(metric="fid", bits=True))
    assert (found.loss[0], found.also["val_loss"][0]) == (80, pytest.approx(3.5 * np.log(2)))


def test_a_trackers_runs_are_asked_for_the_metric_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A tracker gives only the rows that have every key asked for, and a FID is logged apart from the loss."""
    import yaml

    folder = with_fids(write_ladder(tmp_path))
    runs = []
    for path in sorted(folder.iterdir()):
        rows = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]

        def history(keys: list[str], rows: list[dict[str, Any]] = rows) -> list[dict[str, Any]]:
            return [row for row in rows if set(keys) <= set(row)]

        config = yaml.safe_load((path / "config.yaml").read_text())
        summary = json.loads((path / "summary.json").read_text())
        runs.append(
            SimpleNamespace(
                id=path.name, name=path.name, state="finished", config=config, summary=summary, scan_history=history
            )
        )
    monkeypatch.setattr("wandb.Api", lambda timeout: SimpleNamespace(runs=lambda path, lazy: runs))
    there, here = (read([place], options=Options("fid")).points for place in ("wandb:me/project", str(folder)))
    assert there.loss.tolist() == here.loss.tolist()
    assert there.also["val_loss"].tolist() == here.also["val_loss"].tolist()
