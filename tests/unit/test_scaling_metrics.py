"""Another metric as a law of the held-out loss, from tables and folders of runs, and beside the loss in advice."""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from llamagen_dist.cli import main
from llamagen_dist.errors import UserError
from llamagen_dist.scaling import published
from llamagen_dist.scaling.advise import Ask, advise, effective
from llamagen_dist.scaling.basis import Basis, read_fit
from llamagen_dist.scaling.inputs import read
from llamagen_dist.scaling.points import Options, parse_csv
from tests.unit.scaling_points import BUDGETS, chinchilla, grid
from tests.unit.test_scaling_advise import HOUR, MACHINE, write_fit
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


# beside the loss in advice


@pytest.fixture(scope="module")
def law(tmp_path_factory: pytest.TempPathFactory) -> Basis:
    return read_fit(write_fit(tmp_path_factory.mktemp("law")))


def fid_fit(folder: Path, form: str = "loss_to_metric", noise: float = 0.0, seed: int = 0) -> Path:
    """FID of the runs that ``write_fit`` makes, over their losses, their sizes or their compute."""
    n, d = grid()
    losses = chinchilla(n, d)
    scatter = np.exp(noise * np.random.default_rng(seed).standard_normal(len(n)))
    fids = (fid_of(losses) if form.startswith("loss") else 2 + 4e4 / n**0.5) * scatter
    rows = "".join(f"{a},{b},{c},{f},r{i}\n" for i, (a, b, c, f) in enumerate(zip(n, d, losses, fids, strict=True)))
    table = folder / "fids.csv"
    table.write_text("params,tokens,val_loss,fid,run\n" + rows)
    out = folder / f"{form}.json"
    main(["scaling", "fit", str(table), "--form", form, "--loss", "l2", "--metric", "fid", "--out", str(out)])
    return out


def test_fid_stands_beside_the_loss_with_a_band(law: Basis, tmp_path: Path) -> None:
    sharp, blurred = (read_fit(fid_fit(tmp_path, noise=noise)) for noise in (0.0005, 0.05))
    rows = {name: advise(law, Ask(MACHINE, 200 * HOUR), fid)["configs"] for name, fid in (("s", sharp), ("b", blurred))}
    for s, b in zip(rows["s"], rows["b"], strict=True):
        assert s["fid"] == pytest.approx(float(fid_of(np.array(s["loss"]))), rel=1e-3)
        low, high = s["fid_ci95"]
        ends = fid_of(np.array(s["ci95"]))
        assert low < s["fid"] < high
        assert (low, high) == pytest.approx(tuple(ends), rel=5e-3), "an exact curve passes the band of the loss on"
        assert b["fid_ci95"][1] - b["fid_ci95"][0] > 2 * (high - low), "twin: and scatter of its own widens it"
    alone = advise(law, Ask(MACHINE, 200 * HOUR))
    assert "fid" not in alone["configs"][0]
    assert "fid_fit" not in alone


def test_fid_by_size_needs_no_loss_and_says_how_far_it_reaches(law: Basis, tmp_path: Path) -> None:
    by_size = read_fit(fid_fit(tmp_path, "fid", noise=0.01))
    near = advise(law, Ask(MACHINE, 200 * HOUR), by_size)
    row = near["configs"][0]
    assert row["fid"] == pytest.approx(2 + 4e4 / row["params"] ** 0.5, rel=0.02)
    assert row["fid_ci95"][0] < row["fid"] < row["fid_ci95"][1]
    assert not row["fid_extrapolated"]
    assert not any("FID is extrapolated" in text for text in near["warnings"])
    far = advise(law, Ask(MACHINE, 1e6 * HOUR), by_size)
    assert far["configs"][0]["fid_extrapolated"] == ["params"]
    assert any("params lies more than 10 times beyond" in text for text in far["warnings"])
    over_loss = advise(law, Ask(MACHINE, 1e6 * HOUR), read_fit(fid_fit(tmp_path)))
    assert any("FID is extrapolated: val_loss lies beyond" in text for text in over_loss["warnings"])


def test_llamagens_fids_have_no_band_and_their_caveat(
    law: Basis, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["scaling", "fit", published.NAME, "--form", "fid", "--loss", "l2", "--out", str(tmp_path / "fid.json")]
    main(words)
    out = tmp_path / "advice.json"
    capsys.readouterr()
    command = ["scaling", "advise", law.source["path"], "--budget", "200", "--gpu", "h100", "--mfu", "0.4"]
    main([*command, "--fid-fit", str(tmp_path / "fid.json"), "--out", str(out)])
    shown, found = capsys.readouterr().out, json.loads(out.read_text())
    assert 2 < found["configs"][0]["fid"] < 3
    assert "fid_ci95" not in found["configs"][0]
    assert found["fid_fit"]["form"] == "fid"
    words = " ".join(shown.split())
    for text in ("FID", "guidance scale, the sampler", "FID: every size has the guidance scale", "no bands of FID: 5"):
        assert text in words


def test_a_fit_of_something_else_is_no_fid(law: Basis, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="a fit of loss, not of FID; make one with"):
        advise(law, Ask(MACHINE, 200 * HOUR), law)
    path = fid_fit(tmp_path)
    found = json.loads(path.read_text())
    found["record"] |= {"model": {"n_layer": 2, "n_head": 2, "dim": 32, "image_tokens": 64}, "count": "blocks"}
    path.write_text(json.dumps(found))
    fid = read_fit(path)
    advise(law, Ask(MACHINE, 200 * HOUR), fid)  # a table does not say what its tokens are
    with pytest.raises(UserError, match=r"its losses are of images of 64 tokens .* those of .* of 256 tokens"):
        advise(replace(law, stated=True), Ask(MACHINE, 200 * HOUR), fid)


# a law that knows what repeats are worth


@pytest.fixture(scope="module")
def repeated(tmp_path_factory: pytest.TempPathFactory) -> Basis:
    """Runs of which half saw 5e8 unique tokens, R_D* = 15."""
    folder = tmp_path_factory.mktemp("repeated")
    n, d = grid(budgets=BUDGETS[::2])
    unique = np.where(np.arange(len(n)) % 2 == 0, 1e13, 5e8)
    loss = chinchilla(n, np.array(effective(d, unique, 15.0)))
    loss = loss * np.exp(0.002 * np.random.default_rng(0).standard_normal(len(n)))
    lines = [f"{a},{b},{c},{u},r{i}\n" for i, (a, b, c, u) in enumerate(zip(n, d, loss, unique, strict=True))]
    (folder / "runs.csv").write_text("params,tokens,loss,unique,run\n" + "".join(lines))
    words = ["--form", "data_constrained", "--loss", "l2", "--out", str(folder / "fit.json")]
    main(["scaling", "fit", str(folder / "runs.csv"), *words])
    return read_fit(folder / "fit.json")


def test_a_data_constrained_law_counts_repeats_itself(repeated: Basis, capsys: pytest.CaptureFixture[str]) -> None:
    images = 2e7
    found = advise(repeated, Ask(MACHINE, 2000 * HOUR, unique=images))
    row, fit = found["configs"][0], repeated.fit
    assert row["tokens"] > 3 * images * 256
    assert row["loss"] == pytest.approx(float(fit.predict(row["params"], row["tokens"], unique=images * 256)))
    assert row["loss"] > float(fit.predict(row["params"], row["tokens"])), "twin: as if all were fresh"
    assert row["ci95"][0] < row["loss"] < row["ci95"][1]
    known = next(text for text in found["warnings"] if "unique images count as the fit found: R_D* = " in text)
    assert " to " in known
    assert found["record"]["repeats_worth_is"] == "fitted"
    assert found["record"]["repeats_worth"] == fit.params["R_D"]
    given = advise(repeated, Ask(MACHINE, 2000 * HOUR, unique=images, repeats=2.0))
    assert given["record"]["repeats_worth_is"] == "given"
    assert given["configs"][0]["loss"] > row["loss"]
    fresh = advise(repeated, Ask(MACHINE, 2000 * HOUR))
    assert any("without --unique-images all tokens are fresh" in text for text in fresh["warnings"])
    assert fresh["configs"][0]["loss"] < row["loss"]


def test_every_resample_has_its_own_worth_of_repeats(repeated: Basis) -> None:
    """R_D* and the other parameters are not known apart, so a band with one R_D* for all resamples is another band."""
    ask = Ask(MACHINE, 2000 * HOUR, unique=2e6)
    own = advise(repeated, ask)["configs"][0]
    fixed = advise(repeated, replace(ask, repeats=repeated.fit.params["R_D"]))["configs"][0]
    assert own["loss"] == pytest.approx(fixed["loss"])
    at = np.array([own["params"]]), np.array([own["tokens"]])
    assert repeated.resampled is not None
    low, high = repeated.resampled.band(repeated.fit, *at, also={"unique": np.array([2e6 * 256])})
    assert own["ci95"] == pytest.approx([low[0], high[0]])
    assert fixed["ci95"] != pytest.approx([low[0], high[0]], rel=1e-5), "twin"
