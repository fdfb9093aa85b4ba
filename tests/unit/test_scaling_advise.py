"""What to train with a budget: the best of what can be built, the layout that fits, and what is not known of it."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llamagen_dist.cli import main
from llamagen_dist.errors import UserError
from llamagen_dist.models.cost import total_parameters, training_flops_per_image
from llamagen_dist.models.sizes import GPTConfig
from llamagen_dist.planning.plan import Machine
from llamagen_dist.scaling.advise import Ask, Planner, advise, effective
from llamagen_dist.scaling.basis import Basis, read_fit
from llamagen_dist.scaling.shapes import family
from llamagen_dist.tracking.devices import named
from tests.unit.scaling_points import TRUTHS, chinchilla, grid

HOUR = 3600 * 0.4 * 989.4e12  # FLOPs of an H100 at 40 % of its bf16 rate
MACHINE = Machine(named("H100"), 8, 8, 0.4, True)


def write_fit(folder: Path, noise: float = 0.003, seed: int = 0, extra: tuple[str, ...] = ()) -> Path:
    """A fit of 30 runs of TRUTHS[0], through the command."""
    n, d = grid()
    loss = chinchilla(n, d) * np.exp(noise * np.random.default_rng(seed).standard_normal(len(n)))
    rows = "".join(f"{a},{b},{c},r{i}\n" for i, (a, b, c) in enumerate(zip(n, d, loss, strict=True)))
    (folder / "runs.csv").write_text("params,tokens,loss,run\n" + rows)
    main(["scaling", "fit", str(folder / "runs.csv"), *extra, "--out", str(folder / "fit.json")])
    return folder / "fit.json"


@pytest.fixture(scope="module")
def fitted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_fit(tmp_path_factory.mktemp("fit"))


@pytest.fixture(scope="module")
def basis(fitted: Path) -> Basis:
    return read_fit(fitted)


def test_the_table_is_ranked_buildable_and_spends_the_budget(basis: Basis) -> None:
    found = advise(basis, Ask(MACHINE, 2000 * HOUR))
    assert found["budget"]["gpu_hours"] == pytest.approx(2000)
    rows = found["configs"]
    assert [row["rank"] for row in rows] == list(range(1, len(rows) + 1))
    assert [row["loss"] for row in rows] == sorted(row["loss"] for row in rows)
    for row in rows:
        model = GPTConfig(row["n_layer"], row["n_head"], row["dim"])
        assert total_parameters(model) == row["params"]
        assert row["images"] * training_flops_per_image(model) == pytest.approx(2000 * HOUR)
        assert row["loss"] == pytest.approx(float(basis.fit.predict(row["params"], row["tokens"])))
        assert row["layout"]["bytes"] <= 0.9 * MACHINE.device.memory
        assert row["hours"] == pytest.approx(250)
        assert row["ci95"][0] < row["loss"] < row["ci95"][1]
    a, b, e, alpha, beta = TRUTHS[0]
    n = np.geomspace(1e8, 1e12, 20000)
    shapes = family(basis.like)
    truth = n[(e + a / n**alpha + b / (2000 * HOUR / shapes.flops_at(n, "total")) ** beta).argmin()]
    low, high = found["optimum"]["ci95"]["params_fit"]
    assert low < truth < high
    assert found["flat"]["params"][0] < rows[0]["params"] < found["flat"]["params"][1]


def test_a_worse_size_is_not_ranked_first(basis: Basis, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sabotage: a law read upside down would put the worst first, and the order above would not notice by itself."""
    found = advise(basis, Ask(MACHINE, 2000 * HOUR))["configs"]
    lowest = found[0]["loss"]
    shapes = family(basis.like)
    tokens = 2000 * HOUR / shapes.flops
    assert lowest == pytest.approx(float(basis.fit.predict(shapes.params, tokens).min()))
    monkeypatch.setattr(Basis, "predict", lambda self, size, at: 10 - self.fit.predict(size, at))
    assert advise(basis, Ask(MACHINE, 2000 * HOUR))["configs"][0]["params"] != found[0]["params"]


def test_far_beyond_the_runs_it_says_so_and_widens_the_band(basis: Basis) -> None:
    near = advise(basis, Ask(MACHINE, 5 * basis.largest))
    far = advise(basis, Ask(MACHINE, 1000 * basis.largest))
    assert (near["extrapolated"], far["extrapolated"]) == (False, True)
    assert far["forms"] == ["chinchilla", "chinchilla_tied"]
    assert any("an extrapolation" in text for text in far["warnings"])
    assert not any("an extrapolation" in text for text in near["warnings"])
    row = far["configs"][0]
    alone, _ = basis.resampled.band(basis.fit, np.array([row["params"]]), np.array([row["tokens"]]))  # type: ignore[union-attr]
    assert row["ci95"][1] - row["ci95"][0] > 0
    assert row["ci95"][0] <= alone[0]


def test_repeats_are_worth_less_than_fresh_images(basis: Basis) -> None:
    assert effective(5e9, None, 5.0) == 5e9
    assert effective(5e9, 1e10, 5.0) == 5e9
    assert effective(1e12, 1e10, 5.0) == pytest.approx(1e10 * (1 + 5 * (1 - np.exp(-99 / 5))))
    assert effective(1e12, 1e10, np.inf) == 1e12
    fresh = advise(basis, Ask(MACHINE, 200 * HOUR))
    few = advise(basis, Ask(MACHINE, 200 * HOUR, unique=1281167))
    known = advise(basis, Ask(MACHINE, 200 * HOUR, unique=1281167, repeats=1e9))
    assert few["configs"][0]["loss"] > fresh["configs"][0]["loss"]
    assert few["configs"][0]["params"] > fresh["configs"][0]["params"], "repeats are better spent on size"
    assert known["configs"][0]["loss"] == pytest.approx(fresh["configs"][0]["loss"], rel=1e-4)
    assert few["configs"][0]["epochs"] == pytest.approx(few["configs"][0]["images"] / 1281167)
    assert few["configs"][0]["ci95"][0] <= float(
        basis.fit.predict(few["configs"][0]["params"], few["configs"][0]["tokens"])
    ), "the band reaches to repeats as good as fresh images"
    assert any("R_D* = 5.5" in text for text in few["warnings"])
    assert not any("R_D*" in text for text in known["warnings"])


def test_the_least_budget_for_a_loss_reaches_it_and_no_less_does(basis: Basis) -> None:
    planner = Planner(basis, family(basis.like), Ask(MACHINE), np.inf, False)
    found = planner.cheapest(2.6)
    assert planner.curve(basis.fit.theta[None], found["flops"])[1].min() == pytest.approx(2.6, abs=2e-3)
    assert found["ci95"][0] < found["flops"] < found["ci95"][1]
    assert planner.curve(basis.fit.theta[None], found["flops"] / 2)[1].min() > 2.605, "sabotage: half does not"
    with pytest.raises(UserError, match=r"reaches .* at best .*floor E is 1\."):
        planner.cheapest(1.6)
    with pytest.raises(UserError, match="with so many unique images"):
        advise(basis, Ask(MACHINE, target=2.2, unique=1e5))


def test_the_runs_it_asks_for_narrow_the_optimum(basis: Basis, tmp_path: Path) -> None:
    """Refit with eight measurements of the run that is said to help most: N*'s interval shrinks."""
    budget = 100 * basis.largest
    before = advise(basis, Ask(MACHINE, budget))
    best = before["next_runs"][0]
    assert best["narrows_by"] >= 0.05
    assert best["flops"] <= 3 * basis.largest * 1.001
    rows = (tmp_path / "runs.csv").write_text
    n, d = grid()
    n, d = np.append(n, [best["params_fit"]] * 8), np.append(d, [best["tokens"]] * 8)
    loss = chinchilla(n, d) * np.exp(0.003 * np.random.default_rng(0).standard_normal(len(n)))
    lines = [f"{a},{b},{c},r{i}\n" for i, (a, b, c) in enumerate(zip(n, d, loss, strict=True))]
    rows("params,tokens,loss,run\n" + "".join(lines))
    main(["scaling", "fit", str(tmp_path / "runs.csv"), "--out", str(tmp_path / "fit.json")])
    after = advise(read_fit(tmp_path / "fit.json"), Ask(MACHINE, budget))

    def width(found: dict[str, Any]) -> float:
        low, high = found["optimum"]["ci95"]["params_fit"]
        return float(np.log(high / low))

    assert width(after) < width(before)


def test_what_fits_on_no_layout_is_left_out_by_name(basis: Basis) -> None:
    one = Machine(named("A100-40"), 1, 8, 0.4, True)
    found = advise(basis, Ask(one, 2000 * HOUR))
    assert found["does_not_fit"]
    assert all(row["layout"]["bytes"] <= 0.9 * one.device.memory for row in found["configs"])
    with pytest.raises(UserError, match=r"none of the best sizes fits on 1 x custom:0.005:100"):
        advise(basis, Ask(Machine(named("custom:0.005:100"), 1, 8, 0.4, True), 2000 * HOUR))


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"objective": 0.5}, "its points give the objective"),
        ({"points": []}, "not a result of llamagen scaling fit"),
        ({"record": None}, "not a result of llamagen scaling fit"),
    ],
)
def test_a_changed_fit_is_refused(fitted: Path, tmp_path: Path, change: dict[str, Any], sentence: str) -> None:
    path = tmp_path / "fit.json"
    found = json.loads(fitted.read_text()) | change
    path.write_text(json.dumps({key: value for key, value in found.items() if value is not None}))
    with pytest.raises(UserError, match=sentence):
        read_fit(path)


@pytest.mark.long
def test_a_law_that_cannot_divide_a_budget_is_refused(tmp_path: Path) -> None:
    fit = write_fit(tmp_path, extra=("--form", "power_irr"))
    with pytest.raises(UserError, match="more tokens do not lower the loss"):
        advise(read_fit(fit), Ask(MACHINE, 2000 * HOUR))


def test_the_command_prints_a_table_and_json(fitted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "advice.json"
    words = ["scaling", "advise", str(fitted), "--budget", "2000", "--gpu", "h100", "--mfu", "0.4", "--gpus", "64"]
    main([*words, "--unique-images", "1281167", "--out", str(out)])
    shown = capsys.readouterr().out
    for word in ("2 k GPU-hours of H100 at 40 % MFU (given)", "ZeRO-", "as good within 0.1 %", "to know N* better"):
        assert word in shown
    main([*words, "--unique-images", "1281167", "--json"])
    assert json.loads(capsys.readouterr().out) == json.loads(out.read_text())
    days = [*words[:3], "--budget", str(2000 / 24), "--unit", "gpu-days", *words[5:], "--json"]
    main(days)
    assert json.loads(capsys.readouterr().out)["budget"]["flops"] == pytest.approx(2000 * HOUR)
    with pytest.raises(UserError, match="give --budget N"):
        main(["scaling", "advise", str(fitted)])
