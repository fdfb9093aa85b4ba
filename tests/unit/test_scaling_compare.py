"""Forms compared: criteria by hand, errors on what was held out, and whether the two agree."""

import json
from pathlib import Path

import numpy as np
import pytest

from llamagen_dist.cli import main
from llamagen_dist.errors import UserError
from llamagen_dist.scaling.compare import compare, criteria
from llamagen_dist.scaling.fit import fit_law
from llamagen_dist.scaling.points import Points
from tests.unit.scaling_points import TRUTHS, chinchilla, grid, noisy, points


def test_criteria_are_those_of_least_squares() -> None:
    """-2 log L of normal residuals is n (log(2 pi RSS / n) + 1); the scale is one more parameter."""
    given = noisy(3, 0.01)
    fit = fit_law(given, loss="l2")
    n, k, rss = 30, 6, float((fit.residuals**2).sum())
    found = criteria(fit)
    twice = n * (np.log(2 * np.pi * rss / n) + 1)
    assert found["aic"] == pytest.approx(twice + 2 * k)
    assert found["aicc"] == pytest.approx(twice + 2 * k + 2 * k * (k + 1) / (n - k - 1))
    assert found["bic"] == pytest.approx(twice + k * np.log(n))
    laplace = fit_law(given, loss="lad")
    spread = float(np.abs(laplace.residuals).mean())
    assert criteria(laplace)["aic"] == pytest.approx(2 * n * (np.log(2 * spread) + 1) + 2 * k)


def test_the_true_form_wins_where_it_can_be_seen() -> None:
    """alpha and beta far apart: the tied law, one of power only and one without a floor lose in every way."""
    n, d = grid()
    truth = (60.0, 2e5, 1.69, 0.22, 0.55)
    loss = chinchilla(n, d, truth) * np.exp(0.001 * np.random.default_rng(0).standard_normal(30))
    found = compare(points(n, d, loss), ["chinchilla_tied", "kaplan_nd", "power_irr", "chinchilla"])
    assert {by: ranks["chinchilla"] for by, ranks in found["ranks"].items()} == dict.fromkeys(
        ("aic", "aicc", "bic", "held_out"), 1
    )
    assert found["agree"]
    assert "chinchilla is first by AICc and on the runs held out" in found["verdict"]
    rows = {row["form"]: row for row in found["forms"]}
    cuts = [cut["cut"] for cut in rows["chinchilla"]["held_out"]]
    assert [cut[0] for cut in cuts].count("N") == 2
    assert [cut[0] for cut in cuts].count("C") == 3
    for cut in rows["chinchilla"]["held_out"]:
        assert cut["fitted"] + cut["held_out"] == 30
        assert abs(cut["error"]) <= cut["absolute_error"] < 0.01
    assert np.mean([cut["coverage"] for cut in rows["chinchilla"]["held_out"]]) > 0.7
    worst = rows["power_irr"]["held_out"]
    assert np.mean([cut["absolute_error"] for cut in worst]) > 0.01


def test_held_out_errors_by_hand() -> None:
    given = noisy(8, 0.01)
    found = compare(given, ["chinchilla", "chinchilla_tied"], "l2")
    cut = found["forms"][0]["held_out"][0]
    keep = given.params < 3.1e9
    fit = fit_law(given.where(keep), "chinchilla", "l2")
    error = fit.predict(given.params[~keep], given.tokens[~keep]) / given.loss[~keep] - 1
    assert (cut["cut"], cut["fitted"], cut["held_out"]) == ("N >= 3.1e+09", 24, 6)
    assert cut["error"] == pytest.approx(error.mean())
    assert cut["absolute_error"] == pytest.approx(np.abs(error).mean())
    low, high = 0.0, 1.0
    assert low <= cut["coverage"] <= high


def test_a_disagreement_is_said() -> None:
    """Largest runs that leave the law (too small a loss): the richer form fits all points better, the poorer one,
    fitted without them, misses them less."""
    n, d = grid()
    loss = chinchilla(n, d, TRUTHS[0]) * np.exp(0.002 * np.random.default_rng(1).standard_normal(30))
    found = [
        compare(points(n, d, loss * np.where(n > 1e9, factor, 1.0)), ["chinchilla", "chinchilla_tied"], "l2")
        for factor in (1.0, 0.99, 1.01, 0.98, 1.02)
    ]
    for one in found:
        ranks = one["ranks"]
        first = {by: min(ranks[by], key=ranks[by].__getitem__) for by in ("aicc", "held_out")}
        assert one["agree"] == (first["aicc"] == first["held_out"])
        assert ("they disagree: AICc prefers" in one["verdict"]) == (not one["agree"])
    assert {one["agree"] for one in found} == {True, False}


def test_what_cannot_be_compared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = noisy(1, 0.01)
    with pytest.raises(UserError, match="form 'x' is unknown"):
        compare(given, ["chinchilla", "x"])
    with pytest.raises(UserError, match=r"two forms that can be fitted: data_constrained: form data_constrained needs"):
        compare(given, ["chinchilla", "data_constrained"])
    few = given.where(np.arange(30) < 7)
    with pytest.raises(UserError, match="needs two forms"):
        compare(Points(few.params, few.tokens, few.loss, few.runs), ["chinchilla"])
    rows = [f"{a:.17g},{b:.17g},{c:.17g}" for a, b, c in zip(given.params, given.tokens, given.loss, strict=True)]
    (tmp_path / "runs.csv").write_text("\n".join(["params,tokens,loss", *rows]))
    out = tmp_path / "compare.json"
    forms = "chinchilla,power_irr_compute,broken1"
    main(["scaling", "compare", str(tmp_path / "runs.csv"), "--forms", forms, "--delta", "auto", "--out", str(out)])
    found = json.loads(out.read_text())
    shown = capsys.readouterr().out
    assert found["verdict"] in shown
    assert "broken1: the 30 points lie at only 5 different params" in shown
    assert [row["form"] for row in found["forms"]] == ["chinchilla", "power_irr_compute"]
    assert 1e-3 < found["delta"] < 0.05
