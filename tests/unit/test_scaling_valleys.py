"""IsoFLOP curves and learning-rate sweeps: known bottoms come back, and what has none is refused."""

import json
from pathlib import Path

import numpy as np
import pytest

from llamagen_dist.cli import main
from llamagen_dist.config import load
from llamagen_dist.config.yaml_text import read
from llamagen_dist.errors import UserError
from llamagen_dist.models.cost import training_flops_per_image
from llamagen_dist.models.sizes import GPTConfig
from llamagen_dist.scaling.design import Rates, sweep_of
from llamagen_dist.scaling.fit import fit_law
from llamagen_dist.scaling.frontier import closed_form
from llamagen_dist.scaling.isoflop import isoflop
from llamagen_dist.scaling.points import Points
from llamagen_dist.scaling.rates import best_rates
from llamagen_dist.scaling.valley import akima
from tests.unit.scaling_points import TRUTHS, chinchilla, points

ROOT = Path(__file__).parent.parent.parent


def budgets_of(truth: tuple[float, ...], width: float = 16, count: int = 11) -> Points:
    """Seven budgets, each with sizes from 1/width to width times the best one."""
    a, b, _, alpha, beta = truth
    best = (alpha * a / (beta * b)) ** (1 / (alpha + beta))
    n, d = [], []
    for c in np.geomspace(1e18, 1e21, 7):
        sizes = best * (c / 6) ** (beta / (alpha + beta)) * np.geomspace(1 / width, width, count)
        n += sizes.tolist()
        d += (c / 6 / sizes).tolist()
    sizes, tokens = np.array(n), np.array(d)
    return points(sizes, tokens, chinchilla(sizes, tokens, truth))


def test_the_isoflop_exponent_is_exact_and_its_intercept_is_known_to_be_biased() -> None:
    """Without noise: beta / (alpha + beta), and N* off by 5.6 % at 1e24, which a parametric fit does not show."""
    measured = budgets_of(TRUTHS[0])
    found = isoflop(measured, at=[1e24])
    a, b, _, alpha, beta = TRUTHS[0]
    true = (alpha * a / (beta * b)) ** (1 / (alpha + beta)) * (1e24 / 6) ** (beta / (alpha + beta))
    assert found["exponents"]["params"] == pytest.approx(0.45161, abs=1e-4)
    assert found["at"][0]["params"] / true == pytest.approx(1.056, abs=0.01)
    assert closed_form(fit_law(measured), [1e24])[0].params / true == pytest.approx(1, abs=1e-3)
    assert "N* is biased" in found["warnings"][-1]
    assert found["parametric"]["ratio"] == pytest.approx(1.056, abs=0.01)
    assert found["exponents"]["params"] + found["exponents"]["tokens"] == pytest.approx(1, abs=1e-3)
    narrow = isoflop(budgets_of(TRUTHS[0], width=4), at=[1e24])
    assert narrow["at"][0]["params"] / true == pytest.approx(1.014, abs=0.005), "less with a narrow grid"
    assert min(abs(one["checks"]["akima"] / one["params"] - 1) for one in found["budgets"]) > 0.01


def test_the_interval_of_the_exponent_covers_the_truth_and_grows_with_the_scatter() -> None:
    exact = budgets_of(TRUTHS[0])
    widths = []
    for sigma in (0.001, 0.004):
        noise = np.exp(sigma * np.random.default_rng(3).standard_normal(len(exact)))
        low, high = isoflop(points(exact.params, exact.tokens, exact.loss * noise))["exponents_ci95"]["params"]
        assert low < 0.45161 < high
        widths.append(high - low)
    assert widths[1] > 2 * widths[0]


def test_budgets_without_a_valley_are_left_out_by_name_and_points_without_budgets_refused() -> None:
    exact = budgets_of(TRUTHS[0])
    one_sided = (exact.flops < 2e20) | (exact.params < 8e8)
    found = isoflop(exact.where(one_sided))
    assert len(found["budgets"]) < 7
    assert any("the largest is best" in text or "fewer than 4 sizes" in text for text in found["warnings"])
    with pytest.raises(UserError, match="two budgets of 4 sizes or more"):
        isoflop(exact.where(exact.flops < 2e18))
    n, d = np.geomspace(1e8, 1e10, 100), np.geomspace(1e10, 2e10, 100)
    with pytest.raises(UserError, match="do not fall into budgets"):
        isoflop(points(n, d, chinchilla(n, d)))
    twice = np.concatenate([np.arange(len(exact)), [0]])
    with pytest.raises(UserError, match="a size is there twice"):
        isoflop(points(exact.params[twice], exact.tokens[twice], exact.loss[twice]))


def test_akima_passes_through_its_points_and_keeps_a_kink_local() -> None:
    x = np.array([0.0, 1, 2, 3, 4, 5, 6, 7])
    y = np.where(x < 4, 0.0, x - 4)
    assert akima(x, y, x) == pytest.approx(y, abs=1e-12)
    assert akima(x, y, np.array([0.5, 1.5])) == pytest.approx([0, 0], abs=1e-12), "flat far from the kink"
    assert akima(x, 3 * x - 1, np.array([0.3, 5.7])) == pytest.approx([-0.1, 16.1])


def rates(slope: float, sigma: float = 0.0, widths: tuple[int, ...] = (64, 128, 256, 512)) -> Points:
    """lr* = 2^-8 (width / 128)^slope, seven rates a factor 2 apart around it."""
    random = np.random.default_rng(1)
    rows = []
    for width in widths:
        best = -8 + slope * np.log2(width / 128)
        for step in range(-3, 4):
            log_loss = np.log(3.0) + 0.01 * (step - 0.3) ** 2 + sigma * random.standard_normal()
            rows.append((1e6 * width, 1e8, np.exp(log_loss), 2 ** (best + step - 0.3), width))
    n, d, loss, lr, width = np.array(rows).T
    return Points(n, d, loss, tuple(f"r{i}" for i in range(len(n))), (), {"lr": lr, "width": width})


@pytest.mark.parametrize(("slope", "kind"), [(0.0, "muP"), (-1.0, "standard parametrisation")])
def test_the_best_rate_per_width_and_its_slope_come_back(slope: float, kind: str) -> None:
    found = best_rates(rates(slope, sigma=0.001))
    assert found["slope"]["value"] == pytest.approx(slope, abs=0.1)
    assert found["slope"]["agrees_with"] == [kind]
    for row in found["widths"]:
        assert np.log2(row["lr"]) == pytest.approx(-8 + slope * np.log2(row["width"] / 128), abs=0.2)
        assert row["ci95"][0] < row["lr"] < row["ci95"][1]
    assert best_rates(rates(-0.5, sigma=0.001))["slope"]["agrees_with"] == []


def test_runs_far_from_the_best_rate_are_flagged_with_what_it_costs() -> None:
    runs = rates(-1.0, widths=(1024,))
    found = best_rates(rates(-1.0), check=runs)
    flags = [row["flagged"] for row in found["checked"]]
    assert flags == [True, True, True, False, False, True, True]
    for row, loss in zip(found["checked"], runs.loss, strict=True):
        assert loss - row["excess_loss"] == pytest.approx(3.0, abs=0.01)
    assert "more than 2 x off lr*" in found["warnings"][-1]


def test_rates_that_enclose_no_best_one_are_refused() -> None:
    sweep = rates(0.0)
    with pytest.raises(UserError, match="highest rate is best"):
        best_rates(sweep.where(sweep.also["lr"] < 2.0**-8))
    with pytest.raises(UserError, match="do not all say their lr"):
        best_rates(Points(sweep.params, sweep.tokens, sweep.loss, sweep.runs, (), {"width": sweep.also["width"]}))


def test_the_commands_read_tables_and_write_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sweep, table, out = rates(-1.0, 0.001), tmp_path / "lr.csv", tmp_path / "lr.json"
    rows = zip(sweep.params, sweep.tokens, sweep.loss, sweep.also["lr"], sweep.also["width"], strict=True)
    table.write_text("N,D,loss,learning_rate,d_model\n" + "".join(",".join(map(str, row)) + "\n" for row in rows))
    main(["scaling", "lr", str(table), "--out", str(out)])
    assert json.loads(out.read_text())["slope"]["agrees_with"] == ["standard parametrisation"]
    assert "lr* ~ width^-" in capsys.readouterr().out
    exact = budgets_of(TRUTHS[0])
    rows = zip(exact.params, exact.flops, exact.loss, strict=True)
    table.write_text("N,C,loss\n" + "".join(",".join(map(str, row)) + "\n" for row in rows))
    main(["scaling", "isoflop", str(table), "--at", "1e24", "--out", str(out)])
    assert json.loads(out.read_text())["exponents"]["params"] == pytest.approx(0.45161, abs=1e-4)
    assert "N* ~ C^0.452" in capsys.readouterr().out


LIKE = GPTConfig(n_layer=2, n_head=2, dim=32, vocab_size=512, image_tokens=64, num_classes=10, multiple_of=8)


def test_a_ladder_spends_each_budget_on_each_size() -> None:
    made = sweep_of(LIKE, ["1x24", "4x64"], [1e11, 6e11], Rates(4e-3, 64, -1), 32, "x.yaml")
    for name, layers, dim in (("l1-d24", 1, 24), ("l4-d64", 4, 64)):
        point = made["list"][name]
        model = GPTConfig(layers, point["model.n_head"], dim, 512, 64, 10, multiple_of=8)
        each = training_flops_per_image(model)
        assert [images * each for images in point["validation.at_images"]] == pytest.approx([1e11, 6e11], rel=0.02)
        assert point["optim.lr"] == pytest.approx(4e-3 * 64 / dim, rel=1e-2)
    with pytest.raises(UserError, match="2 steps of a 4x64"):
        sweep_of(LIKE, ["4x64"], [5e9, 6e11], Rates(4e-3, 64, -1), 32, "x.yaml")
    with pytest.raises(UserError, match="write LAYERSxWIDTH"):
        sweep_of(LIKE, ["4-64"], [1e11], Rates(4e-3, 64, -1), 32, "x.yaml")


def test_the_shipped_ladder_is_what_its_command_writes(tmp_path: Path) -> None:
    shipped = ROOT / "configs" / "sweep" / "scaling.yaml"
    said = shipped.read_text().split("llamagen ")[1].split("# and by hand")[0].replace("\\\n#", " ").split()
    out = tmp_path / "sweep" / "scaling.yaml"
    out.parent.mkdir()
    words = [str(ROOT / word) if word.startswith("configs/gpt") else word for word in said]
    main([*words[:-1], str(out)])
    assert read(out)["list"] == read(shipped)["list"]
    assert {**read(shipped)["set"], **read(out)["set"]} == read(shipped)["set"], "and what it sets stays"
    load(shipped, kind="sweep")
